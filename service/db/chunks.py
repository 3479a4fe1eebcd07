"""Chunks: claimed under a lease, renewed while worked on, given back when the worker is gone."""

from collections.abc import Sequence
from dataclasses import dataclass
from uuid import UUID

import peewee


@dataclass(frozen=True)
class Chunk:
    """A run of consecutive requests that this worker holds."""

    id: int
    batch_id: int
    first_index: int
    count: int


@dataclass(frozen=True)
class Request:
    """One request to run. `body` is the JSON text as the client gave it."""

    chunk_id: int
    batch_id: int
    index: int
    custom_id: str
    url: str
    body: str


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
    rows = db.execute_sql(
        """
        WITH next AS (
            SELECT id FROM chunks
            WHERE state = 'pending' AND models <@ %(models)s::text[]
            ORDER BY priority DESC, id LIMIT %(limit)s
            FOR UPDATE SKIP LOCKED
        ), taken AS (
            UPDATE chunks SET state = 'leased', worker_id = %(worker_id)s, incarnation = %(incarnation)s::uuid,
                   lease_until = clock_timestamp() + make_interval(secs => %(lease_s)s)
            FROM next WHERE chunks.id = next.id
            RETURNING chunks.id, chunks.batch_id, chunks.first_index, chunks.count, chunks.priority
        ), started AS (
            UPDATE batches SET start_time = clock_timestamp()
            WHERE id IN (SELECT batch_id FROM taken) AND start_time IS NULL
        )
        SELECT id, batch_id, first_index, count FROM taken ORDER BY priority DESC, id
        """,
        {
            "models": list(models),
            "limit": limit,
            "worker_id": worker_id,
            "incarnation": str(incarnation),
            "lease_s": lease_s,
        },
    )
    return [Chunk(*row) for row in rows.fetchall()]


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
    return [Request(chunk.id, chunk.batch_id, *row) for row in rows.fetchall()]


def renew(db: peewee.PostgresqlDatabase, ids: Sequence[int], incarnation: UUID, lease_s: float) -> set[int]:
    """Lengthens the leases that are still held; returns their ids. What is missing is lost: stop working on it.

    A lease that ran out and that nobody has released is still held: after an outage of Postgres work goes on.
    """
    rows = db.execute_sql(
        """
        UPDATE chunks SET lease_until = clock_timestamp() + make_interval(secs => %(lease_s)s)
        WHERE id = ANY(%(ids)s) AND state = 'leased' AND incarnation = %(incarnation)s::uuid
        RETURNING id
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


def release_worker(db: peewee.PostgresqlDatabase, worker_id: str) -> int:
    """Puts all chunks of a worker back: only for the process that holds the worker's lock, before it claims any."""
    return _release(db, "worker_id = %(worker_id)s", {"worker_id": worker_id})


def release(db: peewee.PostgresqlDatabase, ids: Sequence[int], incarnation: UUID) -> int:
    """Puts these chunks of an incarnation back. Returns how many were still held."""
    return _release(
        db,
        "id = ANY(%(ids)s) AND incarnation = %(incarnation)s::uuid",
        {"ids": list(ids), "incarnation": str(incarnation)},
    )


def _release(db: peewee.PostgresqlDatabase, which: str, params: dict[str, object]) -> int:
    cursor = db.execute_sql(
        "UPDATE chunks SET state = 'pending', worker_id = NULL, incarnation = NULL, lease_until = NULL"
        f" WHERE state = 'leased' AND {which}",
        params or None,
    )
    return int(cursor.rowcount)
