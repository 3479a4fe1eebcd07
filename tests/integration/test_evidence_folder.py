"""The evidence kept of real processes before they are ended."""

import functools
import os
import signal
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest

from service.processes import Mark
from watchdog.act import commands, evidence_folder

WHEN = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
CODE = """
import time
def a_function_to_be_found():
    print("up", flush=True)
    time.sleep(600)
a_function_to_be_found()
"""


def test_stacks_of_a_frozen_process(tmp_path: Path) -> None:
    """The stack of a stopped process is kept, beside log tail, memory, heartbeat and event."""
    env = os.environ | {"BATCH_HOME": str(tmp_path), "SUPERVISOR_PROCESS_NAME": "worker"}
    process = subprocess.Popen([sys.executable, "-c", CODE], env=env, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        process.send_signal(signal.SIGSTOP)
        log = tmp_path / "worker.log"
        log.write_text("x" * 300_000 + "\nthe last line\n")
        folder = evidence_folder.keep(
            tmp_path, Mark(tmp_path, "worker"), WHEN, "12", {"verdict": "FROZEN"}, {"beat": 7}, [log]
        )
    finally:
        process.kill()
        process.wait(10)
    assert folder == tmp_path / "crash" / "20260102T030405Z-event-12"
    assert "a_function_to_be_found" in (folder / f"stack-{process.pid}.txt").read_text()
    kept = (folder / "worker.log").read_text()
    assert kept.endswith("the last line\n")
    assert len(kept) <= evidence_folder.LOG_TAIL_BYTES
    assert '"beat": 7' in (folder / "heartbeat.json").read_text()
    assert '"FROZEN"' in (folder / "event.json").read_text()
    assert f"{process.pid} parent {os.getpid()} stopped" in (folder / "processes.txt").read_text()
    assert "/dev/shm" in (folder / "memory.txt").read_text()


def test_what_fails_is_told_in_its_place(tmp_path: Path) -> None:
    """A missing log file is reported in its place, and everything else is still written."""
    folder = evidence_folder.keep(tmp_path, Mark(tmp_path, "worker"), WHEN, "1", {}, None, [tmp_path / "none.log"])
    assert folder is not None
    assert "FileNotFoundError" in (folder / "none.log").read_text()
    assert (folder / "memory.txt").exists()


def test_evidence_is_the_owners_alone(tmp_path: Path) -> None:
    """Also where supervisord does not set the umask, as it does only as a daemon, and not under systemd."""
    before = os.umask(0o022)
    try:
        folder = evidence_folder.keep(tmp_path, Mark(tmp_path, "worker"), WHEN, "1", {}, None, [])
    finally:
        os.umask(before)
    assert folder is not None
    assert [oct(each.stat().st_mode)[-3:] for each in (folder, folder.parent)] == ["700", "700"]


def test_what_hangs_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A log whose disk does not answer holds up neither the rest of the evidence nor the restart."""
    monkeypatch.setattr(evidence_folder, "TIMEOUT_S", 3.0)
    hung = tmp_path / "worker.log"
    os.mkfifo(hung)
    keep = functools.partial(evidence_folder.keep, tmp_path, Mark(tmp_path, "worker"), WHEN)
    try:
        folder = keep("1", {}, None, [hung])
        assert folder is not None
        assert "not read in time" in (folder / "worker.log").read_text()
        assert (folder / "memory.txt").exists()
        monkeypatch.setattr(evidence_folder.processes, "marked", lambda _: hung.read_text())
        assert keep("2", {}, None, []) is None
    finally:
        # Whoever waits for a writer has one.
        os.close(os.open(hung, os.O_RDWR))


def test_a_command_that_cannot_be_killed_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that hangs in a driver is not waited for: SIGKILL does not end it."""
    kill, started = subprocess.Popen.kill, list["subprocess.Popen[str]"]()
    monkeypatch.setattr(subprocess.Popen, "kill", lambda process: started.append(process))
    with pytest.raises(subprocess.TimeoutExpired):
        commands.output(["sleep", "1000"], 0.1)
    [process] = started
    assert process.poll() is None
    kill(process)
    process.communicate(timeout=10)


def test_old_folders_are_removed(tmp_path: Path) -> None:
    """The newest folders are kept, and the one just written even if the clock was set back."""
    for number in range(5):
        when = WHEN.replace(minute=number)
        latest = evidence_folder.keep(
            tmp_path, Mark(tmp_path, "worker"), when, str(number), {}, None, [tmp_path / "none.log"]
        )
    assert latest is not None
    evidence_folder.prune(latest, kept=3)
    assert sorted(path.name[-1] for path in (tmp_path / "crash").iterdir()) == ["2", "3", "4"]
    when = WHEN.replace(year=2025)
    latest = evidence_folder.keep(tmp_path, Mark(tmp_path, "worker"), when, "5", {}, None, [tmp_path / "none.log"])
    assert latest is not None
    evidence_folder.prune(latest, kept=3)
    assert sorted(path.name[-1] for path in (tmp_path / "crash").iterdir()) == ["3", "4", "5"]
