"""Postgres restarts, goes away, is slow, moves: nobody ends, nothing is lost, and the logs stay readable."""

import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import psycopg2
import pytest

from service.db.connection import Database, migrate
from tests.integration.conftest import PostgresServer, Stack
from tests.integration.test_front_door import lines, refused
from tests.ports import free_port
from tests.waiting import until
from vllm_batch.client import Client
from vllm_batch.v1 import batch_service_pb2 as pb

COUNT = 3000
TIMEOUT_S = 1.0


@pytest.fixture
def server() -> Iterator[PostgresServer]:
    """A Postgres that the test may harm, with a second address."""
    with tempfile.TemporaryDirectory(prefix="vbt-", ignore_cleanup_errors=True) as folder:
        homes = (Path(folder) / "a", Path(folder) / "b")
        for home in homes:
            home.mkdir()
        server = PostgresServer(*homes)
        server.start()
        yield server
        server.stop()


@pytest.fixture
def running(server: PostgresServer, tmp_path: Path) -> Iterator[tuple[Stack, Client, pb.Batch]]:
    """Gateway and worker in the middle of a batch."""
    stack = Stack(server.url % "batch", tmp_path, free_port(), [])
    try:
        # For a gateway a database without its schema is as good as none.
        database = Database(stack.database_url, "test")
        database.call(migrate)
        database.close()
        stack.gateway(database_timeout_s=TIMEOUT_S)
        stack.worker(database_timeout_s=TIMEOUT_S, window=100)
        stack.wait_until_accepting()
        with Client(stack.target, patience_s=90) as client:
            batch = client.submit_lines(lines(COUNT, vllm_xargs={"simulate": 0.1}))
            until(lambda: client.get(batch.id).counts.completed > 100, "part of the batch")
            yield stack, client, batch
    finally:
        stack.end()


def check_all_done(stack: Stack, client: Client, batch: pb.Batch, outages: int) -> None:
    """Every request once, both processes still in their first life, and a line per outage in each log."""
    *_, done = client.watch(batch.id)
    assert (done.state, done.counts.completed) == (pb.BATCH_STATE_COMPLETED, COUNT)
    found = [result.custom_id for result in client.results(batch.id)]
    assert found == [f"c{number}" for number in range(COUNT)]
    for process in stack.servers:
        assert process.process.poll() is None
        # Each part of a process that uses Postgres says once that it is away and once that it is back.
        for name in ("database_away", "database_back"):
            by_part = [event["subject"] for event in process.events(name)]
            assert all(by_part.count(part) <= outages for part in by_part), by_part


def until_noticed(stack: Stack) -> None:
    """Until gateway and worker know that it is away."""
    for process in stack.servers:
        until(lambda process=process: process.events("database_away"), "the outage to be noticed", 15)  # type: ignore[misc]


def test_restart(server: PostgresServer, running: tuple[Stack, Client, pb.Batch]) -> None:
    """A restart of Postgres in the middle of a batch costs nothing but time."""
    server.stop()
    server.start()
    check_all_done(*running, outages=1)


def test_outage(server: PostgresServer, running: tuple[Stack, Client, pb.Batch]) -> None:
    """While it is away the worker holds a bounded number of results, new work is refused with the reason."""
    stack, _, _ = running
    server.stop()
    until_noticed(stack)
    with Client(stack.target, patience_s=0) as hasty:
        error = until(lambda: refused(lambda: hasty.submit_lines(lines(1))), "a refusal")
        assert error.reason == "DATABASE_UNAVAILABLE"
    # Until the worker has nothing left to do but to hold results.
    worker = psutil.Process(stack.servers[1].process.pid)
    until(lambda: worker.cpu_percent(0.5) < 20, "the worker to have run out of work")
    assert worker.memory_info().rss < 400 << 20
    server.start()
    check_all_done(*running, outages=1)


def test_frozen(server: PostgresServer, running: tuple[Stack, Client, pb.Batch]) -> None:
    """A Postgres that stands still without a word is noticed by the deadlines, and is no loss when it goes on."""
    assert server.process is not None
    postmaster = psutil.Process(server.process.pid)
    family = [postmaster, *postmaster.children(recursive=True)]
    for process in family:
        process.suspend()
    try:
        until_noticed(running[0])
    finally:
        for process in family:
            process.resume()
    check_all_done(*running, outages=2)


def test_slow(server: PostgresServer, running: tuple[Stack, Client, pb.Batch]) -> None:
    """Statements that take longer than their deadline are tried again until they pass."""
    stack, _, _ = running
    blocker = psycopg2.connect(server.url % "batch")
    with blocker.cursor() as cursor:
        cursor.execute("LOCK TABLE results IN ACCESS EXCLUSIVE MODE")
        until(lambda: stack.servers[1].events("database_away"), "a write to miss its deadline")
    blocker.close()
    check_all_done(*running, outages=2)


def test_failover(server: PostgresServer, running: tuple[Stack, Client, pb.Batch]) -> None:
    """With several hosts in DATABASE_URL, the one that serves now is found."""
    assert server.process is not None
    server.process.send_signal(signal.SIGKILL)
    server.process.wait(10)
    server.start(server.homes[1])
    check_all_done(*running, outages=1)
