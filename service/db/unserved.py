"""Batches that wait for models which no worker serves any more."""

from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass

import peewee

from service.db.chunks import ENTRY, HAS_PENDING


@dataclass(frozen=True)
class Unserved:
    """The batches in progress, by id, that have requests for `models`, all of which no single worker serves.

    `age_s`: how long ago a worker is last known to have served them, or the first of the batches was created.
    """

    models: tuple[str, ...]
    batches: tuple[int, ...]
    age_s: float


# Of a batch that names several models, those for which it still has chunks.
WANTED = f"""
SELECT models, array_agg(id ORDER BY id) AS ids FROM (
    SELECT id, models FROM batches WHERE state = 'in_progress' AND cardinality(models) < 2
    UNION ALL
    SELECT b.id, q.models FROM batches b JOIN queue q ON coalesce(q.of_batch, q.batch_id) = b.id
    WHERE b.state = 'in_progress' AND cardinality(b.models) > 1 AND (
        {HAS_PENDING}
        OR EXISTS (SELECT FROM chunks c WHERE {ENTRY.format(chunk="c")} AND c.state = 'leased')
        OR EXISTS (SELECT FROM chunks c WHERE {ENTRY.format(chunk="c")} AND c.state <> 'done' AND c.deaths > 0))
) wanted GROUP BY models ORDER BY min(id)
"""
# A heartbeat keeps the models of a worker that is gone. Once that loads again, or is back with others, it is no sign of
# them any more: then the last result tells.
AGE = """
SELECT extract(epoch FROM clock_timestamp() - greatest(
    (SELECT min(create_time) FROM batches WHERE id = ANY (%(ids)s)),
    (SELECT max(last_seen) FROM heartbeats h
     WHERE %(models)s::text[] <@ h.models AND h.phase NOT IN ('starting', 'loading')),
    (SELECT max(last.finish_time) FROM unnest(%(ids)s) id
     CROSS JOIN LATERAL (SELECT finish_time FROM results r WHERE r.batch_id = id ORDER BY sequence DESC LIMIT 1) last)
))::float8
"""


def find(db: peewee.PostgresqlDatabase, is_unserved: Callable[[Set[str]], bool]) -> Sequence[Unserved]:
    """Which batches in progress name models for which `is_unserved` holds. Reads the batches in progress."""
    found = []
    for models, ids in db.execute_sql(WANTED).fetchall():
        if is_unserved(frozenset(models)):
            [age_s] = db.execute_sql(AGE, {"models": models, "ids": ids}).fetchone()
            found.append(Unserved(tuple(models), tuple(ids), age_s))
    return found


def awaited(db: peewee.PostgresqlDatabase) -> frozenset[str]:
    """The models of the pools in which batches wait. Reads the pools, and the head of each."""
    rows = db.execute_sql(
        """
        SELECT DISTINCT model FROM pools p CROSS JOIN LATERAL unnest(p.models) AS model
        WHERE EXISTS (SELECT FROM queue q WHERE q.pool_id = p.id AND q.waits)
           OR EXISTS (SELECT FROM queue_changes c WHERE c.pool_id = p.id AND c.has_pending)
        """
    ).fetchall()
    return frozenset(model for (model,) in rows)
