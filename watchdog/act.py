"""The restart itself: stop, sweep, wait for the GPU, start. Every wait has an end, and says so when it is reached."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from service import logs, processes
from service.clock import Clock
from service.processes import Leader, Mark
from watchdog import gpu
from watchdog.policy import State, Step, Verdict
from watchdog.remains import Remains
from watchdog.supervisor import ProcessInfo, RefusedError, Supervisor

POLL_S = 0.05
# What SIGKILL does not end within this time, nothing will.
KILL_TIMEOUT_S = 10.0
START_TIMEOUT_S = 10.0
# The driver frees what the dead held in moments; if it does not, the next life may still find room.
GPU_TIMEOUT_S = 30.0
GPU_POLL_S = 0.5
# A worker that can still work is given the time to finish; for the others waiting is of no use.
GENTLE = frozenset({Verdict.HEARTBEAT_LOST, Verdict.NOT_READY})
SHORT_GRACE_S = 5.0

ENDED = frozenset({State.STOPPED, State.EXITED, State.FATAL})

log = logs.get("act")


class RestartError(Exception):
    """The restart could not be made."""


class AbandonedError(Exception):
    """The watchdog has been told to end; whoever comes next finds the intent and finishes."""


@dataclass(frozen=True)
class Restarter:
    """Restarts the worker `name` (as `group:process`), whose processes carry `mark`."""

    name: str
    mark: Mark
    remains: Remains
    supervisor: Supervisor
    stop_timeout_s: float
    clock: Clock
    ending: threading.Event

    def restart(
        self, verdict: Verdict, leader: Leader | None, on_step: Callable[[Step, dict[str, float]], None]
    ) -> int:
        """Stops the worker if it is there, ends what is left of it, starts it. Returns the new pid, 0 if it has died.

        `on_step` is told each step before it begins and how long the ones before took. Raises RestartError,
        AbandonedError, SupervisorAwayError.
        """
        timings: dict[str, float] = {}
        self.remains.look(leader)
        with self._timed("stop", timings):
            self._stop(verdict, leader)
        with self._timed("sweep", timings):
            self._sweep(leader)
            self.remains.sweep()
        with self._timed("gpu", timings):
            self._wait_for_gpu()
        on_step(Step.STARTING, timings)
        with self._timed("start", timings):
            pid = self._start()
        on_step(Step.LOADING, timings)
        self.remains.forget()
        return pid

    @contextmanager
    def _timed(self, phase: str, timings: dict[str, float]) -> Iterator[None]:
        began_s = self.clock.monotonic()
        yield
        timings[phase] = round(self.clock.monotonic() - began_s, 3)

    def _stop(self, verdict: Verdict, leader: Leader | None) -> None:
        info = self._info()
        if info.state in (State.RUNNING, State.STARTING, State.BACKOFF):
            self._order(self.supervisor.stop)
        grace_s = self.stop_timeout_s if verdict in GENTLE else min(SHORT_GRACE_S, self.stop_timeout_s)
        kill_s = self.clock.monotonic() + grace_s
        is_killed = False
        while (info := self._info()).pid or info.state not in ENDED:
            now_s = self.clock.monotonic()
            if now_s > kill_s + KILL_TIMEOUT_S:
                raise RestartError(f"it does not stop: supervisord says {info.state}, pid {info.pid}")
            if now_s > kill_s and not is_killed:
                killed = self._kill(leader, processes.now_ticks())
                log.warning("stop_escalated", worker=self.name, after_s=grace_s, killed=killed)
                is_killed = True
            self._pause()

    def _sweep(self, leader: Leader | None) -> None:
        """Ends what an earlier life left behind: it would hold memory and GPU against the next."""
        deadline_s = self.clock.monotonic() + KILL_TIMEOUT_S
        while True:
            # Nothing that starts after this moment is touched: it may be a new life, started by somebody else.
            before_ticks = processes.now_ticks()
            if self._info().pid:
                raise RestartError("somebody else has started it meanwhile")
            self.remains.look(leader)
            count = self._kill(leader, before_ticks)
            if not count:
                return
            log.warning("orphans_swept", worker=self.name, count=count)
            if self.clock.monotonic() > deadline_s:
                raise RestartError("processes of the earlier life do not end")

    def _kill(self, leader: Leader | None, before_ticks: int) -> int:
        found = processes.left_over(self.mark, leader, before_ticks)
        processes.end(found, KILL_TIMEOUT_S, (signal.SIGKILL,))
        return len(found)

    def _wait_for_gpu(self) -> None:
        """Until no process of the earlier life holds memory of a GPU, which a driver may free later than it dies."""
        deadline_s = self.clock.monotonic() + GPU_TIMEOUT_S
        while held := gpu.holders() & self.remains.pids:
            if self.clock.monotonic() > deadline_s:
                log.error("gpu_memory_held", worker=self.name, pids=sorted(held), after_s=GPU_TIMEOUT_S)
                return
            self._pause(GPU_POLL_S)

    def _start(self) -> int:
        self._order(self.supervisor.start)
        deadline_s = self.clock.monotonic() + START_TIMEOUT_S
        # supervisord spawns before it answers: what is EXITED now has been started and has died.
        while not (info := self._info()).pid and info.state not in ENDED:
            if self.clock.monotonic() > deadline_s:
                raise RestartError(f"it does not start: supervisord says {info.state}")
            self._pause()
        return info.pid

    def _order(self, order: Callable[[str], None]) -> None:
        try:
            order(self.name)
        except RefusedError as error:
            raise RestartError(f"supervisord refuses: {error}") from error

    def _info(self) -> ProcessInfo:
        try:
            return self.supervisor.info(self.name)
        except RefusedError as error:
            raise RestartError(f"supervisord does not know it: {error}") from error

    def _pause(self, time_s: float = POLL_S) -> None:
        if self.ending.wait(time_s):
            raise AbandonedError
