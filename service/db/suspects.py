"""Suspects: requests that were in an engine when it died. Further deaths, each with fewer suspects, find the one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from uuid import UUID

import peewee

from service import failpoints
from service.db import results
from service.db.chunks import ENTRY, INDEXES, NO_RESULT, Chunk, Holder, host_of, lease, release_where

# Suspects of lost hosts that each worker runs at a time.
LOST_AT_ONCE = 16


def waiting(db: peewee.PostgresqlDatabase, models: Sequence[str]) -> tuple[int, int]:
    """How many pending suspects this worker could run: those with one death, and those with more."""
    row = db.execute_sql(
        "SELECT count(*) FILTER (WHERE deaths = 1), count(*) FILTER (WHERE deaths > 1) FROM chunks"
        " WHERE state <> 'done' AND deaths > 0 AND state = 'pending' AND models <@ %s::text[]",
        (list(models),),
    ).fetchone()
    return int(row[0]), int(row[1])


def claim_few(db: peewee.PostgresqlDatabase, holder: Holder, models: Sequence[str], held: int) -> list[Chunk]:
    """Leases suspects with one death: with the `held` ones at most the square root of the number of all of them.

    The engine dies once more with such a group, and once with a single request: three deaths find the culprit among
    N suspects in about 2·√N runs. A host is seldom lost because of a request, so those of lost hosts run more at a
    time: a quarter of them, at least `LOST_AT_ONCE`.
    """
    return lease(
        db,
        holder,
        """SELECT id FROM chunks WHERE state = 'pending' AND deaths = 1 AND models <@ %(models)s::text[] ORDER BY id
        LIMIT greatest(0, (
            SELECT ceil(sqrt(count(*) FILTER (WHERE NOT is_lost))) + CASE WHEN bool_or(is_lost)
                   THEN greatest(ceil(count(*) FILTER (WHERE is_lost) / 4.0), %(at_once)s) ELSE 0 END
            FROM chunks WHERE state <> 'done' AND deaths = 1) - %(held)s) FOR UPDATE SKIP LOCKED""",
        {"models": list(models), "held": held, "at_once": LOST_AT_ONCE},
    )


def claim_alone(db: peewee.PostgresqlDatabase, holder: Holder, models: Sequence[str]) -> list[Chunk]:
    """Leases one suspect with two or more deaths, to run with nothing else in the engine and nothing else held.

    Those that have not died on this host come first: who dies on another host too is to blame.
    """
    return lease(
        db,
        holder,
        "SELECT id FROM chunks WHERE state = 'pending' AND deaths > 1 AND models <@ %(models)s::text[]"
        " ORDER BY %(host)s = ANY(death_hosts), id LIMIT 1 FOR UPDATE SKIP LOCKED",
        {"models": list(models), "host": holder.host},
    )


@dataclass(frozen=True)
class Burial:
    """How many chunks of a life that has ended were put back, made suspects, or given an error."""

    released: int
    suspects: int
    crashed: int


@dataclass(frozen=True)
class _Held:
    """A chunk that a life held which has ended. `begun`: how many of its requests may have been in the engine."""

    chunk: Chunk
    incarnation: UUID
    begun: int
    death_hosts: Sequence[str]


# What the life `mine` of a worker held or, as long as it has the name, earlier ones: never what a later one holds.
_NOT_LATER = """
worker_id = %(worker_id)s AND (incarnation = %(mine)s::uuid OR EXISTS (
    SELECT FROM heartbeats h WHERE h.worker_id = %(worker_id)s AND h.incarnation = %(mine)s::uuid))
"""


def bury(db: peewee.PostgresqlDatabase, worker_id: str, life: UUID | None = None) -> Burial:
    """Settles all that a worker held when it or its engine died. Only for the process that has the worker's name.

    `life` is that process's, which may have lost the name without knowing it yet: then it settles what it held itself,
    and leaves alone what the life after it holds. None: nobody else can have the name.

    A suspect that ran alone gets its error. Otherwise each request that may have been in the engine counts one more
    death: a request that kills the engine is found at its third death, however many others like it there are.
    """
    which = "worker_id = %(worker_id)s" if life is None else _NOT_LATER
    return _bury(db, worker_id, which, {"worker_id": worker_id, "mine": str(life)}, is_lost=False)


def bury_lost(db: peewee.PostgresqlDatabase, worker_id: str, incarnation: str, which: str = "true") -> Burial:
    """Settles the chunks matching `which` that a life held whose host is gone, as far as others can know.

    A host may be lost for any reason. So the third death counts only if there was one on another host, and requests
    of which it is not known that they were in the engine count none. Leaves out chunks that are locked.
    """
    mine = f"worker_id = %(worker_id)s AND incarnation = %(incarnation)s::uuid AND {which}"
    return _bury(db, worker_id, mine, {"worker_id": worker_id, "incarnation": str(incarnation)}, is_lost=True)


def _bury(
    db: peewee.PostgresqlDatabase, worker_id: str, which: str, params: Mapping[str, object], is_lost: bool
) -> Burial:
    host = host_of(worker_id)
    with db.atomic():
        held = [
            _Held(Chunk(*row[:5]), *row[5:])
            for row in db.execute_sql(
                f"""
                SELECT id, batch_id, first_index, count, deaths, incarnation,
                       coalesce(begun, {0 if is_lost else "count"}), death_hosts
                FROM chunks WHERE state = 'leased' AND {which}
                ORDER BY id FOR UPDATE {"SKIP LOCKED" if is_lost else ""}
                """,
                params,
            ).fetchall()
        ]
        in_engine = [each for each in held if each.begun]
        alone = [each for each in in_engine if each.chunk.deaths > 1]
        guilty = [each for each in alone if not is_lost or {*each.death_hosts} - {host}]
        crashed = sum(results.write(db, [_crashed(each.chunk)], each.incarnation) for each in guilty)
        again = [each for each in alone or in_engine if each.chunk.deaths and each not in guilty]
        db.execute_sql(
            "UPDATE chunks SET deaths = deaths + 1, death_hosts = array_append(array_remove(death_hosts, %(host)s),"
            " %(host)s) WHERE id = ANY(%(ids)s)",
            {"host": host, "ids": [each.chunk.id for each in again]},
        )
        first = {} if alone else {each.chunk.id: each.begun for each in in_engine if not each.chunk.deaths}
        made = len(again) + _suspect(db, first, host, is_lost)
        ids = {"ids": [each.chunk.id for each in held]}
        released = release_where(db, "id = ANY(%(ids)s)", ids)
        failpoints.hit("bury.before_commit")
    failpoints.hit("bury.after_commit")
    return Burial(released, made, crashed)


def _crashed(chunk: Chunk) -> results.Result:
    message = (
        f"The engine died {chunk.deaths + 1} times while running this request: among many, then among a few suspects,"
        " and finally alone."
    )
    return results.Result(
        chunk.id, chunk.batch_id, chunk.first_index, error_code="REQUEST_CRASHED_ENGINE", error_message=message
    )


def _suspect(db: peewee.PostgresqlDatabase, begun: Mapping[int, int], host: str, is_lost: bool) -> int:
    """Splits these chunks: each request that was begun and has no result becomes a chunk of its own.

    `begun`: how many were, by chunk, in the order in which they run. The chunks keep the others, or end.
    """
    params = {"ids": list(begun), "begun": list(begun.values()), "host": host, "is_lost": is_lost}
    waiting = f"""
        SELECT c.id, c.batch_id, c.priority, c.models, o.index, o.place, o.place <= g.begun AS is_begun
        FROM unnest(%(ids)s::bigint[], %(begun)s::integer[]) AS g (id, begun) JOIN chunks c USING (id)
        CROSS JOIN LATERAL {INDEXES}
        WHERE {NO_RESULT.format(batch="c.batch_id", index="o.index")}
    """
    made = db.execute_sql(
        f"""
        INSERT INTO chunks (batch_id, first_index, count, unfinished, priority, models, deaths, death_hosts, is_lost)
        SELECT batch_id, index, 1, 1, priority, models, 1, ARRAY[%(host)s], %(is_lost)s
        FROM ({waiting}) w WHERE is_begun ORDER BY id, place
        """,
        params,
    ).rowcount
    db.execute_sql(
        f"""
        WITH rest AS (
            SELECT id, array_agg(index ORDER BY place) AS indexes FROM ({waiting}) w WHERE NOT is_begun GROUP BY id
        ), kept AS (
            UPDATE chunks c SET indexes = rest.indexes, first_index = rest.indexes[1],
                   count = cardinality(rest.indexes), unfinished = cardinality(rest.indexes),
                   estimated_tokens = c.estimated_tokens * cardinality(rest.indexes) / c.count
            FROM rest WHERE c.id = rest.id
        ), ended AS MATERIALIZED (
            SELECT id, batch_id, models, charged FROM chunks
            WHERE id = ANY(%(ids)s) AND id NOT IN (SELECT id FROM rest)
        ), charged AS (
            INSERT INTO queue_changes (pool_id, batch_id, tenant, in_flight)
            SELECT q.pool_id, q.batch_id, q.tenant, -sum(e.charged)
            FROM ended e JOIN queue q ON {ENTRY.format(chunk="e")} GROUP BY q.batch_id
        )
        UPDATE chunks SET state = 'done', unfinished = 0, worker_id = NULL, incarnation = NULL, lease_until = NULL,
               charged = 0, begun = NULL
        WHERE id IN (SELECT id FROM ended)
        """,
        params,
    )
    return int(made)
