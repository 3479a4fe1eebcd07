"""Processes of this machine: dying with the parent, finding those that are provably ours, ending them."""

import ctypes
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

PR_SET_PDEATHSIG = 1


def die_with_parent(signal_number: int = signal.SIGTERM) -> None:
    """Has the kernel send this process `signal_number` when its parent dies: supervisord may be killed.

    Forgotten by a change of user and by a child of fork, kept over exec (prctl(2)).
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal_number, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")


@dataclass(frozen=True)
class Mark:
    """What makes a process ours: variables that it inherited. `home` is the absolute BATCH_HOME."""

    home: Path
    # supervisord's name of the program; None for every process of the home.
    process_name: str | None = None

    def is_on(self, environ: dict[str, str]) -> bool:
        """True for the environment of a process of ours."""
        home = environ.get("BATCH_HOME")
        return (
            home is not None
            and os.path.realpath(home) == os.path.realpath(self.home)
            and "SUPERVISOR_PROCESS_NAME" in environ
            and self.process_name in (None, environ["SUPERVISOR_PROCESS_NAME"])
        )


def marked(mark: Mark) -> list[psutil.Process]:
    """All processes with the mark, this one and its ancestors apart. A psutil.Process knows when its pid was reused."""
    spared = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
    return [process for process in _all() if process.pid not in spared and mark.is_on(_environ(process))]


def _all() -> Iterator[psutil.Process]:
    yield from psutil.process_iter()


def _environ(process: psutil.Process) -> dict[str, str]:
    with suppress(psutil.Error, OSError):
        return process.environ()
    return {}


def end(
    processes: Sequence[psutil.Process],
    timeout_s: float,
    signals: Sequence[int] = (signal.SIGTERM, signal.SIGKILL),
    monotonic: Callable[[], float] = time.monotonic,
) -> list[psutil.Process]:
    """Sends each signal in turn and waits up to `timeout_s` after each. Returns what is still alive."""
    alive = list(processes)
    for number in signals:
        for process in alive:
            # psutil compares the start time first: a pid that was reused is left alone.
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)
        deadline = monotonic() + timeout_s
        _, alive = psutil.wait_procs(alive, timeout=max(0.0, deadline - monotonic()))
        alive = [process for process in alive if _is_alive(process)]
        if not alive:
            break
    return alive


def _is_alive(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False
