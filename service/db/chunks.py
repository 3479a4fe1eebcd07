"""Chunks: leased to a worker, renewed while it works on them, released when it is gone."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from uuid import UUID

import peewee

from service import failpoints

# The entry `q` of the queue that a chunk belongs to.
ENTRY = "coalesce(q.of_batch, q.batch_id) = {chunk}.batch_id AND q.models = {chunk}.models"
# That entry `q` has a chunk which waits. Read by the head of the index `chunks_pending`, however many there are: from
# an EXISTS, Postgres may make a hash of all chunks that wait, and with equalities it may take another index.
HAS_PENDING = """
(SELECT c.id FROM chunks c
 WHERE (c.batch_id, c.models) >= (coalesce(q.of_batch, q.batch_id), q.models) AND c.state = 'pending'
   AND (c.batch_id, c.models) <= (coalesce(q.of_batch, q.batch_id), q.models) AND c.deaths = 0
 ORDER BY c.batch_id, c.models, c.id LIMIT 1) IS NOT NULL
"""
# The requests of the chunk `c`, in the order in which they run.
INDEXES = """
unnest(coalesce(c.indexes, ARRAY(SELECT generate_series(c.first_index, c.first_index + c.count - 1))))
WITH ORDINALITY AS o (index, place)
"""
# That the request {index} of the batch {batch} has no result. Looked up for each request: Postgres believes that a
# batch which is newer than its statistics has next to no rows, and may join by comparing all requests with all results.
# It makes no join of subqueries with OFFSET or LIMIT.
NO_RESULT = "(SELECT r.index FROM results r WHERE r.batch_id = {batch} AND r.index = {index} LIMIT 1) IS NULL"
# Of requests `q`.
IS_UNANSWERED = NO_RESULT.format(batch="q.batch_id", index="q.index")
# One by one, for the same reason.
UNANSWERED = f"""
SELECT o.index, q.custom_id, q.url, q.body
FROM chunks c CROSS JOIN LATERAL {INDEXES}
CROSS JOIN LATERAL (
    SELECT custom_id, url, body FROM requests q WHERE q.batch_id = c.batch_id AND q.index = o.index OFFSET 0) q
WHERE c.id = %(chunk)s
  AND {NO_RESULT.format(batch="c.batch_id", index="o.index")}
ORDER BY o.place
"""


def host_of(worker_id: str) -> str:
    """The host of a worker."""
    return worker_id.rpartition(":")[0] or worker_id


@dataclass(frozen=True)
class Holder:
    """One incarnation of a worker, which leases chunks for `lease_s` at a time."""

    worker_id: str
    incarnation: UUID
    lease_s: float

    @property
    def host(self) -> str:
        """The host of the worker."""
        return host_of(self.worker_id)


@dataclass(frozen=True)
class Chunk:
    """Requests of a batch that this worker holds: `count` of them, of which `first_index` is the first to run.

    `deaths` is usually 0. A suspect is a chunk of one request. With 1 death it was in an engine that died; with 2 it
    was also one of a few suspects in an engine that died, and now runs alone.
    """

    id: int
    batch_id: int
    first_index: int
    count: int
    deaths: int = 0
    # The trace that created its batch.
    traceparent: str | None = None


@dataclass(frozen=True)
class Request:
    """One request to run. `body` is the JSON text as the client sent it."""

    chunk_id: int
    batch_id: int
    index: int
    custom_id: str
    url: str
    body: str
    traceparent: str | None = None


def claim(db: peewee.PostgresqlDatabase, holder: Holder, models: Sequence[str], limit: int) -> list[Chunk]:
    """Leases up to `limit` pending chunks whose turn it is, of those whose models this worker serves.

    docs/queue.md has the order. The cost does not depend on the backlog: indexes hold tenants, their batches and
    pending chunks in this order. Claims of workers that serve the same models wait for one another: a claim is one
    call to a function in Postgres, and locks nothing while anybody has to answer.
    """
    failpoints.hit("claim.before_commit")
    rows = db.execute_sql(
        "SELECT (chunk).id, (chunk).batch_id, (chunk).first_index, (chunk).count, (chunk).deaths, traceparent"
        " FROM take_turns(%s::text[], %s, %s, %s::uuid, %s)",
        (list(models), limit, holder.worker_id, str(holder.incarnation), holder.lease_s),
    ).fetchall()
    failpoints.hit("claim.after_commit")
    return [Chunk(*row) for row in rows]


def lease(db: peewee.PostgresqlDatabase, holder: Holder, which: str, params: Mapping[str, object]) -> list[Chunk]:
    """Leases the suspects that the query `which` selects and locks; the first lease of a batch sets its start time."""
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
            -- Cancelling or ending a batch locks it before its chunks: waiting for it here could deadlock.
            UPDATE batches SET start_time = clock_timestamp()
            WHERE id IN (SELECT id FROM batches WHERE id IN (SELECT batch_id FROM taken) AND start_time IS NULL
                         FOR UPDATE SKIP LOCKED)
        )
        SELECT id, batch_id, first_index, count, deaths,
               (SELECT traceparent FROM batches WHERE batches.id = taken.batch_id)
        FROM taken ORDER BY priority DESC, id
        """,
        {
            **params,
            "worker_id": holder.worker_id,
            "incarnation": str(holder.incarnation),
            "lease_s": holder.lease_s,
        },
    ).fetchall()
    failpoints.hit("claim.after_commit")
    return [Chunk(*row) for row in rows]


def unanswered(db: peewee.PostgresqlDatabase, chunk: Chunk) -> list[Request]:
    """The requests of a chunk that have no result yet, in the order in which they run."""
    rows = db.execute_sql(UNANSWERED, {"chunk": chunk.id})
    return [
        Request(chunk.id, chunk.batch_id, index, custom_id, url, body, chunk.traceparent)
        for index, custom_id, url, body in rows.fetchall()
    ]


def begin(db: peewee.PostgresqlDatabase, holder: Holder, last: Mapping[int, int | None]) -> set[int]:
    """Notes which requests of these chunks may be in the engine from now on: those up to the index given, in the order
    in which they run; None: none yet. Those noted before stay noted.

    Leaves out chunks that are locked, because their results are being written: they are to be noted again. Returns the
    others.
    """
    rows = db.execute_sql(
        f"""
        WITH given AS (
            SELECT g.id, g.index FROM unnest(%(ids)s::bigint[], %(indexes)s::integer[]) AS g (id, index)
        ), mine AS MATERIALIZED (
            SELECT id FROM chunks
            WHERE id = ANY(%(ids)s) AND state = 'leased' AND incarnation = %(incarnation)s::uuid
            ORDER BY id FOR UPDATE SKIP LOCKED
        )
        UPDATE chunks c SET
            begun = greatest(c.begun, (SELECT o.place FROM {INDEXES} WHERE o.index = given.index), 0)
        FROM given JOIN mine USING (id) WHERE c.id = given.id
        RETURNING c.id
        """,
        {"ids": list(last), "indexes": list(last.values()), "incarnation": str(holder.incarnation)},
    )
    return {row[0] for row in rows.fetchall()}


def renew(db: peewee.PostgresqlDatabase, holder: Holder, ids: Sequence[int]) -> set[int]:
    """Renews the leases that are still held and returns their ids. The others are lost: stop working on them.

    An expired lease is held until it is released, so that work continues after an outage of Postgres. The leases of a
    cancelled batch are lost. A chunk that is locked counts as held: its results are being written, which may take
    minutes, and its lease does not run meanwhile.
    """
    rows = db.execute_sql(
        """
        WITH ours AS MATERIALIZED (
            SELECT c.id, b.state FROM chunks c LEFT JOIN batches b ON b.id = c.batch_id
            WHERE c.id = ANY(%(ids)s) AND c.state = 'leased' AND c.incarnation = %(incarnation)s::uuid
        ), free AS MATERIALIZED (
            SELECT id FROM chunks
            WHERE id = ANY(%(ids)s) AND state = 'leased' AND incarnation = %(incarnation)s::uuid
            ORDER BY id FOR UPDATE SKIP LOCKED
        ), renewed AS (
            UPDATE chunks c SET lease_until = clock_timestamp() + make_interval(secs => %(lease_s)s)
            FROM free JOIN ours USING (id) WHERE c.id = free.id AND ours.state = 'in_progress'
            RETURNING c.id
        )
        SELECT id FROM renewed UNION ALL SELECT id FROM ours WHERE id NOT IN (SELECT id FROM free)
        """,
        {"ids": list(ids), "incarnation": str(holder.incarnation), "lease_s": holder.lease_s},
    )
    return {row[0] for row in rows.fetchall()}


def release(db: peewee.PostgresqlDatabase, holder: Holder, ids: Sequence[int]) -> int:
    """Puts those of the chunks that are still held back into the queue. Returns how many."""
    failpoints.hit("release.before_commit")
    released = release_where(
        db,
        "id = ANY(%(ids)s) AND incarnation = %(incarnation)s::uuid",
        {"ids": list(ids), "incarnation": str(holder.incarnation)},
    )
    failpoints.hit("release.after_commit")
    return released


def release_life(db: peewee.PostgresqlDatabase, worker_id: str, life: UUID) -> int:
    """Puts all that an earlier life of a worker held back into the queue. Returns how many chunks."""
    mine = "worker_id = %(worker_id)s AND incarnation = %(life)s::uuid"
    return release_where(db, mine, {"worker_id": worker_id, "life": str(life)})


def release_others(db: peewee.PostgresqlDatabase, holder: Holder, ids: Sequence[int]) -> int:
    """Puts what is held but for these chunks back into the queue. Returns how many.

    For claims whose answer was lost: a Postgres that was frozen commits them when it resumes.
    """
    return release_where(
        db,
        "id <> ALL(%(ids)s) AND incarnation = %(incarnation)s::uuid"
        " AND EXISTS (SELECT FROM batches b WHERE b.id = batch_id AND b.state = 'in_progress')",
        {"ids": list(ids), "incarnation": str(holder.incarnation)},
        wait=False,
    )


def time_s(db: peewee.PostgresqlDatabase) -> float:
    """The database's time, by which leases expire, in seconds since 1970."""
    return float(db.execute_sql("SELECT extract(epoch FROM clock_timestamp())::float8").fetchone()[0])


def release_where(db: peewee.PostgresqlDatabase, which: str, params: Mapping[str, object], *, wait: bool = True) -> int:
    """Puts the leased chunks that match the condition `which` back into the queue. Returns how many.

    `wait` False: leaves out those that are locked.
    """
    # Locks in the order in which writing results does.
    row = db.execute_sql(
        f"""
        WITH held AS MATERIALIZED (
            SELECT id, batch_id, models, charged, deaths FROM chunks WHERE state = 'leased' AND {which}
            ORDER BY id FOR UPDATE {"" if wait else "SKIP LOCKED"}
        ), released AS (
            UPDATE chunks SET state = 'pending', worker_id = NULL, incarnation = NULL, lease_until = NULL, charged = 0,
                   begun = NULL
            FROM held WHERE chunks.id = held.id
        ), queued AS (
            INSERT INTO queue_changes (pool_id, batch_id, tenant, in_flight, has_pending)
            SELECT q.pool_id, q.batch_id, q.tenant, -sum(held.charged), bool_or(held.deaths = 0)
            FROM held JOIN queue q ON {ENTRY.format(chunk="held")} GROUP BY q.batch_id
        )
        SELECT count(*) FROM held
        """,
        params,
    ).fetchone()
    return int(row[0])


def drop_cancelled(db: peewee.PostgresqlDatabase, holder: Holder, ids: Collection[int]) -> set[int]:
    """Deletes those of the chunks that are held and whose batch was cancelled.

    Leaves out those that are locked, as `renew` does. Returns them: they are to be deleted later, or the batch would
    wait for their leases to run out.
    """
    rows = db.execute_sql(
        """
        WITH ours AS MATERIALIZED (
            SELECT c.id FROM chunks c JOIN batches b ON b.id = c.batch_id AND b.state = 'cancelling'
            WHERE c.id = ANY(%(ids)s) AND c.incarnation = %(incarnation)s::uuid
        ), free AS MATERIALIZED (
            SELECT id FROM chunks
            WHERE id IN (SELECT id FROM ours) AND incarnation = %(incarnation)s::uuid
            ORDER BY id FOR UPDATE SKIP LOCKED
        ), dropped AS (
            DELETE FROM chunks WHERE id IN (SELECT id FROM free)
        )
        SELECT id FROM ours WHERE id NOT IN (SELECT id FROM free)
        """,
        {"ids": list(ids), "incarnation": str(holder.incarnation)},
    )
    return {row[0] for row in rows.fetchall()}
