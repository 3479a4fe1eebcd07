"""Finding and ending processes: all of ours, and nobody else's."""

import ctypes
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from service import processes
from service.processes import Leader, Mark
from tests.support.namespaces import own_pids
from tests.support.waiting import until

Start = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts processes that only sleep; they are killed after the test."""
    children = []

    def run(environ: dict[str, str], group: int = 0) -> "subprocess.Popen[bytes]":
        children.append(subprocess.Popen(["sleep", "1000"], env=environ, process_group=group))
        return children[-1]

    yield run
    for child in children:
        child.kill()
        child.wait()


def marks(home: Path, name: str = "worker") -> dict[str, str]:
    return {"BATCH_HOME": str(home), "SUPERVISOR_PROCESS_NAME": name}


def pids(found: list[psutil.Process]) -> set[int]:
    return {process.pid for process in found}


def known(pid: int) -> Leader:
    leader = processes.leader(pid)
    assert leader is not None
    return leader


def test_a_process_that_is_hidden(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where /proc hides the processes of other users, a pid that one of them has is told from one that nobody has."""
    child = start({})
    leader = known(child.pid)
    assert processes.is_running(leader) is True
    monkeypatch.setattr(processes, "_stat", lambda _: ("", None))

    def refused(*_: int) -> None:
        raise PermissionError

    with monkeypatch.context() as others:
        others.setattr(os, "kill", refused)
        assert processes.is_running(leader) is None
    child.kill()
    child.wait()
    assert processes.is_running(leader) is False


def test_marked_are_those_of_the_home_and_the_name(tmp_path: Path, start: Start) -> None:
    """A process is ours by its home, however the path is written, and by its program's name."""
    worker, gateway = start(marks(tmp_path / ".." / tmp_path.name)), start(marks(tmp_path, "gateway"))
    start(marks(tmp_path / "other"))
    start({"BATCH_HOME": str(tmp_path)})
    assert pids(processes.marked(Mark(tmp_path))) == {worker.pid, gateway.pid}
    assert pids(processes.marked(Mark(tmp_path, "worker"))) == {worker.pid}


def test_what_runs_in_a_container_is_not_ours(tmp_path: Path) -> None:
    """A stack in a container whose BATCH_HOME has the same path is left alone by that of the machine around it."""
    mark = [f"{name}={value}" for name, value in marks(tmp_path).items()]
    command = [*own_pids(), "env", *mark, "sh", "-c", "echo; exec sleep 600"]
    inside = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
    try:
        assert inside.stdout is not None
        assert inside.stdout.readline() == b"\n"
        assert processes.marked(Mark(tmp_path)) == []
        assert processes.left_over(Mark(tmp_path, "worker"), None, processes.now_ticks() + 1) == []
    finally:
        inside.kill()
        inside.wait(10)


def test_left_over_of_a_dead_leader_are_its_marked_and_its_stripped_members(tmp_path: Path, start: Start) -> None:
    """In a dead leader's group, processes without an environment count as ours, those with another's mark do not."""
    leader = start(marks(tmp_path))
    dead = known(leader.pid)
    stripped, foreign = start({}, leader.pid), start(marks(tmp_path, "gateway"), leader.pid)
    elsewhere = start({})
    leader.kill()
    leader.wait()
    found = processes.left_over(Mark(tmp_path, "worker"), dead, processes.now_ticks() + 1)
    assert pids(found) == {stripped.pid}
    assert foreign.poll() is None
    assert elsewhere.poll() is None


def test_group_whose_number_came_again_is_not_taken_for_the_old_one(tmp_path: Path, start: Start) -> None:
    """When the leader's pid has been reused by another process, the group of that process is left alone."""
    leader = start({})
    member = start({}, leader.pid)
    now = known(leader.pid)
    late = processes.now_ticks() + 1
    earlier = replace(now, start_ticks=now.start_ticks - 1)
    assert pids(processes.left_over(Mark(tmp_path), now, late)) == {leader.pid, member.pid}
    assert processes.left_over(Mark(tmp_path), earlier, late) == []
    leader.kill()
    leader.wait()
    later = replace(now, start_ticks=late)
    assert processes.left_over(Mark(tmp_path), later, late) == []


def test_what_starts_later_is_not_left_over(tmp_path: Path, start: Start) -> None:
    """A process that starts after the search began is not taken for a leftover of the old life."""
    new = start(marks(tmp_path))
    ticks = known(new.pid).start_ticks
    assert processes.left_over(Mark(tmp_path), None, ticks) == []
    assert pids(processes.left_over(Mark(tmp_path), None, ticks + 1)) == {new.pid}


def test_a_process_that_the_kernel_does_not_answer_for_holds_up_nobody(
    tmp_path: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A read of a process in uninterruptible sleep is given up, and not begun again; all others are found, and so is it
    by its group."""
    leader, foreign, mine = start(marks(tmp_path)), start({}), start(marks(tmp_path))
    stuck = {leader.pid, foreign.pid}
    answered, asked, environ = threading.Event(), list[int](), psutil.Process.environ

    def hang(process: psutil.Process) -> Any:
        if process.pid in stuck:
            asked.append(process.pid)
            assert answered.wait(100)
        return environ(process)

    monkeypatch.setattr(psutil.Process, "environ", hang)
    mark, late = Mark(tmp_path, "worker"), processes.now_ticks() + 1
    try:
        counts = []
        for _ in range(3):
            assert pids(processes.left_over(mark, known(leader.pid), late)) == {leader.pid, mine.pid}
            assert pids(processes.marked(mark)) == {mine.pid}
            counts.append(len(asked))
        assert {*asked} == stuck
        assert counts == counts[:1] * 3
    finally:
        answered.set()
    until(lambda: pids(processes.marked(mark)) == {leader.pid, mine.pid}, "the answers")


def test_end_goes_from_asking_to_killing() -> None:
    """A process that survives SIGTERM is returned as still alive, and SIGKILL ends it."""
    code = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); signal.pause()"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        process = psutil.Process(child.pid)
        assert processes.end([process], 0.2, (signal.SIGTERM,)) == [process]
        assert processes.end([process], 10, (signal.SIGKILL,)) == []
    assert not process.is_running()


def test_age_and_absence_of_a_process(start: Start) -> None:
    """A process's age counts from its start; a process that is gone has no identity and no group."""
    child = start({})
    assert 0 <= known(child.pid).age_s <= known(os.getpid()).age_s
    assert processes.is_in_group(child.pid, child.pid)
    assert not processes.is_in_group(child.pid, os.getpgid(0))
    child.kill()
    child.wait()
    assert processes.leader(child.pid) is None
    assert not processes.is_in_group(child.pid, child.pid)


def test_die_with_parent() -> None:
    """SIGKILL of the parent also ends a child that asked to die with it."""
    child = (
        "from service import processes; processes.die_with_parent(); print(flush=True); import signal; signal.pause()"
    )
    parent = f"import subprocess, sys; c = subprocess.Popen([sys.executable, '-c', {child!r}], stdout=subprocess.PIPE);"
    parent += "c.stdout.readline(); print(c.pid, flush=True); c.wait()"
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        orphan = psutil.Process(int(process.stdout.readline()))
        process.kill()
    assert processes.end([orphan], 10, (signal.SIGCONT,)) == []


def test_die_with_a_parent_that_is_dead() -> None:
    """A child whose parent died before it asked to die with it, as while it was importing, ends too."""
    child = (
        "import sys; from service import processes; print(flush=True); sys.stdin.readline();"
        " processes.die_with_parent(); import signal; signal.pause()"
    )
    parent = f"import subprocess, sys; c = subprocess.Popen([sys.executable, '-c', {child!r}], stdout=subprocess.PIPE);"
    parent += "c.stdout.readline(); print(c.pid, flush=True); c.wait()"
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", parent], start_new_session=True, **pipes) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        orphan = psutil.Process(int(process.stdout.readline()))
        process.kill()
        process.wait(10)
        process.stdin.write(b"\n")
    try:
        assert processes.end([orphan], 10, (signal.SIGCONT,)) == []
    finally:
        processes.end([orphan], 10, (signal.SIGKILL,))


def test_die_with_a_parent_that_dies_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    """A parent that dies while its child asks to die with it is noticed, even if the next is of the same session."""
    parents, sent = iter([os.getpid(), os.getpid() + 1]), list[tuple[int, int]]()
    monkeypatch.setattr(os, "getppid", lambda: next(parents))
    monkeypatch.setattr(os, "kill", lambda pid, number: sent.append((pid, number)))
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: SimpleNamespace(prctl=lambda *_: 0))
    processes.die_with_parent(signal.SIGINT)
    assert sent == [(os.getpid(), signal.SIGINT)]


def test_die_with_parent_spares_whoever_has_one() -> None:
    """A program runs that was started in a session, or in a process group, of its own."""
    command = [sys.executable, "-c", "from service import processes; processes.die_with_parent(); print('lives')"]
    kinds: list[dict[str, Any]] = [{"start_new_session": True}, {"process_group": 0}]
    for how in kinds:
        assert subprocess.run(command, stdout=subprocess.PIPE, timeout=60, **how).stdout == b"lives\n"
