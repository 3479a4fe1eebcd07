"""What idle workers ask of others, and how a chunk is divided for them. Notices tell waiting workers at once.

Who holds a chunk divides it itself, after it has taken the requests out of what it runs: nobody else can know which it
has begun. What it gives is a pending chunk, which is claimed like any other.
"""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec
import peewee

from service import failpoints
from service.db.availability import DATABASE_ERRORS
from service.db.chunks import ENTRY, INDEXES, Holder, Request

CHANNEL = "vllm_batch"
# A notice has less than 8,000 bytes. Others are named when it is sent again.
NAMED_CHUNKS = 150


class Arrival(msgspec.Struct, frozen=True, tag="arrival"):
    """There is something to claim."""


class Unchecked(msgspec.Struct, frozen=True, tag="unchecked"):
    """There is a batch whose file is to be checked."""


class Wish(msgspec.Struct, frozen=True, tag="wish"):
    """A worker could run `room` requests more, of these chunks, which are of these batches, and found nothing to claim.

    No chunks: of all of the batches, as workers of before ask.
    """

    worker_id: str
    room: int
    batches: frozenset[int]
    chunks: frozenset[int] = frozenset()

    def covers(self, request: Request) -> bool:
        """True if it could run the request."""
        return request.batch_id in self.batches and (not self.chunks or request.chunk_id in self.chunks)


Notice = Arrival | Unchecked | Wish

_decode = msgspec.json.Decoder(Notice).decode


@dataclass(frozen=True)
class Part:
    """Requests of a held chunk, by index, that make a chunk of their own."""

    chunk_id: int
    indexes: Sequence[int]


def listen(db: peewee.PostgresqlDatabase) -> None:
    """Has this session receive notices. A session behind a pooler may not receive any: they only save time."""
    db.execute_sql(f"LISTEN {CHANNEL}")


def parse(payload: str) -> Notice | None:
    """What a notice says; None if it comes from a version that says something else."""
    try:
        said: Notice = _decode(payload)
    except msgspec.DecodeError:
        return None
    return said


def tell_arrival(db: peewee.PostgresqlDatabase) -> None:
    """Tells all workers that there is something to claim. Call it after the commit, outside a transaction.

    A commit with notices holds a lock that all others with notices need, in any database of the server, and holds it
    while it waits for a standby.
    """
    # What is claimed is stored: without the notice a worker finds it at its next look.
    with contextlib.suppress(*DATABASE_ERRORS):
        _tell(db, Arrival())


def tell_unchecked(db: peewee.PostgresqlDatabase) -> None:
    """Tells all workers that there is a batch whose file is to be checked. As `tell_arrival`."""
    with contextlib.suppress(*DATABASE_ERRORS):
        _tell(db, Unchecked())


def ask(db: peewee.PostgresqlDatabase, holder: Holder, models: Sequence[str], room: int) -> bool:
    """Asks the workers that hold something which this one could run for `room` requests. False: there are none."""
    rows = db.execute_sql(
        f"""
        SELECT batch_id, id FROM chunks
        WHERE state = 'leased' AND deaths = 0 AND worker_id <> %s AND models <@ %s::text[]
        ORDER BY priority DESC, random() LIMIT {NAMED_CHUNKS}
        """,
        (holder.worker_id, list(models)),
    ).fetchall()
    if not rows:
        return False
    batches, chunks = map(frozenset, zip(*rows, strict=True))
    _tell(db, Wish(holder.worker_id, room, batches, chunks))
    return True


def _tell(db: peewee.PostgresqlDatabase, notice: Notice) -> None:
    db.execute_sql("SELECT pg_notify(%s, %s)", (CHANNEL, msgspec.json.encode(notice).decode()))


# Tokens and charge are divided by numbers of requests; what is given counts as not begun. It always has a new id: a
# statement that comes late, as those that a frozen Postgres has received do, must not find the same requests in a later
# lease of the same chunk.
DIVIDE = f"""
WITH held AS MATERIALIZED (
    SELECT * FROM chunks
    WHERE id = %(chunk)s AND state = 'leased' AND deaths = 0 AND incarnation = %(incarnation)s::uuid FOR UPDATE
), divided AS MATERIALIZED (
    SELECT c.*, p.given, p.kept, p.kept_begun, cardinality(p.given) AS gives,
           c.charged * cardinality(p.given) / c.unfinished AS freed
    FROM held c CROSS JOIN LATERAL (
        SELECT array_agg(o.index ORDER BY o.place) FILTER (WHERE o.index = ANY (%(given)s)) AS given,
               array_agg(o.index ORDER BY o.place) FILTER (WHERE o.index <> ALL (%(given)s)) AS kept,
               count(*) FILTER (WHERE o.index <> ALL (%(given)s) AND o.place <= c.begun) AS kept_begun
        FROM {INDEXES}) p
    WHERE p.given IS NOT NULL
), made AS (
    INSERT INTO chunks (batch_id, first_index, count, unfinished, priority, models, indexes, prefix_group,
                        estimated_tokens)
    SELECT batch_id, given[1], gives, gives, priority, models, given, prefix_group, estimated_tokens * gives / count
    FROM divided
), rest AS (
    UPDATE chunks c SET
        first_index = coalesce(d.kept[1], c.first_index),
        count = coalesce(cardinality(d.kept), c.count),
        indexes = coalesce(d.kept, c.indexes),
        estimated_tokens = c.estimated_tokens - c.estimated_tokens * d.gives / c.count,
        unfinished = c.unfinished - d.gives,
        charged = c.charged - d.freed,
        begun = CASE WHEN c.begun IS NOT NULL AND c.unfinished > d.gives THEN d.kept_begun END,
        state = CASE WHEN c.unfinished = d.gives THEN 'done' ELSE c.state END,
        worker_id = CASE WHEN c.unfinished > d.gives THEN c.worker_id END,
        incarnation = CASE WHEN c.unfinished > d.gives THEN c.incarnation END,
        lease_until = CASE WHEN c.unfinished > d.gives THEN c.lease_until END
    FROM divided d WHERE c.id = d.id
), queued AS (
    INSERT INTO queue_changes (pool_id, batch_id, tenant, in_flight, has_pending)
    SELECT q.pool_id, q.batch_id, q.tenant, -d.freed, true FROM divided d JOIN queue q ON {ENTRY.format(chunk="d")}
)
SELECT gives FROM divided
"""


def give(db: peewee.PostgresqlDatabase, holder: Holder, parts: Sequence[Part]) -> int:
    """Puts these parts of held chunks into the queue, each as a chunk of its own. Returns the number of requests.

    Only for requests that the holder has not begun, and never will under this lease. What is not in the chunk any more
    is skipped, and so are chunks that are not held any more: giving again after a broken connection is safe.
    """
    given = 0
    with db.atomic():
        # Locks in the order in which writing results does.
        for part in sorted(parts, key=lambda part: part.chunk_id):
            names: Mapping[str, object] = {
                "chunk": part.chunk_id,
                "given": list(part.indexes),
                "incarnation": str(holder.incarnation),
            }
            row = db.execute_sql(DIVIDE, names).fetchone()
            given += row[0] if row else 0
        failpoints.hit("give.before_commit")
    failpoints.hit("give.after_commit")
    if given:
        tell_arrival(db)
    return given
