"""Processes on this machine: dying with the parent, finding the ones that are provably ours, ending them."""

import asyncio
import ctypes
import os
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar

import psutil

PR_SET_PDEATHSIG = 1
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
# The kernel answers at once, unless it waits for the process that it is asked about.
ANSWER_TIMEOUT_S = 2.0

T = TypeVar("T")

# Who has started this process, as far as it is to die with that; 0: not known.
_parent = 0


def die_with_parent(signal_number: int = signal.SIGTERM) -> None:
    """Has the kernel send this process `signal_number` when its parent dies, as when supervisord is killed.

    Sends it at once if the parent is dead already: the kernel signals deaths from now on. Survives exec, but not fork
    or a change of user (prctl(2)). Raises OSError.
    """
    global _parent
    parent = _parent = os.getppid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal_number, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent or _is_adopted(parent):
        os.kill(os.getpid(), signal_number)


def has_lost_parent() -> bool:
    """True if the parent with which this process is to die is dead: nobody has stopped this one in order."""
    return _parent != os.getppid() and _parent != 0


def _is_adopted(parent: int) -> bool:
    """True if `parent` did not start this process, but got it when its parent died: it is of another session."""
    # Who leads its session may have begun it, away from its parent. 0: the parent is outside of this pid namespace.
    if not parent or os.getsid(0) == os.getpid():
        return False
    with suppress(OSError):
        return os.getsid(parent) != os.getsid(0)
    return False


class _Caller(threading.Thread):
    """Makes calls for others, which need not wait for them to return."""

    def __init__(self) -> None:
        super().__init__(name="caller", daemon=True)
        self.calls: SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = SimpleQueue()
        self.start()

    def run(self) -> None:
        while True:
            future, call = self.calls.get()
            try:
                future.set_result(call())
            except BaseException as error:  # noqa: BLE001 - raised where the result is asked for
                future.set_exception(error)


_idle: list[_Caller] = []
# What was asked of which process, and is not answered yet.
_unanswered: set[tuple[str, int]] = set()


def answer(what: str, pid: int, ask: Callable[[], T]) -> T:
    """Returns what `ask` learns about a process. Raises TimeoutError after ANSWER_TIMEOUT_S.

    To read its memory, such as its environment or its arguments, the kernel takes a lock that a process in
    uninterruptible sleep may hold for good. As long as it does, `what` of it is not asked for again.
    """
    question = (what, pid)
    if question in _unanswered:
        raise TimeoutError(f"{what} of process {pid} cannot be read: the kernel does not answer")
    try:
        caller = _idle.pop()
    except IndexError:
        caller = _Caller()
    future: Future[T] = Future()
    caller.calls.put((future, ask))
    if not wait([future], ANSWER_TIMEOUT_S).done:
        _unanswered.add(question)

        def end(_: object) -> None:
            _unanswered.discard(question)
            _idle.append(caller)

        future.add_done_callback(end)
        raise TimeoutError(f"{what} of process {pid} could not be read within {ANSWER_TIMEOUT_S:g} s")
    _idle.append(caller)
    return future.result()


def told_to_end() -> asyncio.Event:
    """An event that SIGTERM or SIGINT sets. Call it in the main thread's event loop."""
    event = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, event.set)
    return event


def allow_many_files() -> None:
    """Raises this process's limit of open files to the hard limit: each client takes one, and 1024 is usual."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


@dataclass(frozen=True)
class Mark:
    """Identifies our processes by the variables they inherited. `home` is the absolute BATCH_HOME."""

    home: Path
    # The program's name in supervisord; None: every process of the home.
    process_name: str | None = None

    def is_on(self, environ: dict[str, str]) -> bool:
        """True if `environ` is the environment of one of our processes."""
        home = environ.get("BATCH_HOME")
        return (
            home is not None
            and os.path.realpath(home) == os.path.realpath(self.home)
            and "SUPERVISOR_PROCESS_NAME" in environ
            and self.process_name in (None, environ["SUPERVISOR_PROCESS_NAME"])
        )


@dataclass(frozen=True)
class Leader:
    """A program's first process, whose pid is also its process group's id. Pids are reused; `start_ticks` is not."""

    pid: int
    start_ticks: int

    @property
    def age_s(self) -> float:
        """Seconds since it started, unaffected by changes of the wall clock."""
        return (now_ticks() - self.start_ticks) / TICKS_PER_S


def now_ticks() -> int:
    """Time since boot, in the unit of `Leader.start_ticks`."""
    return int(time.clock_gettime(time.CLOCK_BOOTTIME) * TICKS_PER_S)


def leader(pid: int) -> Leader | None:
    """The process that has this pid now; None if there is none."""
    start_ticks = _start_ticks(pid)
    return None if start_ticks is None else Leader(pid, start_ticks)


def is_running(leader: Leader) -> bool | None:
    """True if this very process exists and has not ended: not a zombie, and not another that got its pid.

    None if that cannot be known: a process of another user has its pid, and /proc hides those (hidepid).
    """
    state, start_ticks = _stat(leader.pid)
    if start_ticks is None and leader.pid > 0:
        try:
            os.kill(leader.pid, 0)
        except PermissionError:
            return None
        except OSError:
            return False
    return start_ticks == leader.start_ticks and state not in "ZX"


def is_in_group(pid: int, group: int) -> bool:
    """True if the process exists and belongs to the process group."""
    with suppress(ProcessLookupError):
        return os.getpgid(pid) == group
    return False


def marked(mark: Mark) -> list[psutil.Process]:
    """All processes with the mark except this one and its ancestors. A psutil.Process detects a reused pid."""
    found = list(_others())
    return [process for process, environ in zip(found, _environs(found), strict=True) if mark.is_on(environ)]


def supervisords(home: Path) -> list[psutil.Process]:
    """supervisord of a home, also one that does not answer; several if another was started beside that one."""
    found, others = [], list(_others())
    for process, environ in zip(others, _environs(others), strict=True):
        is_theirs = os.path.realpath(environ.get("BATCH_HOME", os.devnull)) == os.path.realpath(home)
        # Not what it runs.
        if is_theirs and "SUPERVISOR_PROCESS_NAME" not in environ and "supervisor.supervisord" in command(process):
            found.append(process)
    return found


def left_over(mark: Mark, dead: Leader | None, before_ticks: int) -> list[psutil.Process]:
    """Processes left by a program that has ended, if started before `before_ticks`; never this process.

    These are all processes with the mark, and members of the `dead` leader's group whose environment is unreadable
    because they overwrote it with their title, as vLLM's do without SPT_NOENV.
    """
    starts = ((process, _start_ticks(process.pid)) for process in _others())
    earlier = [
        (process, start_ticks)
        for process, start_ticks in starts
        if start_ticks is not None and start_ticks < before_ticks and is_alive(process)
    ]
    environs = _environs([process for process, _ in earlier])
    return [
        process
        for (process, start_ticks), environ in zip(earlier, environs, strict=True)
        if mark.is_on(environ) or (not environ and dead is not None and _is_member(process.pid, start_ticks, dead))
    ]


def end(
    processes: Sequence[psutil.Process],
    timeout_s: float,
    signals: Sequence[int] = (signal.SIGTERM, signal.SIGKILL),
) -> list[psutil.Process]:
    """Sends each signal in turn and waits up to `timeout_s` after each. Returns the processes still alive."""
    alive = list(processes)
    for number in signals:
        for process in alive:
            # psutil compares the start time first, so a reused pid is left alone.
            with suppress(psutil.Error):
                process.send_signal(number)
        deadline = time.monotonic() + timeout_s
        # A zombie that its parent does not reap counts as dead here, but not for psutil.
        while (alive := [process for process in alive if is_alive(process)]) and time.monotonic() < deadline:
            psutil.wait_procs(alive, timeout=min(0.1, timeout_s))
        if not alive:
            break
    return alive


def _others() -> Iterator[psutil.Process]:
    """All processes except this one, its ancestors, and those in containers: the same path is another home there."""
    spared = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
    space = _pid_space("self")
    return (
        process
        for process in psutil.process_iter()
        if process.pid not in spared and _pid_space(process.pid) in (space, None)
    )


def _pid_space(pid: int | str) -> int | None:
    """The pid namespace of a process; None if that cannot be read."""
    with suppress(OSError):
        return os.stat(f"/proc/{pid}/ns/pid").st_ino
    return None


def _environs(found: Sequence[psutil.Process]) -> list[dict[str, str]]:
    """The environment of each; empty if it cannot be read. One by one only if the kernel does not answer for all."""
    try:
        return answer("environs", 0, lambda: [_environ(process.environ) for process in found])
    except TimeoutError:
        return [_environ(partial(answer, "environ", process.pid, process.environ)) for process in found]


def _environ(read: Callable[[], dict[str, str]]) -> dict[str, str]:
    with suppress(psutil.Error, OSError):
        return read()
    return {}


def command(process: psutil.Process) -> list[str]:
    """Its arguments; none if they cannot be read."""
    with suppress(psutil.Error, OSError):
        return answer("cmdline", process.pid, process.cmdline)
    return []


def _is_member(pid: int, start_ticks: int, dead: Leader) -> bool:
    # The kernel does not reuse a pid while a process group has it as its id. If another process has that pid now, or
    # the member is older than the leader, the group is a different one.
    return is_in_group(pid, dead.pid) and start_ticks >= dead.start_ticks and leader(dead.pid) in (None, dead)


def _start_ticks(pid: int) -> int | None:
    return _stat(pid)[1]


def _stat(pid: int) -> tuple[str, int | None]:
    """The state and the start time of a process; no time if there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return "", None
    # The name, in parentheses, may contain anything; spaces separate the rest: state is field 3, starttime field 22
    # (proc(5)).
    fields = stat.rpartition(")")[2].split()
    return fields[0], int(fields[19])


def is_alive(process: psutil.Process) -> bool:
    """False also for a zombie, which has ended and only waits to be reaped."""
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False
