"""Processes of this machine: dying with the parent, finding those that are provably ours, ending them."""

import ctypes
import os
import resource
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

PR_SET_PDEATHSIG = 1
TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def die_with_parent(signal_number: int = signal.SIGTERM) -> None:
    """Has the kernel send this process `signal_number` when its parent dies: supervisord may be killed.

    Forgotten by a change of user and by a child of fork, kept over exec (prctl(2)). Raises OSError.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal_number, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")


def allow_many_files() -> None:
    """Lets this process have as many open files as it may: each client is one, and the usual limit is 1024."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


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


@dataclass(frozen=True)
class Leader:
    """A program's first process, whose pid is its group's number too. Pids come again: the start tells them apart."""

    pid: int
    start_ticks: int

    @property
    def age_s(self) -> float:
        """How long ago it started, untouched by changes of the wall clock."""
        return (now_ticks() - self.start_ticks) / TICKS_PER_S


def now_ticks() -> int:
    """The time since boot, in the unit of `Leader.start_ticks`."""
    return int(time.clock_gettime(time.CLOCK_BOOTTIME) * TICKS_PER_S)


def leader(pid: int) -> Leader | None:
    """The process with this pid as it is now; None when there is none."""
    start_ticks = _start_ticks(pid)
    return None if start_ticks is None else Leader(pid, start_ticks)


def is_in_group(pid: int, group: int) -> bool:
    """True when the process exists and is in the process group."""
    with suppress(ProcessLookupError):
        return os.getpgid(pid) == group
    return False


def marked(mark: Mark) -> list[psutil.Process]:
    """All processes with the mark, this one and its ancestors apart. A psutil.Process knows when its pid was reused."""
    return [process for process in _others() if mark.is_on(_environ(process))]


def left_over(mark: Mark, dead: Leader | None, before_ticks: int) -> list[psutil.Process]:
    """What is still alive of a program that has ended, started before the given time. This process is never in it.

    That is all with the mark; and of the `dead` leader's group those whose environment cannot be read because they
    wrote their title over it, as vLLM's do without SPT_NOENV.
    """
    found = []
    for process in _others():
        start_ticks = _start_ticks(process.pid)
        if start_ticks is None or start_ticks >= before_ticks or not is_alive(process):
            continue
        environ = _environ(process)
        if mark.is_on(environ) or (not environ and dead is not None and _is_member(process.pid, start_ticks, dead)):
            found.append(process)
    return found


def end(
    processes: Sequence[psutil.Process],
    timeout_s: float,
    signals: Sequence[int] = (signal.SIGTERM, signal.SIGKILL),
) -> list[psutil.Process]:
    """Sends each signal in turn and waits up to `timeout_s` after each. Returns what is still alive."""
    alive = list(processes)
    for number in signals:
        for process in alive:
            # psutil compares the start time first: a pid that was reused is left alone.
            with suppress(psutil.Error):
                process.send_signal(number)
        deadline = time.monotonic() + timeout_s
        # A zombie whose parent does not wait for it is dead enough, but not for psutil.
        while (alive := [process for process in alive if is_alive(process)]) and time.monotonic() < deadline:
            psutil.wait_procs(alive, timeout=min(0.1, timeout_s))
        if not alive:
            break
    return alive


def _others() -> Iterator[psutil.Process]:
    """All processes without this one and its ancestors."""
    spared = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
    return (process for process in psutil.process_iter() if process.pid not in spared)


def _environ(process: psutil.Process) -> dict[str, str]:
    with suppress(psutil.Error, OSError):
        return process.environ()
    return {}


def _is_member(pid: int, start_ticks: int, dead: Leader) -> bool:
    # A number is not given to a new process while a group of that number lives. If there is another process of that
    # number now, or the member is older, then the group is another one.
    return is_in_group(pid, dead.pid) and start_ticks >= dead.start_ticks and leader(dead.pid) in (None, dead)


def _start_ticks(pid: int) -> int | None:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # The name, in parentheses, may hold anything; what follows is separated by spaces, starttime is field 22 (proc(5)).
    return int(stat.rpartition(")")[2].split()[19])


def is_alive(process: psutil.Process) -> bool:
    """False for a zombie too, which runs no more and waits for its parent only."""
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False
