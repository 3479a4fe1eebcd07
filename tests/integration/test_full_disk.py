"""A disk that fills up, or fails and turns read-only, under a running stack: no result is lost, and everything resumes
once there is space, or the disk is repaired."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.batches import lines, refused
from tests.support.namespaces import Disk, FailingDisk, own_mounts
from tests.support.stacks import FullStack, full_stack
from tests.support.waiting import until
from vllm_batch import Client
from vllm_batch.v1 import batch_service_pb2 as pb
from vllm_batch.v1 import recovery_service_pb2 as rpb

COUNT = 300
# The doctor requires 2 GiB of free space; tmpfs takes only the memory that is written to.
ROOM_MIB = 4096

pytestmark = [
    pytest.mark.timeout(240),
    pytest.mark.skipif(os.geteuid() != 0, reason="mounts need root"),
]
SETTINGS = {
    "BATCH_ENGINE": "simulated",
    "BATCH_SIMULATED_WINDOW": "16",
    "BATCH_HEARTBEAT_INTERVAL_S": "0.5",
    "BATCH_HEARTBEAT_TIMEOUT_S": "5",
    "BATCH_CHECK_INTERVAL_S": "1",
    "BATCH_DATABASE_TIMEOUT_S": "2",
}


@pytest.fixture
def mounts() -> Iterator[None]:
    """Gives the test a mount namespace."""
    with own_mounts():
        yield


def start(stack: FullStack) -> None:
    """Starts the stack, whose home is on a disk of its own."""
    stack.start_all()


def check_done(stack: FullStack, batch: pb.Batch) -> None:
    """Asserts that each request has exactly one result, and that new work is accepted."""
    with Client(stack.target, patience_s=90) as client:
        *_, done = client.watch(batch.id)
        assert (done.state, done.counts.completed) == (pb.BATCH_STATE_COMPLETED, COUNT)
        assert [result.custom_id for result in client.results(batch.id)] == [f"c{i}" for i in range(COUNT)]
        again = client.submit_lines(lines(3))
        *_, done = client.watch(again.id)
        assert done.counts.completed == 3


@pytest.mark.thorough
def test_disk_of_the_embedded_postgres(mounts: None) -> None:
    """When the disk is full, and Postgres then crashes and cannot start, clients are told why and nothing else is
    restarted; once there is space the batch completes."""
    with full_stack(**SETTINGS) as stack, Client(stack.target, patience_s=0) as client:
        disk = Disk(stack.home, ROOM_MIB)
        start(stack)
        pids = {name: stack.pid(name) for name in ("gateway", "worker", "watchdog")}
        batch = client.submit_lines(lines(COUNT, vllm_xargs={"simulate": 0.5}))
        until(lambda: client.get(batch.id).counts.completed > 20, "part of the batch")
        disk.fill()
        error = until(lambda: refused(lambda: client.submit_lines(lines(500, filler="x" * 20_000))), "a refusal")
        assert error.code.name == "UNAVAILABLE", error
        assert "No space left on device" in error.message
        # Without space for the write-ahead log Postgres crashes, and cannot start again.
        stack.sql("SELECT pg_switch_wal()")
        until(lambda: not stack.pid("postgres"), "Postgres to crash")
        until(lambda: "database unavailable" in client.accepting(), "the gateway to report it")
        until(lambda: stack.status().verdict == rpb.VERDICT_DATABASE_AWAY, "the watchdog to see it")
        disk.resize(ROOM_MIB)
        check_done(stack, batch)
        assert {name: stack.pid(name) for name in pids} == pids
        assert stack.restarts() == []


@pytest.mark.thorough
def test_home_without_postgres(mounts: None, database_url: str) -> None:
    """With Postgres elsewhere and the home full, a dead worker is restarted without log, journal and evidence; logging
    resumes once there is space."""
    with full_stack(**SETTINGS, DATABASE_URL=database_url) as stack, Client(stack.target, patience_s=0) as client:
        disk = Disk(stack.home, ROOM_MIB)
        start(stack)
        batch = client.submit_lines(lines(COUNT, vllm_xargs={"simulate": 0.5}))
        until(lambda: client.get(batch.id).counts.completed > 20, "part of the batch")
        disk.fill()
        with pytest.raises(OSError, match="No space left"):
            (stack.home / "log" / "more").write_bytes(b"x" * 10_000)
        os.kill(stack.pid("worker"), signal.SIGKILL)
        until(lambda: stack.recovered(1), "the worker to be back")
        os.kill(stack.pid("watchdog"), signal.SIGKILL)
        until(lambda: stack.recovered(1), "the watchdog to know of it")
        check_done(stack, batch)
        disk.resize(ROOM_MIB)
        mark = stack.mark("worker")
        stack.supervisorctl("restart", "worker")
        until(lambda: stack.events("worker", "phase_entered", mark), "logs to be written again")
        assert [(event.verdict, event.outcome) for event in stack.restarts()] == [(rpb.VERDICT_CRASHED, "recovered")]


@pytest.mark.thorough
def test_home_on_a_disk_that_fails(mounts: None, tmp_path: Path) -> None:
    """When the disk of the embedded Postgres turns read-only, clients are told why and nothing healthy is restarted;
    after the repair and a new start the batch completes."""
    with full_stack(**SETTINGS) as stack, Client(stack.target, patience_s=0) as client:
        disk = FailingDisk(tmp_path / "image", stack.home, ROOM_MIB)
        start(stack)
        batch = client.submit_lines(lines(COUNT, vllm_xargs={"simulate": 0.5}))
        until(lambda: client.get(batch.id).counts.completed > 20, "part of the batch")
        pids = {name: stack.pid(name) for name in ("gateway", "worker", "watchdog")}
        disk.fail()
        error = until(lambda: refused(lambda: client.submit_lines(lines(3))), "a refusal")
        assert error.code.name == "UNAVAILABLE", error
        until(lambda: "database unavailable" in client.accepting(), "the gateway to report it")
        until(lambda: stack.status().verdict == rpb.VERDICT_DATABASE_AWAY, "the watchdog to see it")
        assert {name: stack.pid(name) for name in pids} == pids
        stopped = stack.script("stop-all.sh")
        assert stopped.returncode == 0, stopped.stdout + stopped.stderr
        disk.repair()
        start(stack)
        check_done(stack, batch)


@pytest.mark.thorough
def test_home_that_fails_without_postgres(mounts: None, database_url: str, tmp_path: Path) -> None:
    """With Postgres elsewhere, the batch goes on when the home turns read-only; a worker that dies cannot be started,
    as its log cannot be opened, and its status says so; after the repair the batch completes."""
    with full_stack(**SETTINGS, DATABASE_URL=database_url) as stack, Client(stack.target, patience_s=0) as client:
        disk = FailingDisk(tmp_path / "image", stack.home, ROOM_MIB)
        start(stack)
        batch = client.submit_lines(lines(COUNT, vllm_xargs={"simulate": 0.5}))
        disk.fail()
        until(lambda: client.get(batch.id).counts.completed > 20, "the batch to go on")
        os.kill(stack.pid("worker"), signal.SIGKILL)
        until(lambda: "making dispatchers for 'worker': EROFS" in stack.status().reason, "the status to say why")
        assert stack.script("stop-all.sh").returncode == 0
        disk.repair()
        start(stack)
        check_done(stack, batch)
