"""How many connections to Postgres a host takes: few at rest, and never more than docs/capacity.md says."""

import threading
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import psycopg2
import pytest
from psycopg2.extensions import connection as Connection

from service.db.connection import Database, check_schema, migrate
from tests.support.batches import lines
from tests.support.stacks import FullStack, full_stack
from tests.support.waiting import until
from vllm_batch import Client

# A host with a gateway, http, a watchdog and one worker.
MOST, AT_REST = 12, 5
CLIENTS = 8
# Batches of each client.
ROUNDS = 5
PROGRAMS = {"gateway", "http", "watchdog", "worker", "heart"}


@contextmanager
def limited(postgres: str, most: int) -> Iterator[str]:
    """The URL of an empty database, for a role of which Postgres takes so many connections."""
    name = f"test_{uuid.uuid4().hex}"
    admin = psycopg2.connect(postgres % "postgres")
    admin.autocommit = True
    with ExitStack() as ending:
        ending.callback(admin.close)
        cursor = ending.enter_context(admin.cursor())
        cursor.execute(f"CREATE ROLE {name} LOGIN CONNECTION LIMIT {most}")
        ending.callback(lambda: cursor.execute(f"DROP ROLE {name}"))
        cursor.execute(f"CREATE DATABASE {name} OWNER {name}")
        ending.callback(lambda: cursor.execute(f"DROP DATABASE {name} WITH (FORCE)"))
        yield (postgres % name).replace("user=postgres", f"user={name}")


@pytest.fixture(scope="module")
def host(postgres: str) -> Iterator[FullStack]:
    """All programs of one host, under a role of which Postgres takes as many connections as a host may need."""
    with limited(postgres, MOST) as url, full_stack(BATCH_ENGINE="simulated", DATABASE_URL=url) as stack:
        stack.start_all()
        yield stack


@pytest.fixture
def counted(postgres: str, host: FullStack) -> Iterator[Callable[[], dict[str, int]]]:
    """Counts the connections of each program."""
    connection: Connection = psycopg2.connect(postgres % "postgres")
    connection.autocommit = True
    name = host.env["DATABASE_URL"].rpartition("user=")[2]

    def count() -> dict[str, int]:
        with connection.cursor() as cursor:
            cursor.execute(
                "SELECT split_part(application_name, '-', 3), count(*)::int FROM pg_stat_activity WHERE usename = %s"
                " GROUP BY 1",
                (name,),
            )
            return dict(cursor.fetchall())

    yield count
    connection.close()


@contextmanager
def load(stack: FullStack) -> Iterator[list[threading.Thread]]:
    """Clients that create batches, read them, and call OpenAI's door, all at once. Fails if a call of theirs does."""
    failures: list[Exception] = []

    def use() -> None:
        try:
            with Client(stack.target, patience_s=0) as client:
                for _ in range(ROUNDS):
                    batch = client.submit_lines(lines(100))
                    assert len(list(client.results(batch.id, follow=True))) == 100
                    with urllib.request.urlopen(f"http://127.0.0.1:{stack.http_port}/v1/batches", timeout=60) as page:
                        assert page.status == 200
        except Exception as error:  # noqa: BLE001 - told below
            failures.append(error)

    threads = [threading.Thread(target=use) for _ in range(CLIENTS)]
    for thread in threads:
        thread.start()
    yield threads
    for thread in threads:
        thread.join()
    assert not failures, failures


def test_no_program_takes_more_than_its_own(postgres: str) -> None:
    """A program keeps to its number of connections also when it starts and looks for a pooler."""
    with limited(postgres, 1) as url:
        database = Database(url, "test", connections=1)
        database.call(migrate)
        database.call(check_schema)
        database.close()


@pytest.mark.thorough
def test_a_host_under_load(host: FullStack, counted: Callable[[], dict[str, int]]) -> None:
    """With everything under load a host does with the connections that it is said to need: no call is refused one."""
    most: dict[str, int] = {}

    def is_over() -> bool:
        most.update({name: max(number, most.get(name, 0)) for name, number in counted().items()})
        return not any(thread.is_alive() for thread in threads)

    marks = {name: host.mark(name) for name in ("gateway", "http", "watchdog", "worker")}
    with load(host) as threads:
        until(is_over, "the load to end")
    assert set(most) >= PROGRAMS
    assert sum(number for name, number in most.items() if name in PROGRAMS) <= MOST, most
    for program, mark in marks.items():
        assert not host.events(program, "database_away", mark)


@pytest.mark.thorough
def test_a_host_at_rest(host: FullStack, counted: Callable[[], dict[str, int]]) -> None:
    """Without work, a host gives back all connections but a few, and the worker keeps that of its heart."""
    until(lambda: sum(counted().values()) <= AT_REST, "connections to be closed", 60)
    assert counted()["heart"] == 1
