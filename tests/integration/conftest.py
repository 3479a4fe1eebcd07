"""One real Postgres for all tests, with a fresh database for each."""

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.auth.callers import ANYBODY
from service.db.connection import Database, migrate
from service.rpc import call_context
from tests.conftest import HAS_FAILED
from tests.support.ports import free_port
from tests.support.servers import PostgresServer, Stack, new_database, new_stack
from tests.support.spare import Spare
from vllm_batch import Client

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """URL of an embedded server, with a placeholder for the database name."""
    # Not in pytest's folder: its path is too long for a socket.
    with tempfile.TemporaryDirectory(prefix="vbt-", ignore_cleanup_errors=True) as home:
        server = PostgresServer(Path(home))
        try:
            server.start()
            database = Database(server.url % "batch", "template")
            database.call(migrate)
            database.close()
            yield server.url
        finally:
            server.stop()


@pytest.fixture
def database_url(postgres: str) -> Iterator[str]:
    """A fresh database for one test."""
    with new_database(postgres) as url:
        yield url


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    """Connections to the test's database."""
    database = Database(database_url, "test")
    yield database
    database.close()


@pytest.fixture
def called_by_anybody() -> None:
    """Servicers that the test calls without a server serve a caller of whom no token is required."""
    call_context.begin("/test", ()).caller = ANYBODY


@pytest.fixture
def stack(request: pytest.FixtureRequest, database_url: str, tmp_path: Path) -> Iterator[Stack]:
    """A stack whose processes the test starts; all are ended after it. Of a test that failed, their logs are shown."""
    stack = Stack(database_url, tmp_path, free_port(), [])
    yield stack
    stack.end()
    if request.node.stash.get(HAS_FAILED, False):
        sys.stderr.write(stack.logs())


@pytest.fixture(scope="module")
def spare(postgres: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Spare]:
    """Serving stacks for the tests of a file: a start takes longer than most of them."""
    with Spare(postgres, lambda: tmp_path_factory.mktemp("stack")) as spare:
        yield spare


@pytest.fixture
def serving(stack: Stack, spare: Spare) -> Iterator[Stack]:
    """A gateway and one worker that accept new work, and no batches.

    They served earlier tests of the same file, unless one of those ended or joined a process.
    """
    spare.lend(stack)
    yield stack
    spare.take_back(stack)


@pytest.fixture
def client(stack: Stack) -> Iterator[Client]:
    """A client that does not retry."""
    with Client(stack.target, patience_s=0) as client:
        yield client


@pytest.fixture(scope="module")
def door(postgres: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """OpenAI's door and a gateway, which removes what is deleted; no worker."""
    with new_stack(postgres, tmp_path_factory.mktemp("door")) as stack:
        stack.http()
        stack.gateway()
        yield stack
