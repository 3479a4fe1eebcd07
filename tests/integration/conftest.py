"""Real Postgres for all, a fresh database for each test."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psycopg2
import pytest

from service import processes
from service.db.connection import Database, migrate
from service.processes import Mark
from tests.ports import free_port
from tests.waiting import until
from vllm_batch.client import Client

ROOT = Path(__file__).resolve().parents[2]


class PostgresServer:
    """An embedded server in a home of its own; `homes` may be several that share its data, of which one serves."""

    def __init__(self, home: Path, *others: Path) -> None:
        self.homes = (home, *others)
        hosts = ",".join(f"{each}/run/pg" for each in self.homes)
        self.url = f"postgresql:///%s?host={hosts}&user=postgres"
        for other in others:
            (other / "pgdata").symlink_to(home / "pgdata")
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, home: Path | None = None) -> None:
        """Starts it as users' is, and waits until it answers."""
        env = os.environ | {"BATCH_HOME": str(home or self.homes[0]), "BATCH_ENV_FILE": "/dev/null"}
        self.process = process = subprocess.Popen([sys.executable, "-m", "service.postgres"], env=env, cwd=ROOT)

        def answers() -> bool:
            assert process.poll() is None, "the embedded Postgres ended"
            try:
                psycopg2.connect(self.url % "batch", connect_timeout=2).close()
            except psycopg2.OperationalError:
                return False
            return True

        until(answers, "the embedded Postgres")

    def stop(self) -> None:
        """Shuts it down."""
        assert self.process is not None
        self.process.send_signal(signal.SIGINT)
        self.process.wait(30)


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """URL of an embedded server without its database name."""
    # Not pytest's folder: that is deep, and a socket's path is short.
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


@contextmanager
def new_database(postgres: str, template: str = "batch") -> Iterator[str]:
    """A database of its own on the server, like the template: with the schema and nothing in it."""
    name = f"test_{uuid.uuid4().hex}"
    admin = psycopg2.connect(postgres % "postgres")
    admin.autocommit = True
    with admin.cursor() as cursor:
        cursor.execute(f"CREATE DATABASE {name} TEMPLATE {template}")
    yield postgres % name
    with admin.cursor() as cursor:
        cursor.execute(f"DROP DATABASE {name} WITH (FORCE)")
    admin.close()


@pytest.fixture
def database_url(postgres: str) -> Iterator[str]:
    """A database for one test."""
    with new_database(postgres) as url:
        yield url


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    """Connections to the test's database."""
    database = Database(database_url, "test")
    yield database
    database.close()


class Server:
    """One process of ours: the gateway or a worker with the simulated engine."""

    def __init__(self, module: str, env: dict[str, str], log: Path) -> None:
        self._arguments = [sys.executable, "-m", module]
        self._env = env
        self.log = log
        self.port = int(env.get("BATCH_WORKER_PORT", 0))
        self.process = self.start()

    def start(self) -> "subprocess.Popen[bytes]":
        """Starts it, or another life of it."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self._arguments, env=self._env, cwd=ROOT, stdout=log, stderr=log)
        return self.process

    def events(self, name: str) -> list[dict[str, object]]:
        """What it has logged under a name."""
        lines = [line for line in self.log.read_text().splitlines() if line.startswith("{")]
        return [event for event in map(json.loads, lines) if event.get("event") == name]

    def arm(self, failpoint: str) -> None:
        """The next life dies there."""
        self._env["BATCH_FAILPOINT"] = failpoint

    def disarm(self) -> None:
        """The next life has no failpoint."""
        self._env.pop("BATCH_FAILPOINT", None)

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.wait(10)

    def terminate(self) -> int:
        """SIGTERM; the exit status."""
        self.process.terminate()
        return self.process.wait(30)


@dataclass
class Stack:
    """A gateway and workers on a database of their own, without supervisord."""

    database_url: str
    folder: Path
    gateway_port: int
    servers: list[Server]

    @property
    def target(self) -> str:
        """Address of the gateway."""
        return f"127.0.0.1:{self.gateway_port}"

    def run(self, module: str, name: str, **settings: object) -> Server:
        """Starts a process with these settings (without their prefix)."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith("BATCH_") and k != "SENTRY_DSN"}
        env = kept | {
            "BATCH_ENV_FILE": "/dev/null",
            "DATABASE_URL": self.database_url,
            "BATCH_HOME": str(self.folder),
            "BATCH_ENGINE": "simulated",
            "BATCH_GATEWAY_PORT": str(self.gateway_port),
            "BATCH_GATEWAY_METRICS_PORT": "0",
            "BATCH_WORKER_METRICS_PORT": "0",
            "BATCH_HEARTBEAT_INTERVAL_S": "0.2",
            "SUPERVISOR_PROCESS_NAME": name,
        }
        env |= {f"BATCH_{key.upper()}": str(value) for key, value in settings.items()}
        self.servers.append(Server(module, env, self.folder / f"{name}.log"))
        return self.servers[-1]

    def worker(self, name: str = "worker", **settings: object) -> Server:
        """Starts a worker on a port of its own."""
        return self.run("service.worker", name, worker_port=free_port(), **settings)

    def gateway(self, **settings: object) -> Server:
        """Starts the gateway."""
        return self.run("service.gateway", "gateway", **settings)

    def wait_until_accepting(self) -> None:
        """Waits until new work would be accepted."""

        def accepts() -> bool:
            ended = [server.log.stem for server in self.servers if server.process.poll() is not None]
            assert not ended, f"{', '.join(ended)} ended"
            return not client.accepting()

        with Client(self.target, patience_s=0) as client:
            try:
                until(accepts, "the gateway to accept new work")
            except AssertionError as error:
                logs = "\n".join(f"== {log.name}\n{log.read_text()[-3000:]}" for log in self.folder.glob("*.log"))
                raise AssertionError(f"{error}: {client.accepting()}\n{logs}") from None

    def end(self) -> None:
        """Ends all processes, also the engine of a worker that was killed."""
        for server in self.servers:
            if server.process.poll() is None:
                server.kill()
        assert not processes.end(processes.marked(Mark(self.folder)), 10, (signal.SIGKILL,))


@pytest.fixture
def stack(database_url: str, tmp_path: Path) -> Iterator[Stack]:
    """Processes are started by the test; all are ended after it."""
    stack = Stack(database_url, tmp_path, free_port(), [])
    yield stack
    stack.end()


@pytest.fixture
def serving(stack: Stack) -> Stack:
    """A gateway and one worker that accept new work."""
    stack.gateway()
    stack.worker()
    stack.wait_until_accepting()
    return stack


@pytest.fixture
def client(stack: Stack) -> Iterator[Client]:
    """A client that does not try again by itself."""
    with Client(stack.target, patience_s=0) as client:
        yield client
