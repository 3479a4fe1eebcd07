"""Waits for changes of batches, with one query for all that this process's clients watch."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from service.db import batches
from service.db.batches import Batch
from service.db.connection import Database
from service.errors import ending
from vllm_batch.v1 import batch_service_pb2 as pb

# How often all watched batches are read.
POLL_INTERVAL_S = 0.5
# How often those that have not changed are described again.
DESCRIBE_INTERVAL_S = 2.0
# How often the words of a wait are sent again in which nothing but a number has changed.
REPEAT_S = 10.0
# An estimated end has moved noticeably when by more than this, and by this part of the time from begin to end.
MOVED_S = 5.0
MOVED = 0.05


@dataclass(frozen=True)
class _Waiter:
    """What a waiter has seen; without `sent` it waits for changes of the batch alone."""

    seen: Batch
    sent: pb.Batch | None
    since_s: float


@dataclass
class BatchWatch:
    """Reads all watched batches of this process in one query per interval; wakes the watchers of those that changed.

    `describe` makes the messages of batches.
    """

    database: Database
    describe: Callable[[Sequence[Batch]], Awaitable[Sequence[pb.Batch]]]
    interval_s: float = POLL_INTERVAL_S
    is_ended: bool = False
    _waiting: dict[asyncio.Future[Batch | None], _Waiter] = field(default_factory=dict)
    _task: asyncio.Task[None] | None = None

    async def next(self, seen: Batch, sent: pb.Batch | None = None) -> Batch | None:
        """Waits until the batch differs from `seen`, or its description noticeably from `sent`; None once it is gone.

        Raises DatabaseAwayError, or UNAVAILABLE when the server ends.
        """
        if self.is_ended:
            raise ending()
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Batch | None] = loop.create_future()
        self._waiting[future] = _Waiter(seen, sent, loop.time())
        if self._task is None:
            self._task = asyncio.create_task(self._look())
        try:
            return await future
        finally:
            del self._waiting[future]

    def end(self) -> None:
        """Ends all waits with UNAVAILABLE."""
        self.is_ended = True
        for future in self._waiting:
            if not future.done():
                future.set_exception(ending())

    async def _look(self) -> None:
        """Polls as long as somebody waits."""
        loop = asyncio.get_running_loop()
        described_s = loop.time()
        try:
            while self._waiting:
                await asyncio.sleep(self.interval_s)
                # The answer does not cover waiters that come during the query.
                due = dict(self._waiting)
                try:
                    found = await self.database.read(batches.get_many, list({each.seen.id for each in due.values()}))
                    if loop.time() - described_s >= DESCRIBE_INTERVAL_S:
                        described_s = loop.time()
                        _wake(due, await self._news(due, found))
                except Exception as error:  # noqa: BLE001 - raised in the waiters
                    for future in due:
                        if not future.done():
                            future.set_exception(error)
                    continue
                _wake(due, {future: found.get(each.seen.id) for future, each in due.items()}, is_changed=True)
        finally:
            self._task = None

    async def _news(
        self, due: dict[asyncio.Future[Batch | None], _Waiter], found: dict[int, Batch]
    ) -> dict[asyncio.Future[Batch | None], Batch | None]:
        """The waiters whose batch has not changed, but its description."""
        described = {each.seen.id for each in due.values() if each.sent is not None} & found.keys()
        messages = dict(zip(described, await self.describe([found[id_] for id_ in described]), strict=True))
        now_s = asyncio.get_running_loop().time()
        return {
            future: found[each.seen.id]
            for future, each in due.items()
            if each.sent is not None
            and each.seen.id in messages
            and is_news(each.sent, messages[each.seen.id], now_s - each.since_s)
        }


def _wake(
    due: dict[asyncio.Future[Batch | None], _Waiter],
    found: dict[asyncio.Future[Batch | None], Batch | None],
    is_changed: bool = False,
) -> None:
    """Wakes waiters with their batches; with `is_changed`, those alone whose batch differs from what they have seen."""
    for future, batch in found.items():
        if not future.done() and not (is_changed and batch == due[future].seen):
            future.set_result(batch)


def is_news(sent: pb.Batch, now: pb.Batch, age_s: float) -> bool:
    """True if who was sent `sent` so long ago wants to know of `now`, of the same batch with the same counts."""
    if sent.wait.reason != now.wait.reason or (sent.counts.running > 0) != (now.counts.running > 0):
        return True
    if age_s >= REPEAT_S and sent.wait != now.wait:
        return True
    if sent.HasField("estimated_end_time") != now.HasField("estimated_end_time"):
        return True
    end_s = now.estimated_end_time.seconds
    noticeable_s = max(MOVED_S, MOVED * (end_s - now.start_time.seconds))
    return now.HasField("estimated_end_time") and abs(end_s - sent.estimated_end_time.seconds) > noticeable_s
