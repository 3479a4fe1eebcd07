"""A whole stack under supervisord, started and stopped by the scripts that users run."""

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import psutil
import psycopg2

from service import processes
from service.processes import Mark
from tests.ports import free_port
from vllm_batch.channel import open_channel
from vllm_batch.client import Client
from vllm_batch.v1 import recovery_service_pb2 as rpb
from vllm_batch.v1 import recovery_service_pb2_grpc
from watchdog.supervisor import Supervisor

ROOT = Path(__file__).resolve().parents[1]
BIN = ROOT / ".venv" / "bin"


class FullStack:
    """A home of its own, on ports of its own."""

    def __init__(self, home: Path, settings: dict[str, str]) -> None:
        gateway, worker, watchdog = (free_port() for _ in range(3))
        self.home = home
        # What supervisorctl does, without a process of its own for each call.
        self.supervisor = Supervisor(f"unix://{home}/run/supervisor.sock", timeout_s=30)
        # How to call it: what vllm_batch.channel takes.
        self.security: dict[str, str] = {}
        self.target, self.watchdog = f"127.0.0.1:{gateway}", f"127.0.0.1:{watchdog}"
        kept = {k: v for k, v in os.environ.items() if not k.startswith("BATCH_")}
        for name in ("DATABASE_URL", "SENTRY_DSN"):
            kept.pop(name, None)
        self.env = kept | {
            "BATCH_ENV_FILE": "/dev/null",
            "BATCH_HOME": str(home),
            "BATCH_GATEWAY_PORT": str(gateway),
            "BATCH_WORKER_PORT": str(worker),
            "BATCH_WATCHDOG_PORT": str(watchdog),
            "BATCH_GATEWAY_METRICS_PORT": "0",
            "BATCH_WORKER_METRICS_PORT": "0",
            "BATCH_WATCHDOG_METRICS_PORT": "0",
            **settings,
        }

    def script(self, name: str, timeout_s: float = 300) -> "subprocess.CompletedProcess[str]":
        """Runs one of the scripts as a user would."""
        return subprocess.run(
            [str(ROOT / "scripts" / name)], env=self.env, cwd="/", capture_output=True, text=True, timeout=timeout_s
        )

    def supervisorctl(self, *arguments: str) -> str:
        """What supervisorctl prints, called without any environment."""
        command = [str(BIN / "supervisorctl"), "-c", str(self.home / "supervisord.conf"), *arguments]
        return subprocess.run(command, env={}, cwd=ROOT, capture_output=True, text=True, timeout=120).stdout

    def pid(self, program: str) -> int:
        """A program's process, 0 for none; without a name supervisord's own. Raises SupervisorAwayError."""
        if not program:
            return int((self.home / "run/supervisord.pid").read_text())
        return self.supervisor.info(program).pid

    def status(self) -> rpb.WorkerStatus:
        """What the watchdog says of the worker."""
        with open_channel(self.watchdog, **self.security) as channel:
            stub = recovery_service_pb2_grpc.RecoveryServiceStub(channel)
            [worker] = stub.GetStatus(rpb.GetStatusRequest(), timeout=30, wait_for_ready=True).workers
            return worker

    def audit(self) -> list[rpb.RecoveryEvent]:
        """The audit log, oldest first."""
        with open_channel(self.watchdog, **self.security) as channel:
            stub = recovery_service_pb2_grpc.RecoveryServiceStub(channel)
            # A watchdog that was restarted opens its port in a while.
            request = rpb.ListEventsRequest(page_size=1000)
            events = stub.ListEvents(request, timeout=30, wait_for_ready=True).events
        return list(reversed(events))

    def restarts(self) -> list[rpb.RecoveryEvent]:
        """The restarts in the audit log, oldest first."""
        return [event for event in self.audit() if event.kind == "restart"]

    def recovered(self, count: int) -> bool:
        """True once that many restarts are done, all successful, and new work is accepted."""
        try:
            restarts = self.restarts()
        except grpc.RpcError:
            # The watchdog may be on its way up itself.
            return False
        with Client(self.target, patience_s=0, **self.security) as client:
            is_accepting = not client.accepting()
        return len(restarts) >= count and all(e.outcome == "recovered" for e in restarts) and is_accepting

    def sql(self, statement: str) -> list[tuple[Any, ...]]:
        """Rows of a statement on the stack's embedded Postgres; none where it gives none."""
        url = f"postgresql:///batch?host={self.home}/run/pg&user=postgres"
        connection = psycopg2.connect(url, connect_timeout=30)
        try:
            with connection, connection.cursor() as cursor:
                cursor.execute(statement)
                return cursor.fetchall() if cursor.description else []
        finally:
            connection.close()

    def mark(self, program: str) -> int:
        """The present end of a program's log, for `events`."""
        return (self.home / "log" / f"{program}.log").stat().st_size

    def events(self, program: str, name: str, since: int = 0) -> list[dict[str, Any]]:
        """What a program has logged under a name since a mark."""
        log = (self.home / "log" / f"{program}.log").read_bytes()[since:].decode()
        # The last line may be half written, and what is not ours is no JSON.
        lines = [line for line in log.splitlines(keepends=True) if line.startswith("{") and line.endswith("}\n")]
        return [event for event in map(json.loads, lines) if event.get("event") == name]

    def check_no_orphans(self) -> None:
        """Of all lives of the worker one is left."""
        leader = psutil.Process(self.pid("worker"))
        family = {leader.pid, *(child.pid for child in leader.children(recursive=True))}
        assert {process.pid for process in processes.marked(Mark(self.home, "worker"))} <= family

    def logs(self) -> str:
        """The end of each log, for a test that fails."""
        tails = (f"== {log.name}\n" + log.read_text()[-3000:] for log in sorted((self.home / "log").glob("*.log")))
        return "\n".join(tails)


@contextmanager
def full_stack(**settings: str) -> Iterator[FullStack]:
    """A stack that is not started yet; stopped and removed at the end."""
    # Not pytest's folder: that is deep, and a socket's path is short.
    home = Path(tempfile.mkdtemp(prefix="vbs-"))
    stack = FullStack(home, settings)
    try:
        yield stack
    finally:
        stopped = stack.script("stop-all.sh")
        assert stopped.returncode == 0, stopped.stderr
        shutil.rmtree(home, ignore_errors=True)
