"""The pulse: watches the engine's progress, and tests an idle engine with a one-token request (the canary)."""

import asyncio
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import psutil

from service.clock import Clock
from service.db.heartbeats import Phase
from service.telemetry import logs
from service.worker.progress import LATE_S, ProgressLease
from service.worker.state import WorkerState

LOOK_INTERVAL_S = 0.5
# An engine that has been idle this long gets a canary.
CANARY_INTERVAL_S = 5.0

log = logs.get("pulse")


@dataclass
class Pulse:
    """Sets the phase to `stalled` when the progress lease is lost, and back to `ready` once the engine moves again.

    Runs in the main loop, because the engine may block its own. `steps` and `in_engine` read the engine's state;
    `prove` runs a harmless request through it.
    """

    state: WorkerState
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
        """Starts over: steps during loading do not count."""
        now_s = self.clock.monotonic()
        self._lease = ProgressLease(now_s, moved_s=now_s, steps=self.steps())
        self._idle_since_s = now_s

    def phase(self) -> Phase:
        """Returns the phase for the heartbeat: `stalled` also while the main loop is blocked.

        For the heart's thread. Does not change the worker's phase: that resumes with the loop.
        """
        is_blocked = self.clock.monotonic() - self._lease.looked_s > LATE_S
        return Phase.STALLED if is_blocked and self.state.phase is Phase.READY else self.state.phase

    async def follow(self) -> None:
        """Calls `look` for ever."""
        try:
            while True:
                await asyncio.sleep(LOOK_INTERVAL_S)
                self.look()
        finally:
            # The engine is stopped next, which a canary would take for its death.
            if self._canary is not None:
                self._canary.cancel()

    def look(self) -> None:
        """Checks once, starts a canary if one is due, and updates the phase."""
        now_s = self.clock.monotonic()
        if self._canary is not None and self._canary.done():
            if not self._canary.cancelled() and (error := self._canary.exception()) is not None:
                log.warning("canary_failed", cause=repr(error))
            self._canary = None
        is_busy = self.in_engine() > 0 or self._canary is not None
        if is_busy:
            self._idle_since_s = now_s
        elif now_s - self._idle_since_s >= CANARY_INTERVAL_S and self.state.phase is Phase.READY:
            self._canary = self.prove()
        moves = self._lease.look(now_s, self.steps(), is_busy, processor_time_s)
        if not moves and self.state.phase is Phase.READY:
            log.error("engine_stalled", silent_s=round(now_s - self._lease.moved_s, 1), in_engine=self.in_engine())
            self.state.enter(Phase.STALLED)
        elif moves and self.state.phase is Phase.STALLED:
            log.info("engine_moves_again")
            self.state.enter(Phase.READY)


def processor_time_s() -> float | None:
    """Returns the processor time of our child processes, the engine's included; None if one of them is stopped."""
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
