"""The pulse: watches whether the engine moves, and has an idle one prove it with a request of one token."""

import asyncio
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import psutil

from service import logs
from service.clock import Clock
from service.db.heartbeats import Phase
from service.worker.life import Life
from service.worker.progress import LATE_S, ProgressLease

LOOK_INTERVAL_S = 0.5
# An engine that was idle for this long is asked for a token.
CANARY_INTERVAL_S = 5.0

log = logs.get("pulse")


@dataclass
class Pulse:
    """Turns the phase to `stalled` when the progress lease is lost, and back to `ready` when the engine moves again.

    Runs in the main loop, apart from the engine's: that one may be blocked with it. `steps` and `in_engine` are read
    from there; `prove` runs a harmless request through the engine.
    """

    life: Life
    clock: Clock
    steps: Callable[[], int]
    in_engine: Callable[[], int]
    prove: Callable[[], "asyncio.Future[None]"]
    _canary: "asyncio.Future[None] | None" = None
    _idle_since_s: float = 0.0
    _lease: ProgressLease = field(init=False)

    def __post_init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """What was before does not count: loading has steps of its own."""
        now_s = self.clock.monotonic()
        self._lease = ProgressLease(now_s, moved_s=now_s, steps=self.steps())
        self._idle_since_s = now_s

    def phase(self) -> Phase:
        """What to say in the heartbeat: `stalled` also while the main loop is blocked, which cannot say so itself.

        For the heart's thread. Nothing is entered: it is over when the loop goes on.
        """
        is_blocked = self.clock.monotonic() - self._lease.looked_s > LATE_S
        return Phase.STALLED if is_blocked and self.life.phase is Phase.READY else self.life.phase

    async def follow(self) -> None:
        """Looks for ever."""
        while True:
            await asyncio.sleep(LOOK_INTERVAL_S)
            self.look()

    def look(self) -> None:
        """Looks once."""
        now_s = self.clock.monotonic()
        if self._canary is not None and self._canary.done():
            if not self._canary.cancelled() and (error := self._canary.exception()) is not None:
                log.warning("canary_failed", cause=repr(error))
            self._canary = None
        is_busy = self.in_engine() > 0 or self._canary is not None
        if is_busy:
            self._idle_since_s = now_s
        elif now_s - self._idle_since_s >= CANARY_INTERVAL_S and self.life.phase is Phase.READY:
            self._canary = self.prove()
        moves = self._lease.look(now_s, self.steps(), is_busy, processor_time_s)
        if not moves and self.life.phase is Phase.READY:
            log.error("engine_stalled", silent_s=round(now_s - self._lease.moved_s, 1), in_engine=self.in_engine())
            self.life.enter(Phase.STALLED)
        elif moves and self.life.phase is Phase.STALLED:
            log.info("engine_moves_again")
            self.life.enter(Phase.READY)


def processor_time_s() -> float | None:
    """What our children have used, the engine's processes among them; None when one of them is stopped."""
    total_s = 0.0
    for process in _children():
        try:
            if process.status() in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP):
                return None
            times: Any = process.cpu_times()
        except psutil.Error:
            continue
        total_s += times.user + times.system
    return total_s


def _children() -> list[psutil.Process]:
    return psutil.Process(os.getpid()).children(recursive=True)
