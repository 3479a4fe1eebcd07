"""The restart itself: stop, sweep, wait for the GPU, start. Every wait has a deadline, and says when it passes."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from service import processes
from service.clock import Clock
from service.processes import Leader, Mark
from service.telemetry import logs
from watchdog.act import gpu
from watchdog.act.leftovers import Leftovers
from watchdog.policy import State, Step, Verdict
from watchdog.supervisor import ProcessInfo, RefusedError, Supervisor

POLL_S = 0.05
# Nothing will end a process that has survived SIGKILL this long.
KILL_TIMEOUT_S = 10.0
START_TIMEOUT_S = 10.0
# The driver usually frees a dead process's memory in moments; if not, start anyway: there may be room.
GPU_TIMEOUT_S = 30.0
GPU_POLL_S = 0.5
# These workers can still do work, so they get time to drain; for the others waiting is useless.
GENTLE = frozenset({Verdict.HEARTBEAT_LOST, Verdict.NOT_READY})
SHORT_GRACE_S = 5.0

ENDED = frozenset({State.STOPPED, State.EXITED, State.FATAL})

log = logs.get("act")


class RestartError(Exception):
    """The restart failed."""


class AbandonedError(Exception):
    """The watchdog was told to end; its successor finds the intent and finishes it."""


@dataclass(frozen=True)
class Restarter:
    """Restarts the worker or gateway `name` (`group:process`), whose processes carry `mark`."""

    name: str
    mark: Mark
    leftovers: Leftovers
    supervisor: Supervisor
    stop_timeout_s: float
    clock: Clock
    ending: threading.Event

    def restart(
        self, verdict: Verdict, leader: Leader | None, on_step: Callable[[Step, dict[str, float]], None]
    ) -> int:
        """Stops the worker, ends its leftover processes, starts it. Returns the new pid, 0 if it died at once.

        Calls `on_step` with each step before it begins, and the seconds that earlier ones took. Raises RestartError,
        AbandonedError, SupervisorAwayError.
        """
        timings: dict[str, float] = {}
        self.leftovers.look(leader)
        with self._timed("stop", timings):
            self._stop(verdict, leader)
        with self._timed("sweep", timings):
            self._sweep(leader)
            self.leftovers.sweep()
        with self._timed("gpu", timings):
            self._wait_for_gpu()
        on_step(Step.STARTING, timings)
        with self._timed("start", timings):
            pid = self._start()
        on_step(Step.LOADING, timings)
        self.leftovers.forget()
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
                raise RestartError(f"{self.name} does not stop: supervisord reports {info.state}, pid {info.pid}")
            if now_s > kill_s and not is_killed:
                killed = self._kill(leader, processes.now_ticks())
                log.warning("stop_escalated", worker=self.name, after_s=grace_s, killed=killed)
                is_killed = True
            self._pause()

    def _sweep(self, leader: Leader | None) -> None:
        """Ends leftover processes: they would keep memory and GPU from the next incarnation."""
        deadline_s = self.clock.monotonic() + KILL_TIMEOUT_S
        while True:
            # Spare whatever starts after this moment: somebody else may have started a new worker.
            before_ticks = processes.now_ticks()
            if self._info().pid:
                raise RestartError(f"somebody else has started {self.name} in the meantime")
            self.leftovers.look(leader)
            count = self._kill(leader, before_ticks)
            if not count:
                return
            log.warning("orphans_swept", worker=self.name, count=count)
            if self.clock.monotonic() > deadline_s:
                raise RestartError(f"leftover processes of {self.name} survive SIGKILL")

    def _kill(self, leader: Leader | None, before_ticks: int) -> int:
        found = processes.left_over(self.mark, leader, before_ticks)
        processes.end(found, KILL_TIMEOUT_S, (signal.SIGKILL,))
        return len(found)

    def _wait_for_gpu(self) -> None:
        """Waits until the driver has freed the GPU memory of the earlier processes: it may do so after they die."""
        deadline_s = self.clock.monotonic() + GPU_TIMEOUT_S
        while held := gpu.holders() & self.leftovers.pids:
            if self.clock.monotonic() > deadline_s:
                log.error("gpu_memory_held", worker=self.name, pids=sorted(held), after_s=GPU_TIMEOUT_S)
                return
            self._pause(GPU_POLL_S)

    def _start(self) -> int:
        self._order(self.supervisor.start)
        deadline_s = self.clock.monotonic() + START_TIMEOUT_S
        # supervisord spawns before it answers, so EXITED means that the new process has died.
        while not (info := self._info()).pid and info.state not in ENDED:
            if self.clock.monotonic() > deadline_s:
                raise RestartError(f"{self.name} does not start: supervisord reports {info.state}")
            self._pause()
        return info.pid

    def _order(self, order: Callable[[str], None]) -> None:
        try:
            order(self.name)
        except RefusedError as error:
            raise RestartError(f"supervisord refused: {error}") from error

    def _info(self) -> ProcessInfo:
        try:
            return self.supervisor.info(self.name)
        except RefusedError as error:
            raise RestartError(f"supervisord does not know {self.name}: {error}") from error

    def _pause(self, time_s: float = POLL_S) -> None:
        if self.ending.wait(time_s):
            raise AbandonedError
