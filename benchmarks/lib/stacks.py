"""What is measured: a whole stack, started by the users' scripts, or a Postgres alone; and psql for either."""

import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import psycopg2

from service.db.connection import Database, migrate
from service.embedded_postgres import binaries
from tests.support.servers import PostgresServer
from tests.support.stacks import ROOT, FullStack, full_stack

TIMEOUT_S = 3600


@contextmanager
def started(**settings: str) -> Iterator[FullStack]:
    """A stack that accepts new work; stopped and removed at the end."""
    with full_stack(BATCH_LOG_LEVEL="WARNING", **settings) as stack:
        done = stack.script("start-all.sh")
        if done.returncode != 0:
            raise RuntimeError(done.stdout + done.stderr + stack.logs())
        yield stack


def simulated(**settings: str) -> Any:
    """`started` with the simulated engine: everything but the model is real."""
    return started(BATCH_ENGINE="simulated", **settings)


@contextmanager
def postgres(*names: str) -> Iterator[dict[str, Database]]:
    """The embedded Postgres alone, with these databases."""
    with tempfile.TemporaryDirectory(prefix="vbb-", ignore_cleanup_errors=True) as home:
        server = PostgresServer(Path(home))
        server.start()
        try:
            admin = psycopg2.connect(server.url % "postgres")
            admin.autocommit = True
            for name in names:
                admin.cursor().execute(f"CREATE DATABASE {name}")
            admin.close()
            databases = {name: Database(server.url % name, "benchmark", TIMEOUT_S) for name in names}
            for database in databases.values():
                database.call(migrate)
            yield databases
            for database in databases.values():
                database.close()
        finally:
            server.stop()


def url(stack: FullStack) -> str:
    """The URL of the stack's Postgres."""
    return f"postgresql:///batch?host={stack.home}/run/pg&user=postgres"


def psql(stack: FullStack, command: str) -> str:
    """Runs a psql command, including ones like `\\copy`, on the stack's Postgres. Returns its output."""
    arguments = [str(binaries() / "psql"), "-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-c", command, url(stack)]
    return subprocess.run(arguments, capture_output=True, text=True, check=True, timeout=TIMEOUT_S).stdout


def python(code: str, *arguments: str) -> Any:
    """Runs code in a process with memory of its own. Returns the JSON that it prints."""
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S)
    if done.returncode != 0:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout)


def processor_s(pid: int) -> float:
    """The processor time that a process and its descendants have used, in seconds, also those that have ended."""
    process, spent_s = psutil.Process(pid), 0.0
    for each in (process, *process.children(recursive=True)):
        # Connections to Postgres come and go.
        with contextlib.suppress(psutil.NoSuchProcess):
            spent_s += sum(each.cpu_times()[:4])
    return spent_s
