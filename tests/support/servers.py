"""Postgres, gateway and workers (with the simulated engine) as processes without supervisord."""

import json
import os
import signal
import socket
import subprocess
import sys
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

import psycopg2

from service import processes
from service.processes import Mark
from tests.support.ports import free_port
from tests.support.waiting import until
from vllm_batch import Client

ROOT = Path(__file__).resolve().parents[2]


class PostgresServer:
    """An embedded server in its own home. Other homes share its data; one of them runs it at a time.

    What it logs goes to `log`, if there is one, and otherwise to our own stderr.
    """

    log: Path | None = None

    def __init__(self, home: Path, *others: Path) -> None:
        self.homes = (home, *others)
        hosts = ",".join(f"{each}/run/pg" for each in self.homes)
        self.url = f"postgresql:///%s?host={hosts}&user=postgres"
        for other in others:
            (other / "pgdata").symlink_to(home / "pgdata")
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, home: Path | None = None) -> None:
        """Starts it as users do, and waits until it answers."""
        env = os.environ | {"BATCH_HOME": str(home or self.homes[0]), "BATCH_ENV_FILE": "/dev/null"}
        command = [sys.executable, "-m", "service.embedded_postgres"]
        with self.log.open("ab") if self.log else nullcontext() as log:
            self.process = process = subprocess.Popen(command, env=env, cwd=ROOT, stderr=log)

        def answers() -> bool:
            assert process.poll() is None, "the embedded Postgres ended"
            try:
                psycopg2.connect(self.url % "batch", connect_timeout=2).close()
            except psycopg2.OperationalError:
                return False
            return True

        until(answers, "the embedded Postgres to answer")

    def stop(self) -> None:
        """Shuts the server down."""
        assert self.process is not None
        self.process.send_signal(signal.SIGINT)
        self.process.wait(30)


@contextmanager
def new_database(postgres: str, template: str = "batch") -> Iterator[str]:
    """Creates a database from the template, which has the schema and no rows; drops it afterwards."""
    name = f"test_{uuid.uuid4().hex}"
    admin = psycopg2.connect(postgres % "postgres")
    admin.autocommit = True
    with admin.cursor() as cursor:
        cursor.execute(f"CREATE DATABASE {name} TEMPLATE {template}")
    yield postgres % name
    with admin.cursor() as cursor:
        cursor.execute(f"DROP DATABASE {name} WITH (FORCE)")
    admin.close()


class Server:
    """One process: the gateway, or a worker with the simulated engine."""

    def __init__(self, module: str, env: dict[str, str], log: Path, prefix: Sequence[str] = ()) -> None:
        self._arguments = [*prefix, sys.executable, "-m", module]
        self._env = env
        self.log = log
        # Where in its log `events` begins.
        self.mark = 0
        self.port = int(env.get("BATCH_WORKER_PORT", 0))
        self.process = self.start()

    def start(self) -> "subprocess.Popen[bytes]":
        """Starts the process, or starts it again."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self._arguments, env=self._env, cwd=ROOT, stdout=log, stderr=log)
        return self.process

    def events(self, name: str) -> list[dict[str, object]]:
        """Returns the events of this name in its log, from `mark` on."""
        lines = [line for line in self.log.read_bytes()[self.mark :].decode().splitlines() if line.startswith("{")]
        return [event for event in map(json.loads, lines) if event.get("event") == name]

    def arm(self, failpoint: str) -> None:
        """Makes the next start die at this failpoint."""
        self._env["BATCH_FAILPOINT"] = failpoint

    def disarm(self) -> None:
        """Makes the next start run without failpoint."""
        self._env.pop("BATCH_FAILPOINT", None)

    def kill(self) -> None:
        """Sends SIGKILL and waits."""
        self.process.kill()
        self.process.wait(10)

    def terminate(self) -> int:
        """Sends SIGTERM and waits. Returns the exit status."""
        self.process.terminate()
        return self.process.wait(30)


@dataclass
class Stack:
    """A gateway and workers with their own database, without supervisord."""

    database_url: str
    folder: Path
    gateway_port: int
    servers: list[Server]
    http_port: int = 0
    # Where its processes listen, and what their commands begin with.
    host: str = "127.0.0.1"
    prefix: Sequence[str] = ()

    @property
    def target(self) -> str:
        """Address of the gateway."""
        return f"{self.host}:{self.gateway_port}"

    def run(self, module: str, name: str, **settings: object) -> Server:
        """Starts a process with these settings (names without prefix)."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith("BATCH_") and k != "SENTRY_DSN"}
        env = kept | {
            "BATCH_ENV_FILE": "/dev/null",
            "DATABASE_URL": self.database_url,
            "BATCH_HOME": str(self.folder),
            "BATCH_HOST": self.host,
            "BATCH_ENGINE": "simulated",
            "BATCH_GATEWAY_PORT": str(self.gateway_port),
            "BATCH_GATEWAY_METRICS_PORT": "0",
            "BATCH_WORKER_METRICS_PORT": "0",
            "BATCH_HTTP_METRICS_PORT": "0",
            "BATCH_HEARTBEAT_INTERVAL_S": "0.2",
            "SUPERVISOR_PROCESS_NAME": name,
        }
        env |= {f"BATCH_{key.upper()}": str(value) for key, value in settings.items()}
        self.servers.append(Server(module, env, self.folder / f"{name}.log", self.prefix))
        return self.servers[-1]

    def worker(self, name: str = "worker", **settings: object) -> Server:
        """Starts a worker on a free port."""
        return self.run("service.worker", name, worker_port=free_port(), **settings)

    def gateway(self, **settings: object) -> Server:
        """Starts the gateway."""
        return self.run("service.gateway", "gateway", **settings)

    def http(self, **settings: object) -> Server:
        """Starts OpenAI's door, and waits until it answers."""
        self.http_port = self.http_port or free_port()
        server = self.run("service.http", "http", http_port=self.http_port, **settings)

        def answers() -> bool:
            assert server.process.poll() is None, server.log.read_text()
            with suppress(OSError), socket.create_connection((self.host, self.http_port), 1):
                return True
            return False

        until(answers, "the HTTP door")
        return server

    @property
    def base_url(self) -> str:
        """What an OpenAI client is given."""
        return f"http://{self.host}:{self.http_port}/v1"

    def wait_until_accepting(self) -> None:
        """Waits until new work is accepted."""

        def accepts() -> bool:
            ended = [server.log.stem for server in self.servers if server.process.poll() is not None]
            assert not ended, f"{', '.join(ended)} ended"
            return not client.accepting()

        with Client(self.target, patience_s=0) as client:
            try:
                until(accepts, "the gateway to accept new work")
            except AssertionError as error:
                raise AssertionError(f"{error}: {client.accepting()}\n{self.logs()}") from None

    def logs(self) -> str:
        """The end of each log, for failure messages."""
        return "\n".join(f"== {log.name}\n{log.read_text()[-3000:]}" for log in sorted(self.folder.glob("*.log")))

    def end(self) -> None:
        """Ends all processes, including the engines of killed workers."""
        for server in self.servers:
            if server.process.poll() is None:
                server.kill()
        assert not processes.end(processes.marked(Mark(self.folder)), 10, (signal.SIGKILL,))


@contextmanager
def new_stack(postgres: str, folder: Path) -> Iterator[Stack]:
    """Yields a stack with a database of its own that has started nothing; ends whatever it then runs."""
    with new_database(postgres) as url:
        stack = Stack(url, folder, free_port(), [])
        try:
            yield stack
        finally:
            stack.end()
