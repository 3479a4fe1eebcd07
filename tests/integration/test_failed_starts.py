"""A start that cannot succeed ends soon, with the reason."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.support.stacks import ROOT, FullStack, full_stack
from tests.support.waiting import until
from vllm_batch.v1 import recovery_service_pb2 as rpb

pytestmark = pytest.mark.timeout(240)
# A start that cannot succeed ends within a minute (docs/cases.md); the rest is for a slow machine.
ENDS_WITHIN_S = 90


def wait(stack: FullStack) -> "subprocess.CompletedProcess[str]":
    """The second half of start-all.sh, which waits until the stack accepts work or has failed."""
    command = [sys.executable, str(ROOT / "scripts/wait_until_accepting.py"), str(stack.conf)]
    return subprocess.run(command, env=stack.env, cwd=ROOT, capture_output=True, text=True, timeout=ENDS_WITHIN_S)


@pytest.mark.thorough
def test_postgres_that_cannot_start() -> None:
    """When Postgres exits at every start, start-all.sh fails with Postgres's own message."""
    with full_stack(BATCH_ENGINE="simulated") as stack:
        (stack.home / "pgdata").mkdir(mode=0o700)
        started = stack.script("start-all.sh", ENDS_WITHIN_S)
        assert started.returncode == 1
        last = started.stderr.splitlines()[-1]
        assert last.startswith("start: FAILED: postgres: ")
        assert "pgdata" in last


@pytest.mark.thorough
def test_port_that_was_taken_in_between() -> None:
    """When another program takes the gateway's port after the doctor's check, the gateway's own error is shown."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with full_stack(BATCH_ENGINE="simulated", BATCH_GATEWAY_PORT=str(port)) as stack:
            assert stack.script("supervisord.sh").returncode == 0
            ended = wait(stack)
    assert ended.returncode == 1
    last = ended.stderr.splitlines()[-1]
    assert last.startswith("start: FAILED: gateway: ")
    assert str(port) in last


def test_supervisord_that_is_away() -> None:
    """When supervisord is not running, the message says so."""
    with full_stack(BATCH_ENGINE="simulated") as stack:
        ended = wait(stack)
    assert ended.returncode == 1
    assert "supervisord did not start" in ended.stderr


@pytest.mark.thorough
def test_settings_that_became_wrong() -> None:
    """A worker that refuses its settings is not started again until they can be read, and then serves."""
    with (
        tempfile.NamedTemporaryFile("w", suffix=".env") as file,
        full_stack(BATCH_ENGINE="simulated", BATCH_ENV_FILE=file.name, BATCH_RESTART_BACKOFF_MAX_S="1") as stack,
    ):
        assert stack.script("start-all.sh").returncode == 0
        Path(file.name).write_text("BATCH_CHECK_INTERVAL_S=never\n")
        os.kill(stack.pid("worker"), signal.SIGKILL)
        gave_up = until(lambda: [event for event in stack.audit() if event.kind == "gave_up"], "the give-up")
        assert (len(stack.restarts()), gave_up[0].verdict) == (1, rpb.VERDICT_START_FAILED)
        Path(file.name).write_text("BATCH_CHECK_INTERVAL_S=20\n")
        until(lambda: [event.outcome for event in stack.restarts()][1:] == ["recovered"], "the restart")


@pytest.mark.thorough
def test_a_failure_that_recurs_spends_nothing() -> None:
    """A worker whose model this engine cannot run is given up at its first failure, with the budget untouched."""
    failure = "Model architectures ['X'] are not supported for now"
    with full_stack(BATCH_ENGINE="simulated", BATCH_SIMULATED_LOAD_FAILURE=failure) as stack:
        started = stack.script("start-all.sh", ENDS_WITHIN_S)
        assert failure in started.stderr.splitlines()[-1]
        events = [event for event in stack.audit() if event.kind != "verdict"]
        assert [(event.kind, event.verdict) for event in events] == [("gave_up", rpb.VERDICT_START_FAILED)]


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("unshare"), reason="mounts need root")
@pytest.mark.parametrize(
    ("mount", "told"),
    [
        ("mount -t tmpfs -o size=1m tmpfs /dev/shm", "1 MiB free in /dev/shm; Postgres needs 8"),
        ('mount -t tmpfs -o size=8m,ro tmpfs "$BATCH_HOME"', "is on a file system that is mounted read-only"),
        ('mount -t tmpfs -o size=8m tmpfs "$BATCH_HOME"', "0.0 GiB free in "),
        ('rmdir "$BATCH_HOME" && touch "$BATCH_HOME"', "is not a folder"),
        ('rmdir "$BATCH_HOME" && ln -s nowhere "$BATCH_HOME"', "is a link to nothing"),
    ],
    ids=["small shm", "read-only home", "full home", "home is a file", "home is a dangling link"],
)
def test_machine_that_cannot(mount: str, told: str) -> None:
    """On a machine that lacks something, the start fails with the doctor's line and a remedy."""
    with full_stack(BATCH_ENGINE="simulated") as stack:
        script = f'{mount} && exec "{ROOT}/scripts/start-all.sh"'
        command = ["unshare", "--mount", "bash", "-c", script]
        started = subprocess.run(command, env=stack.env, cwd="/", capture_output=True, text=True, timeout=ENDS_WITHIN_S)
        if "unshare failed" in started.stderr or "permission denied" in started.stderr:
            pytest.skip("no mounts here")
        if not stack.home.is_dir():
            stack.home.unlink()
            stack.home.mkdir()
    assert started.returncode == 1, started.stdout + started.stderr
    assert told in started.stderr
    assert " → " in started.stderr


def test_wrong_address() -> None:
    """An address of another machine is rejected at start."""
    with full_stack(BATCH_ENGINE="simulated", BATCH_HOST="192.0.2.7", BATCH_ALLOW_INSECURE="true") as stack:
        started = stack.script("start-all.sh", ENDS_WITHIN_S)
        assert started.returncode == 2
        assert "BATCH_HOST: 192.0.2.7 is not an address of this machine" in started.stderr
