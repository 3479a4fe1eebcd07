"""Chunks: claimed under a lease, renewed while worked on, given back when the worker is gone."""

from collections.abc import Sequence
from dataclasses import dataclass
from uuid import UUID

import peewee

from service import failpoints
from service.db import results


@dataclass(frozen=True)
class Chunk:
    """A run of consecutive requests that this worker holds.

    `deaths` is 0 as a rule. A suspect is a chunk of one request: with 1 it was in an engine that died; with 2 it was
    one of few suspects in an engine that died again, and runs alone.
    """

    id: int
    batch_id: int
    first_index: int
    count: int
    deaths: int = 0
    # The trace in which its batch was created.
    traceparent: str | None = None


@dataclass(frozen=True)
class Request:
    """One request to run. `body` is the JSON text as the client gave it."""

    chunk_id: int
    batch_id: int
    index: int
    custom_id: str
    url: str
    body: str
    traceparent: str | None = None


def claim(
    db: peewee.PostgresqlDatabase,
    worker_id: str,
    incarnation: UUID,
    models: Sequence[str],
    limit: int,
    lease_s: float,
) -> list[Chunk]:
    """Leases up to `limit` pending chunks whose models this worker serves: highest priority first, then oldest.

    Costs the same whatever the backlog: the partial index holds pending chunks in this order, and chunks that
    another worker is claiming are skipped, not waited for.
    """
    return _claim(
        db,
        "SELECT id FROM chunks WHERE state = 'pending' AND deaths = 0 AND models <@ %(models)s::text[]"
        " ORDER BY priority DESC, id LIMIT %(limit)s FOR UPDATE SKIP LOCKED",
        worker_id,
        incarnation,
        models,
        limit,
        lease_s,
    )


def claim_suspects(
    db: peewee.PostgresqlDatabase,
    worker_id: str,
    incarnation: UUID,
    models: Sequence[str],
    held: int,
    lease_s: float,
) -> list[Chunk]:
    """Leases suspects of a first death, so that with the `held` ones they are no more than the root of all of them.

    The engine dies once more for the few that run together, and once for the one that runs alone: three deaths find
    the killer among N in about two roots of N runs.
    """
    return _claim(
        db,
        "SELECT id FROM chunks WHERE state = 'pending' AND deaths = 1 AND models <@ %(models)s::text[] ORDER BY id"
        " LIMIT greatest(0, (SELECT ceil(sqrt(count(*))) FROM chunks WHERE state <> 'done' AND deaths = 1)"
        " - %(limit)s) FOR UPDATE SKIP LOCKED",
        worker_id,
        incarnation,
        models,
        held,
        lease_s,
    )


def claim_alone(
    db: peewee.PostgresqlDatabase, worker_id: str, incarnation: UUID, models: Sequence[str], lease_s: float
) -> list[Chunk]:
    """Leases one suspect of two deaths: to be run with nothing else in the engine, and with nothing else held."""
    return _claim(
        db,
        "SELECT id FROM chunks WHERE state = 'pending' AND deaths > 1 AND models <@ %(models)s::text[]"
        " ORDER BY id LIMIT %(limit)s FOR UPDATE SKIP LOCKED",
        worker_id,
        incarnation,
        models,
        1,
        lease_s,
    )


def suspects(db: peewee.PostgresqlDatabase, models: Sequence[str]) -> tuple[int, int]:
    """How many suspects wait that this worker could run: of one death, and of more."""
    row = db.execute_sql(
        "SELECT count(*) FILTER (WHERE deaths = 1), count(*) FILTER (WHERE deaths > 1) FROM chunks"
        " WHERE state <> 'done' AND deaths > 0 AND state = 'pending' AND models <@ %s::text[]",
        (list(models),),
    ).fetchone()
    return int(row[0]), int(row[1])


@dataclass(frozen=True)
class Work:
    """Chunks that were claimed, each with its requests without a result; and whether suspects wait to run alone."""

    chunks: Sequence[tuple[Chunk, Sequence[Request]]]
    are_alone_waiting: bool


def take(
    db: peewee.PostgresqlDatabase,
    worker_id: str,
    incarnation: UUID,
    models: Sequence[str],
    limit: int,
    suspects_held: int,
    lease_s: float,
) -> Work:
    """Claims up to `limit` chunks, and suspects that may run beside others; with their requests, all in one call."""
    few, alone = suspects(db, models)
    taken = claim(db, worker_id, incarnation, models, limit, lease_s)
    if few:
        taken += claim_suspects(db, worker_id, incarnation, models, suspects_held, lease_s)
    return Work([(chunk, unanswered(db, chunk)) for chunk in taken], alone > 0)


def take_alone(
    db: peewee.PostgresqlDatabase, worker_id: str, incarnation: UUID, models: Sequence[str], lease_s: float
) -> Work:
    """Claims one suspect that must run alone, with its request."""
    taken = claim_alone(db, worker_id, incarnation, models, lease_s)
    return Work([(chunk, unanswered(db, chunk)) for chunk in taken], bool(taken))


def _claim(
    db: peewee.PostgresqlDatabase,
    which: str,
    worker_id: str,
    incarnation: UUID,
    models: Sequence[str],
    limit: int,
    lease_s: float,
) -> list[Chunk]:
    failpoints.hit("claim.before_commit")
    rows = db.execute_sql(
        f"""
        WITH next AS ({which}
        ), taken AS (
            UPDATE chunks SET state = 'leased', worker_id = %(worker_id)s, incarnation = %(incarnation)s::uuid,
                   lease_until = clock_timestamp() + make_interval(secs => %(lease_s)s)
            FROM next WHERE chunks.id = next.id
            RETURNING chunks.id, chunks.batch_id, chunks.first_index, chunks.count, chunks.priority, chunks.deaths
        ), started AS (
            -- Who cancels or ends a batch locks it before its chunks: not waiting for it here cannot deadlock.
            UPDATE batches SET start_time = clock_timestamp()
            WHERE id IN (SELECT id FROM batches WHERE id IN (SELECT batch_id FROM taken) AND start_time IS NULL
                         FOR UPDATE SKIP LOCKED)
        )
        SELECT id, batch_id, first_index, count, deaths,
               (SELECT traceparent FROM batches WHERE batches.id = taken.batch_id)
        FROM taken ORDER BY priority DESC, id
        """,
        {
            "models": list(models),
            "limit": limit,
            "worker_id": worker_id,
            "incarnation": str(incarnation),
            "lease_s": lease_s,
        },
    ).fetchall()
    failpoints.hit("claim.after_commit")
    return [Chunk(*row) for row in rows]


def unanswered(db: peewee.PostgresqlDatabase, chunk: Chunk) -> list[Request]:
    """The requests of a chunk that have no result yet, in order."""
    rows = db.execute_sql(
        """
        SELECT q.index, q.custom_id, q.url, q.body FROM requests q
        WHERE q.batch_id = %(batch)s AND q.index >= %(first)s AND q.index < %(end)s
          AND NOT EXISTS (SELECT FROM results r WHERE r.batch_id = q.batch_id AND r.index = q.index)
        ORDER BY q.index
        """,
        {"batch": chunk.batch_id, "first": chunk.first_index, "end": chunk.first_index + chunk.count},
    )
    return [
        Request(chunk.id, chunk.batch_id, index, custom_id, url, body, chunk.traceparent)
        for index, custom_id, url, body in rows.fetchall()
    ]


def renew(db: peewee.PostgresqlDatabase, ids: Sequence[int], incarnation: UUID, lease_s: float) -> set[int]:
    """Lengthens the leases that are still held; returns their ids. What is missing is lost: stop working on it.

    A lease that ran out and that nobody has released is still held: after an outage of Postgres work goes on.
    One of a batch that was cancelled is lost.
    """
    rows = db.execute_sql(
        """
        UPDATE chunks c SET lease_until = clock_timestamp() + make_interval(secs => %(lease_s)s)
        FROM batches b
        WHERE c.id = ANY(%(ids)s) AND c.state = 'leased' AND c.incarnation = %(incarnation)s::uuid
          AND b.id = c.batch_id AND b.state = 'in_progress'
        RETURNING c.id
        """,
        {"ids": list(ids), "incarnation": str(incarnation), "lease_s": lease_s},
    )
    return {row[0] for row in rows.fetchall()}


def release_expired(db: peewee.PostgresqlDatabase, lease_s: float) -> int:
    """Puts chunks whose lease ran out back into the queue. Returns how many.

    Not in the first `lease_s` of Postgres itself: while it was away nobody could renew.
    """
    return _release(
        db,
        "lease_until < clock_timestamp()"
        " AND pg_postmaster_start_time() < clock_timestamp() - make_interval(secs => %(lease_s)s)",
        {"lease_s": lease_s},
    )


@dataclass(frozen=True)
class Burial:
    """What became of the chunks of a life that has ended: how many were put back, made suspects, given an error."""

    released: int
    suspects: int
    crashed: int


def bury(db: peewee.PostgresqlDatabase, worker_id: str) -> Burial:
    """Deals with all that a worker held when it or its engine died. Only for the process that holds the worker's lock.

    A suspect that was alone gets its error. Otherwise each request held has one death more to its name: so who kills
    is found by its third death, however many others like it there are.
    """
    with db.atomic():
        held = [
            (Chunk(*row[:5]), row[5])
            for row in db.execute_sql(
                "SELECT id, batch_id, first_index, count, deaths, incarnation FROM chunks"
                " WHERE state = 'leased' AND worker_id = %s ORDER BY id FOR UPDATE",
                (worker_id,),
            ).fetchall()
        ]
        alone = [(chunk, incarnation) for chunk, incarnation in held if chunk.deaths > 1]
        crashed = sum(results.write(db, [_crashed(chunk)], incarnation) for chunk, incarnation in alone)
        made = 0
        if not alone:
            few = [chunk.id for chunk, _ in held if chunk.deaths == 1]
            db.execute_sql("UPDATE chunks SET deaths = deaths + 1 WHERE id = ANY(%s)", (few,))
            made = len(few) + _suspect(db, [chunk.id for chunk, _ in held if chunk.deaths == 0])
        released = _release(db, "worker_id = %(worker_id)s", {"worker_id": worker_id})
        failpoints.hit("bury.before_commit")
    failpoints.hit("bury.after_commit")
    return Burial(released, made, crashed)


def _crashed(chunk: Chunk) -> results.Result:
    message = (
        f"The engine died {chunk.deaths + 1} times with this request in it: among many, among few suspects,"
        " and at last with this request alone."
    )
    return results.Result(
        chunk.id, chunk.batch_id, chunk.first_index, error_code="REQUEST_CRASHED_ENGINE", error_message=message
    )


def _suspect(db: peewee.PostgresqlDatabase, ids: Sequence[int]) -> int:
    """Makes each request without result in these chunks a chunk of its own, and ends the chunks."""
    made = db.execute_sql(
        """
        INSERT INTO chunks (batch_id, first_index, count, unfinished, priority, models, deaths)
        SELECT q.batch_id, q.index, 1, 1, c.priority, c.models, 1
        FROM chunks c
        JOIN requests q ON q.batch_id = c.batch_id AND q.index >= c.first_index AND q.index < c.first_index + c.count
        WHERE c.id = ANY(%(ids)s)
          AND NOT EXISTS (SELECT FROM results r WHERE r.batch_id = q.batch_id AND r.index = q.index)
        ORDER BY c.id, q.index
        """,
        {"ids": list(ids)},
    ).rowcount
    db.execute_sql(
        "UPDATE chunks SET state = 'done', unfinished = 0, worker_id = NULL, incarnation = NULL, lease_until = NULL"
        " WHERE id = ANY(%(ids)s)",
        {"ids": list(ids)},
    )
    return int(made)


def release(db: peewee.PostgresqlDatabase, ids: Sequence[int], incarnation: UUID) -> int:
    """Puts these chunks of an incarnation back. Returns how many were still held."""
    failpoints.hit("release.before_commit")
    released = _release(
        db,
        "id = ANY(%(ids)s) AND incarnation = %(incarnation)s::uuid",
        {"ids": list(ids), "incarnation": str(incarnation)},
    )
    failpoints.hit("release.after_commit")
    return released


def drop_cancelled(db: peewee.PostgresqlDatabase, ids: Sequence[int], incarnation: UUID) -> int:
    """Lets go of chunks whose batch was cancelled. Returns how many were held."""
    cursor = db.execute_sql(
        """
        DELETE FROM chunks c USING batches b
        WHERE c.id = ANY(%(ids)s) AND c.incarnation = %(incarnation)s::uuid
          AND b.id = c.batch_id AND b.state = 'cancelling'
        """,
        {"ids": list(ids), "incarnation": str(incarnation)},
    )
    return int(cursor.rowcount)


def _release(db: peewee.PostgresqlDatabase, which: str, params: dict[str, object]) -> int:
    cursor = db.execute_sql(
        "UPDATE chunks SET state = 'pending', worker_id = NULL, incarnation = NULL, lease_until = NULL"
        f" WHERE state = 'leased' AND {which}",
        params or None,
    )
    return int(cursor.rowcount)
