"""Says of batches when they will end, or why they do not move. Reads for all who ask at once, once a second at most."""

import asyncio
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass, field, replace

from google.protobuf.timestamp_pb2 import Timestamp

from service.clock import Clock
from service.db import standings
from service.db.availability import DATABASE_ERRORS, first_line
from service.db.batches import Batch
from service.db.connection import Database
from service.db.standings import Queue, Standing, Work
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
    # Why it could not be read; "" if it could.
    _failure: str = ""

    async def explain(self, batches: Sequence[Batch], messages: Sequence[pb.Batch]) -> None:
        """Adds to the message of each batch that has not ended its running requests, its end or its wait."""
        open_ = [(batch, message) for batch, message in zip(batches, messages, strict=True) if not batch.is_terminal]
        if not open_:
            # Nothing is read then, so nothing shows that it can be.
            return
        try:
            await self._read_all([batch for batch, _ in open_])
        except DATABASE_ERRORS as error:
            if (cause := first_line(error)) != self._failure:
                self._failure = cause
                log.warning("not_explained", batches=len(open_), cause=cause)
            if (wait := waiting.of_all(self.presence.workers())) is not None:
                for _, message in open_:
                    message.wait.CopyFrom(wait)
            return
        self._failure = ""
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
        queue, found = await self.database.read(standings.read, models, pools)
        kept = {each: read for each, read in self._read.items() if began_s - read[0] < FRESH_S}
        self._read = kept | {batch_id: (began_s, queue, standing) for batch_id, standing in found.items()}


def _add(message: pb.Batch, batch: Batch, queue: Queue, standing: Standing, workers: Sequence[Worker]) -> None:
    busy = [
        replace(worker, is_alone=worker.worker_id in queue.alone, held=_held(queue, worker.worker_id))
        for worker in workers
    ]
    higher = _higher(batch, queue, standing, busy)
    facts = _facts(batch, queue, standing, higher)
    message.counts.running = sum(facts.held.values())
    wait = waiting.decide(facts, busy)
    if wait is not None:
        message.wait.CopyFrom(wait)
    left_s = _left_s(wait, batch, higher, queue, standing)
    if left_s is not None:
        end = Timestamp()
        end.FromMilliseconds(round((queue.read_time.timestamp() + left_s) * 1000))
        message.estimated_end_time.CopyFrom(end)


def _facts(batch: Batch, queue: Queue, standing: Standing, higher: Work) -> Facts:
    return Facts(
        batch_id=batch.id,
        state=batch.state,
        unfinished=batch.total - batch.completed - batch.failed,
        models=_models(batch, standing),
        held=standing.held,
        suspects=standing.suspects,
        must_run_alone=standing.must_run_alone,
        runs_alone=standing.runs_alone,
        quiet_s=standing.marks[0].age_s if standing.marks else float("inf"),
        age_s=(queue.read_time - batch.create_time).total_seconds(),
        higher=round(higher.requests),
        is_mixed=len(batch.models) > 1,
    )


def _models(batch: Batch, standing: Standing) -> Set[frozenset[str]]:
    return standing.waiting_models or {frozenset(batch.models)}


def _held(queue: Queue, worker_id: str) -> int:
    return round(queue.held.get(worker_id, Work()).requests)


def _higher(batch: Batch, queue: Queue, standing: Standing, workers: Sequence[Worker]) -> Work:
    """What is of a higher priority, for that of the workers that may run the batch which has the most of it."""
    models = _models(batch, standing)
    found = [
        _sum(
            work
            for priority, work in queue.unfinished.get(frozenset(worker.models), {}).items()
            if priority > batch.priority
        )
        for worker in workers
        if worker.condition is Condition.READY and any(each <= worker.models for each in models)
    ]
    return max(found, key=lambda work: work.requests, default=Work())


def _sum(works: Iterable[Work]) -> Work:
    return sum(works, Work())


def _left_s(wait: pb.Wait | None, batch: Batch, higher: Work, queue: Queue, standing: Standing) -> float | None:
    """Seconds until the end of a batch that moves, or waits for its turn; None if they are not known."""
    started_s = (queue.read_time - batch.start_time).total_seconds() if batch.start_time else 0.0
    # As of the marks: the batch may have been read later.
    course = estimate.course(standing.marks, standing.done, started_s)
    left = estimate.left(course, batch.total, standing.cost)
    if wait is None:
        return estimate.left_s(course, left, sum(standing.held.values()))
    if wait.reason != pb.WAIT_REASON_TURN:
        return None
    # Batches that run now: when they began is not read, but their marks say how fast they go.
    speed = _sum(estimate.per_s(marks) for marks in queue.running)
    return estimate.left_after_s(course, left, higher + _sum(queue.held.values()), speed)
