"""Postgres restarts, disappears, slows down or moves: no process ends, nothing is lost, and the logs stay readable."""

import contextlib
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import psycopg2
import pytest

from service.db.connection import Database, migrate
from tests.support.batches import lines, refused
from tests.support.ports import free_port
from tests.support.servers import PostgresServer, Stack
from tests.support.waiting import until
from vllm_batch import Client
from vllm_batch.v1 import batch_service_pb2 as pb

COUNT = 3000
TIMEOUT_S = 1.0


@pytest.fixture
def server() -> Iterator[PostgresServer]:
    """A Postgres that the test may stop or freeze, with a second address."""
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
        # For a gateway, a database without its schema counts as away.
        database = Database(stack.database_url, "test")
        database.call(migrate)
        database.close()
        stack.gateway(database_timeout_s=TIMEOUT_S)
        # No lease runs out here: what is lost in an outage has to be found otherwise.
        stack.worker(database_timeout_s=TIMEOUT_S, window=100, lease_s=3600, drain_timeout_s=1)
        stack.wait_until_accepting()
        with Client(stack.target, patience_s=90) as client:
            batch = client.submit_lines(lines(COUNT, vllm_xargs={"simulate": 0.1}))
            until(lambda: client.get(batch.id).counts.completed > 100, "part of the batch")
            yield stack, client, batch
    finally:
        stack.end()


def check_all_done(stack: Stack, client: Client, batch: pb.Batch, outages: int) -> None:
    """Checks that every request has one result, no process has ended, and each outage is logged once per part."""
    *_, done = client.watch(batch.id)
    assert (done.state, done.counts.completed) == (pb.BATCH_STATE_COMPLETED, COUNT)
    found = [result.custom_id for result in client.results(batch.id)]
    assert found == [f"c{number}" for number in range(COUNT)]
    for process in stack.servers:
        assert process.process.poll() is None
        # Each part of a process that uses Postgres logs once that it is away and once that it is back.
        for name in ("database_away", "database_back"):
            by_part = [event["subject"] for event in process.events(name)]
            assert all(by_part.count(part) <= outages for part in by_part), by_part


def until_noticed(stack: Stack) -> None:
    """Waits until gateway and worker have noticed that Postgres is away."""
    for process in stack.servers:
        until(lambda process=process: process.events("database_away"), "the outage to be noticed", 15)  # type: ignore[misc]


@pytest.mark.thorough
def test_restart(server: PostgresServer, running: tuple[Stack, Client, pb.Batch]) -> None:
    """A restart of Postgres in the middle of a batch loses nothing."""
    server.stop()
    server.start()
    check_all_done(*running, outages=1)


def test_outage(server: PostgresServer, running: tuple[Stack, Client, pb.Batch]) -> None:
    """While Postgres is away the worker's memory stays bounded, new work is refused with the reason, and watchers are
    told."""
    stack, client, batch = running
    watched = client.watch(batch.id)
    next(watched)
    server.stop()
    until_noticed(stack)
    assert any(each.wait.reason == pb.WAIT_REASON_DATABASE_AWAY for each in watched)
    with Client(stack.target, patience_s=0) as hasty:
        error = until(lambda: refused(lambda: hasty.submit_lines(lines(1))), "a refusal")
        assert error.reason == "DATABASE_UNAVAILABLE"
    # Until the worker has nothing left to do but hold results.
    worker = psutil.Process(stack.servers[1].process.pid)
    until(lambda: worker.cpu_percent(0.5) < 20, "the worker to have run out of work")
    assert worker.memory_info().rss < 400 << 20
    server.start()
    check_all_done(*running, outages=1)


def test_a_worker_that_ends_during_an_outage(server: PostgresServer, running: tuple[Stack, Client, pb.Batch]) -> None:
    """What a worker held that was stopped while Postgres was away is put back by its next life, and counts no death."""
    stack, client, batch = running
    server.stop()
    until_noticed(stack)
    worker = stack.servers[1]
    worker.terminate()
    server.start()
    worker.start()
    until(lambda: len(worker.events("identity_locked")) == 2, "the next life")
    *_, last = worker.events("identity_locked")
    assert last["put_back"]
    assert not last["suspects"]
    *_, done = client.watch(batch.id)
    assert (done.state, done.counts.completed) == (pb.BATCH_STATE_COMPLETED, COUNT)
    with contextlib.closing(psycopg2.connect(stack.database_url)) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT count(*) FROM chunks WHERE deaths > 0")
        assert cursor.fetchone() == (0,)


@pytest.mark.thorough
def test_frozen(server: PostgresServer, running: tuple[Stack, Client, pb.Batch]) -> None:
    """A Postgres that hangs is detected by deadlines, and nothing is lost once it continues."""
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


@pytest.mark.thorough
def test_slow(server: PostgresServer, running: tuple[Stack, Client, pb.Batch]) -> None:
    """Statements that miss their deadline are retried until they succeed."""
    stack, _, _ = running
    blocker = psycopg2.connect(server.url % "batch")
    with blocker.cursor() as cursor:
        cursor.execute("LOCK TABLE results IN ACCESS EXCLUSIVE MODE")
        until(lambda: stack.servers[1].events("database_away"), "a write to miss its deadline")
    blocker.close()
    check_all_done(*running, outages=2)


def test_a_socket_that_is_deleted(server: PostgresServer, running: tuple[Stack, Client, pb.Batch]) -> None:
    """Sessions that are open go on when the socket of Postgres is gone; without them it is an outage, which ends."""
    stack, client, batch = running
    path = server.homes[0] / "run" / "pg" / ".s.PGSQL.5432"
    with contextlib.closing(psycopg2.connect(stack.database_url)) as connection, connection.cursor() as cursor:
        path.rename(kept := path.with_name("kept"))
        before = client.get(batch.id).counts.completed
        until(lambda: client.get(batch.id).counts.completed > before, "more of the batch")
        cursor.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE 'vllm-batch%'"
        )
    until_noticed(stack)
    with Client(stack.target, patience_s=0) as hasty:
        until(lambda: "No such file or directory" in hasty.accepting(), "the cause")
    kept.rename(path)
    check_all_done(*running, outages=1)


def test_a_database_that_is_made_again(server: PostgresServer, running: tuple[Stack, Client, pb.Batch]) -> None:
    """While a database is gone, and while it is there again and empty, it is away, and nobody makes tables in it that a
    restore would meet. With tables, all programs go on; what was stored is gone."""
    stack, _, batch = running
    with contextlib.closing(psycopg2.connect(server.url % "postgres")) as connection, connection.cursor() as cursor:
        connection.autocommit = True
        cursor.execute("DROP DATABASE batch WITH (FORCE)")
        with Client(stack.target, patience_s=0) as client:
            until(lambda: 'database "batch" does not exist' in client.accepting(), "the outage to be told")
            cursor.execute("CREATE DATABASE batch ENCODING 'UTF8' TEMPLATE template0")
            until(lambda: 'relation "heartbeats" does not exist' in client.accepting(), "the empty one to be told")
            until(lambda: r"relation \"chunks\"" in stack.servers[1].log.read_text(), "the worker to meet it")
            database = Database(stack.database_url, "test")
            assert database.call(lambda db: db.get_tables()) == []
            database.call(migrate)
            database.close()
            stack.wait_until_accepting()
            assert refused(lambda: client.get(batch.id)).code.name == "NOT_FOUND"
            *_, done = client.watch(client.submit_lines(lines(10)).id)
            assert done.counts.completed == 10
    assert [process.process.poll() for process in stack.servers] == [None, None]


def test_failover(server: PostgresServer, running: tuple[Stack, Client, pb.Batch]) -> None:
    """With several hosts in DATABASE_URL, processes find the one that serves after a failover."""
    assert server.process is not None
    server.process.send_signal(signal.SIGKILL)
    server.process.wait(10)
    server.start(server.homes[1])
    # A statement that outlives the killed postmaster may succeed after another connection has failed.
    check_all_done(*running, outages=2)
