"""Says of batches when they will end, or why they do not move. Reads for all who ask at once, once a second at most."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from google.protobuf.timestamp_pb2 import Timestamp

from service.clock import Clock
from service.db import standings
from service.db.availability import DATABASE_ERRORS, first_line
from service.db.batches import Batch
from service.db.connection import Database
from service.db.standings import Queue, Standing
from service.insight import estimate, waiting
from service.insight.presence import Presence
from service.insight.waiting import Condition, Facts, Worker
from service.telemetry import logs
from vllm_batch.v1 import batch_service_pb2 as pb

# What was read serves everybody for so long.
FRESH_S = 1.0

log = logs.get("explainer")


@dataclass
class Explainer:
    """Adds to batches what is not stored with them. What cannot be read is left out: a batch is shown without it."""

    database: Database
    presence: Presence
    clock: Clock
    _read: dict[int, tuple[float, Queue, Standing]] = field(default_factory=dict)
    _asked: dict[int, Batch] = field(default_factory=dict)
    _reading: "asyncio.Task[None] | None" = None

    async def explain(self, batches: Sequence[Batch], messages: Sequence[pb.Batch]) -> None:
        """Adds to the message of each batch that has not ended its running requests, its end or its wait."""
        open_ = [(batch, message) for batch, message in zip(batches, messages, strict=True) if not batch.is_terminal]
        try:
            await self._read_all([batch for batch, _ in open_])
        except DATABASE_ERRORS as error:
            log.warning("not_explained", batches=len(open_), cause=first_line(error))
            return
        workers = self.presence.workers()
        for batch, message in open_:
            _, queue, standing = self._read[batch.id]
            _add(message, batch, queue, standing, workers)

    async def _read_all(self, batches: Sequence[Batch]) -> None:
        """Returns once the standing of each was read within FRESH_S, or since the call began."""
        oldest_s = self.clock.monotonic() - FRESH_S

        def missing() -> dict[int, Batch]:
            return {each.id: each for each in batches if self._read.get(each.id, (0.0,))[0] < oldest_s}

        while due := missing():
            self._asked |= due
            if self._reading is None or self._reading.done():
                self._reading = asyncio.create_task(self._read_asked())
            # Others wait for it too.
            await asyncio.shield(self._reading)

    async def _read_asked(self) -> None:
        asked, self._asked = self._asked, {}
        began_s = self.clock.monotonic()
        pools = [frozenset(worker.models) for worker in self.presence.workers() if worker.condition is Condition.READY]
        models = {batch.id: frozenset(batch.models) for batch in asked.values()}
        queue, found = await self.database.run(standings.read, models, pools)
        kept = {each: read for each, read in self._read.items() if began_s - read[0] < FRESH_S}
        self._read = kept | {batch_id: (began_s, queue, standing) for batch_id, standing in found.items()}


def _add(message: pb.Batch, batch: Batch, queue: Queue, standing: Standing, workers: Sequence[Worker]) -> None:
    busy = [
        replace(worker, is_alone=worker.worker_id in queue.alone, held=queue.held.get(worker.worker_id, 0))
        for worker in workers
    ]
    facts = _facts(batch, queue, standing, busy)
    message.counts.running = sum(facts.held.values())
    wait = waiting.decide(facts, busy)
    if wait is not None:
        message.wait.CopyFrom(wait)
    left_s = _left_s(wait, batch, facts, queue, standing)
    if left_s is not None:
        end = Timestamp()
        end.FromMilliseconds(round((queue.read_time.timestamp() + left_s) * 1000))
        message.estimated_end_time.CopyFrom(end)


def _facts(batch: Batch, queue: Queue, standing: Standing, workers: Sequence[Worker]) -> Facts:
    models = standing.waiting_models or {frozenset(batch.models)}
    pools = [
        frozenset(worker.models)
        for worker in workers
        if worker.condition is Condition.READY and any(each <= worker.models for each in models)
    ]
    return Facts(
        state=batch.state,
        unfinished=batch.total - batch.completed - batch.failed,
        models=models,
        held=standing.held,
        suspects=standing.suspects,
        must_run_alone=standing.must_run_alone,
        runs_alone=standing.runs_alone,
        quiet_s=standing.marks[0].age_s if standing.marks else float("inf"),
        age_s=(queue.read_time - batch.create_time).total_seconds(),
        # Of the workers that may run it, the one with the most before it.
        higher=max((_higher(queue.unfinished.get(pool, {}), batch.priority) for pool in pools), default=0),
        is_mixed=len(batch.models) > 1,
    )


def _higher(unfinished: Mapping[int, int], priority: int) -> int:
    """Requests of a higher priority than this."""
    return sum(count for each, count in unfinished.items() if each > priority)


def _left_s(wait: pb.Wait | None, batch: Batch, facts: Facts, queue: Queue, standing: Standing) -> float | None:
    """Seconds until the end of a batch that moves, or waits for its turn; None if they are not known."""
    # As of the marks: the batch may have been read later.
    done = standing.done
    started_s = (queue.read_time - batch.start_time).total_seconds() if batch.start_time else 0.0
    if wait is None:
        return estimate.left_s(standing.marks, batch.total, done, started_s, sum(facts.held.values()))
    if wait.reason != pb.WAIT_REASON_TURN:
        return None
    before = facts.higher + sum(queue.held.values())
    # Batches that run now: when they began is not read, but their marks say how fast they go.
    speed = sum(estimate.per_s(marks, marks[-1].count, marks[-1].age_s, 0) for marks in queue.running)
    return estimate.left_after_s(standing.marks, batch.total, done, started_s, before, speed)
