"""A process with more open files than select() supports."""

import os
import resource
from collections.abc import Iterator

import pytest

from service.db.connection import Database

FILES = 1100


@pytest.fixture
def many_files() -> Iterator[None]:
    """Opens as many files as a gateway with a thousand clients has."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2 * FILES), hard))
    first = os.open(os.devnull, os.O_RDONLY)
    files = [first, *(os.dup(first) for _ in range(FILES))]
    yield
    for file in files:
        os.close(file)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_database_with_many_files(many_files: None, database_url: str) -> None:
    """A database connection with a file number beyond select()'s limit is reused like any other."""
    database = Database(database_url, "test", connections=1)
    pids = [database.call(lambda db: db.execute_sql("SELECT pg_backend_pid()").fetchone()[0]) for _ in range(2)]
    database.close()
    assert pids[0] == pids[1]
