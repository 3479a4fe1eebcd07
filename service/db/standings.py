"""Where batches stand: what workers hold of them, how fast they went, and what is before them.

Bounded: reads the chunks that are leased or suspect (by their partial indexes, no more than workers have in hand), and
per batch some twenty of its results (by their numbers); the open batches only while one of those asked for waits.
"""

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from datetime import datetime

import peewee

from service.db.chunks import HAS_PENDING

# The youngest mark but the last result itself; each further one is twice as far back.
NEAREST_MARK = 16
# Batches that are running beside those asked for, whose speed is that of the workers.
MAX_OTHERS = 20

HELD = """
SELECT batch_id, worker_id, sum(unfinished)::bigint, sum(charged)::bigint, bool_or(deaths > 1)
FROM chunks WHERE state = 'leased' GROUP BY batch_id, worker_id
"""
SUSPECTS = """
SELECT batch_id, count(*), count(*) FILTER (WHERE deaths > 1)
FROM chunks WHERE state <> 'done' AND deaths > 0 GROUP BY batch_id
"""
# Each by the index of numbers, also of a batch that is newer than the statistics.
MARKS = f"""
SELECT b.id, back.count, b.completed + b.failed, extract(epoch FROM clock_timestamp() - r.finish_time)::float8,
       r.batch_tokens
FROM batches b
CROSS JOIN LATERAL (
    SELECT count, b.completed + b.failed - count AS number FROM (
        SELECT 0::bigint AS count UNION ALL SELECT {NEAREST_MARK} * (1::bigint << n) FROM generate_series(0, 32) n) c
    WHERE count < b.completed + b.failed) back
CROSS JOIN LATERAL (
    SELECT finish_time, batch_tokens FROM results r
    WHERE r.batch_id = b.id AND r.sequence BETWEEN back.number AND back.number ORDER BY r.sequence LIMIT 1) r
WHERE b.id = ANY(%s) AND b.state = 'in_progress' AND b.completed + b.failed > 0
ORDER BY b.id, back.count
"""
# What the queue has taken over, and what it has not yet, of all entries of a batch.
COSTS = """
SELECT coalesce(q.of_batch, q.batch_id), sum(q.expected + coalesce(c.expected, 0)), sum(q.total * q.estimate)
FROM queue q LEFT JOIN (
    SELECT batch_id, sum(expected) AS expected FROM queue_changes
    WHERE pool_id IN (SELECT pool_id FROM queue WHERE coalesce(of_batch, batch_id) = ANY(%(ids)s)) GROUP BY batch_id
    ) c USING (batch_id)
WHERE coalesce(q.of_batch, q.batch_id) = ANY(%(ids)s) GROUP BY 1
"""
# Only for batches that name several models: otherwise those of the batch.
PENDING = f"""
SELECT coalesce(q.of_batch, q.batch_id), q.models FROM queue q
WHERE coalesce(q.of_batch, q.batch_id) = ANY(%(ids)s) AND {HAS_PENDING}
UNION
SELECT batch_id, models FROM chunks
WHERE batch_id = ANY(%(ids)s) AND state = 'pending' AND state <> 'done' AND deaths > 0
"""
# The requests that are left of a batch count as much as the others did, or else as estimated.
UNFINISHED = """
SELECT priority, sum(total - completed - failed)::bigint,
       sum((total - completed - failed) * CASE WHEN completed + failed > 0
           THEN (prompt_tokens + completion_tokens)::float8 / (completed + failed)
           ELSE estimated_tokens::float8 / total END)
FROM batches
WHERE state = 'in_progress' AND (models = '{}' OR models && %s::text[]) GROUP BY priority
"""


@dataclass(frozen=True)
class Mark:
    """The result that was stored `count` results before the last one, `age_s` ago.

    `tokens` are those of the batch up to it; None: a worker of an earlier version stored it.
    """

    count: int
    age_s: float
    tokens: int | None


@dataclass(frozen=True)
class Cost:
    """Tokens of a batch as estimated at its creation: of the requests that have a result, and of all."""

    done: float = 0.0
    total: float = 0.0


@dataclass(frozen=True)
class Work:
    """Requests, and the tokens that they will use or used; 0: not known."""

    requests: float = 0.0
    tokens: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        """Both together."""
        return Work(self.requests + other.requests, self.tokens + other.tokens)


@dataclass(frozen=True)
class Standing:
    """Where one batch stands."""

    # Requests without a result in chunks that workers hold, by worker.
    held: Mapping[str, int] = field(default_factory=dict)
    # Requests, each a chunk of its own, that were in an engine when it died; of those, how many must run alone.
    suspects: int = 0
    must_run_alone: int = 0
    # One of those runs.
    runs_alone: bool = False
    # Results stored, and from the last one back. Empty: none is stored.
    done: int = 0
    marks: Sequence[Mark] = ()
    cost: Cost = Cost()
    # The models of the chunks that wait. Empty: as of the batch.
    waiting_models: Set[frozenset[str]] = frozenset()


@dataclass(frozen=True)
class Queue:
    """What is common to all batches, as of `read_time` by the database's clock."""

    read_time: datetime
    # What each worker holds.
    held: Mapping[str, Work]
    # Workers that run suspects alone, and nothing else.
    alone: Set[str]
    # What is left by priority, of the batches that workers with these models may run.
    unfinished: Mapping[frozenset[str], Mapping[int, Work]]
    # Marks of batches that are running.
    running: Sequence[Sequence[Mark]]


def read(
    db: peewee.PostgresqlDatabase, models: Mapping[int, Set[str]], pools: Iterable[frozenset[str]]
) -> tuple[Queue, dict[int, Standing]]:
    """The standing of batches, given with their models. `pools` are the models that workers serve now, by worker."""
    [now] = db.execute_sql("SELECT clock_timestamp()").fetchone()
    held: dict[int, dict[str, int]] = {}
    by_worker: dict[str, Work] = {}
    alone: dict[int, set[str]] = {}
    for batch_id, worker_id, requests, tokens, is_alone in db.execute_sql(HELD).fetchall():
        held.setdefault(batch_id, {})[worker_id] = requests
        by_worker[worker_id] = by_worker.get(worker_id, Work()) + Work(requests, tokens)
        if is_alone:
            alone.setdefault(batch_id, set()).add(worker_id)
    suspects = {row[0]: (row[1], row[2]) for row in db.execute_sql(SUSPECTS).fetchall()}
    waiting = [batch_id for batch_id in models if batch_id not in held]
    others = [batch_id for batch_id in held if batch_id not in models][:MAX_OTHERS] if waiting else []
    marks: dict[int, list[Mark]] = {}
    done: dict[int, int] = {}
    for batch_id, count, done[batch_id], age_s, used in db.execute_sql(MARKS, ([*models, *others],)).fetchall():
        marks.setdefault(batch_id, []).append(Mark(count, age_s, used))
    costs = {row[0]: Cost(*row[1:]) for row in db.execute_sql(COSTS, {"ids": list(models)}).fetchall()}
    pending: dict[int, set[frozenset[str]]] = {}
    if several := [batch_id for batch_id in waiting if len(models[batch_id]) > 1]:
        for batch_id, names in db.execute_sql(PENDING, {"ids": several}).fetchall():
            pending.setdefault(batch_id, set()).add(frozenset(names))
    unfinished = {}
    if waiting:
        for pool in set(pools):
            rows = db.execute_sql(UNFINISHED, (sorted(pool),)).fetchall()
            unfinished[pool] = {priority: Work(requests, tokens) for priority, requests, tokens in rows}
    standings = {
        batch_id: Standing(
            held=held.get(batch_id, {}),
            suspects=suspects.get(batch_id, (0, 0))[0],
            must_run_alone=suspects.get(batch_id, (0, 0))[1],
            runs_alone=batch_id in alone,
            done=done.get(batch_id, 0),
            marks=marks.get(batch_id, ()),
            cost=costs.get(batch_id, Cost()),
            waiting_models=pending.get(batch_id, frozenset()),
        )
        for batch_id in models
    }
    workers_alone = frozenset().union(*alone.values())
    running = [marks[batch_id] for batch_id in held if batch_id in marks]
    return Queue(now, by_worker, workers_alone, unfinished, running), standings
