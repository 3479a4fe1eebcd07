"""A whole stack under supervisord, started and stopped by the scripts that users run."""

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import grpc
import psutil
import psycopg2

from service import processes
from service.auth import tokens
from service.auth.roles import Role
from service.processes import Mark
from tests.support.ports import free_port
from vllm_batch import Client
from vllm_batch.channel import open_channel
from vllm_batch.v1 import recovery_service_pb2 as rpb
from vllm_batch.v1 import recovery_service_pb2_grpc
from watchdog.supervisor import Supervisor

ROOT = Path(__file__).resolve().parents[2]
BIN = ROOT / ".venv" / "bin"


class FullStack:
    """A stack with its own home and ports."""

    def __init__(self, home: Path, settings: dict[str, str]) -> None:
        gateway, worker, watchdog, http = (free_port() for _ in range(4))
        self.home = home
        self.root, self.conf = ROOT, home / "supervisord.conf"
        # What the command of each script begins with.
        self.prefix: Sequence[str] = ()
        # Like supervisorctl, but without a process for each call.
        self.supervisor = Supervisor(f"unix://{home}/run/supervisor.sock", timeout_s=30)
        # Arguments of vllm_batch.channel for TLS and tokens.
        self.security: dict[str, str] = {}
        # Those of the tenants, if tokens are required.
        self.tokens: dict[str, str] = {}
        self.http_port = http
        host = settings.get("BATCH_HOST", "127.0.0.1")
        self.target, self.watchdog = f"{host}:{gateway}", f"{host}:{watchdog}"
        kept = {k: v for k, v in os.environ.items() if not k.startswith("BATCH_")}
        for name in ("DATABASE_URL", "SENTRY_DSN"):
            kept.pop(name, None)
        self.env = kept | {
            "BATCH_ENV_FILE": "/dev/null",
            "BATCH_HOME": str(home),
            "BATCH_GATEWAY_PORT": str(gateway),
            "BATCH_WORKER_PORT": str(worker),
            "BATCH_WATCHDOG_PORT": str(watchdog),
            "BATCH_HTTP_PORT": str(http),
            "BATCH_GATEWAY_METRICS_PORT": "0",
            "BATCH_WORKER_METRICS_PORT": "0",
            "BATCH_WATCHDOG_METRICS_PORT": "0",
            "BATCH_HTTP_METRICS_PORT": "0",
            **settings,
        }

    def require_tokens(self, *tenants: str) -> None:
        """Has the stack, not started yet, require tokens: an operator's, and one to submit with for each tenant."""
        folder = self.home / "keys"
        folder.mkdir(0o700)
        made = {name: tokens.new(name, Role.SUBMIT, "") for name in tenants}
        secret, operator = tokens.new("operator", Role.OPERATE, "")
        for name, text in (
            ("hashes", "".join(f"{token.line()}\n" for token in (operator, *(token for _, token in made.values())))),
            ("operator.token", f"{secret}\n"),
        ):
            (folder / name).touch(0o600)
            (folder / name).write_text(text)
        self.env |= {"BATCH_TOKEN_HASHES": f"{folder}/hashes", "BATCH_TOKEN_FILE": f"{folder}/operator.token"}
        self.security["token"] = secret
        self.tokens = {name: secret for name, (secret, _) in made.items()}

    def script(self, name: str, timeout_s: float = 300) -> "subprocess.CompletedProcess[str]":
        """Runs one of the scripts as a user would."""
        return subprocess.run(
            [*self.prefix, self.root / "scripts" / name],
            env=self.env,
            cwd="/",
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )

    def start_all(self) -> None:
        """Starts the stack, and waits until it accepts new work."""
        started = self.script("start-all.sh")
        assert started.returncode == 0, started.stdout + started.stderr + self.logs()

    def supervisorctl(self, *arguments: str) -> str:
        """Runs supervisorctl with an empty environment. Returns its output."""
        command = [str(BIN / "supervisorctl"), "-c", str(self.conf), *arguments]
        return subprocess.run(command, env={}, cwd=self.root, capture_output=True, text=True, timeout=120).stdout

    def pid(self, program: str) -> int:
        """Returns a program's pid, 0 if it has none; without a name supervisord's. Raises SupervisorAwayError."""
        if not program:
            return int((self.home / "run/supervisord.pid").read_text())
        return self.supervisor.info(program).pid

    def status(self, program: str = "worker") -> rpb.WorkerStatus:
        """Returns the watchdog's status of the worker, the gateway or http."""
        with open_channel(self.watchdog, **self.security) as channel:
            stub = recovery_service_pb2_grpc.RecoveryServiceStub(channel)
            found = stub.GetStatus(rpb.GetStatusRequest(), timeout=30, wait_for_ready=True)
            [status] = [each for each in (*found.workers, *found.gateways) if each.worker_id.endswith(f":{program}")]
            return status

    def audit(self) -> list[rpb.RecoveryEvent]:
        """Returns the audit log, oldest first."""
        with open_channel(self.watchdog, **self.security) as channel:
            stub = recovery_service_pb2_grpc.RecoveryServiceStub(channel)
            # A restarted watchdog opens its port only after some time.
            request = rpb.ListEventsRequest(page_size=1000)
            events = stub.ListEvents(request, timeout=30, wait_for_ready=True).events
        return list(reversed(events))

    def restarts(self) -> list[rpb.RecoveryEvent]:
        """Returns the restarts in the audit log, oldest first."""
        return [event for event in self.audit() if event.kind == "restart"]

    def recovered(self, count: int) -> bool:
        """Returns True once there were `count` restarts, all have succeeded, and new work is accepted."""
        try:
            restarts = self.restarts()
        except grpc.RpcError:
            # The watchdog itself may still be starting.
            return False
        with Client(self.target, patience_s=0, **self.security) as client:
            is_accepting = not client.accepting()
        return len(restarts) >= count and all(e.outcome == "recovered" for e in restarts) and is_accepting

    def sql(self, statement: str) -> list[tuple[Any, ...]]:
        """Runs a statement on the stack's embedded Postgres. Returns its rows, if any."""
        url = f"postgresql:///batch?host={quote(str(self.home))}/run/pg&user=postgres"
        connection = psycopg2.connect(url, connect_timeout=30)
        try:
            with connection, connection.cursor() as cursor:
                cursor.execute(statement)
                return cursor.fetchall() if cursor.description else []
        finally:
            connection.close()

    def mark(self, program: str) -> int:
        """Returns the current end of a program's log, for `events`."""
        return (self.home / "log" / f"{program}.log").stat().st_size

    def events(self, program: str, name: str, since: int = 0) -> list[dict[str, Any]]:
        """Returns the events of this name in a program's log since a mark."""
        log = (self.home / "log" / f"{program}.log").read_bytes()[since:].decode()
        # The last line may be incomplete, and libraries log lines that are not JSON.
        lines = [line for line in log.splitlines(keepends=True) if line.startswith("{") and line.endswith("}\n")]
        return [event for event in map(json.loads, lines) if event.get("event") == name]

    def check_no_orphans(self) -> None:
        """Asserts that only processes of the current worker are left."""
        leader = psutil.Process(self.pid("worker"))
        family = {leader.pid, *(child.pid for child in leader.children(recursive=True))}
        assert {process.pid for process in processes.marked(Mark(self.home, "worker"))} <= family

    def logs(self) -> str:
        """Returns the end of each log, for failure messages."""
        tails = (f"== {log.name}\n" + log.read_text()[-3000:] for log in sorted((self.home / "log").glob("*.log")))
        return "\n".join(tails)


@contextmanager
def full_stack(**settings: str) -> Iterator[FullStack]:
    """Yields a stack that is not started yet; stops and removes it at the end."""
    # Not pytest's tmp_path, which is too long for socket paths.
    home = Path(tempfile.mkdtemp(prefix="vbs-"))
    stack = FullStack(home, settings)
    try:
        yield stack
    finally:
        stopped = stack.script("stop-all.sh")
        assert stopped.returncode == 0, stopped.stderr
        shutil.rmtree(home, ignore_errors=True)
