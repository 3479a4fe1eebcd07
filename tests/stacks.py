"""A whole stack under supervisord, started and stopped by the scripts that users run."""

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from vllm_batch.channel import open_channel
from vllm_batch.client import Client
from vllm_batch.v1 import recovery_service_pb2 as rpb
from vllm_batch.v1 import recovery_service_pb2_grpc

ROOT = Path(__file__).resolve().parents[1]
BIN = ROOT / ".venv" / "bin"


class FullStack:
    """A home of its own, on ports of its own."""

    def __init__(self, home: Path, settings: dict[str, str]) -> None:
        with ExitStack() as stack:
            sockets = [stack.enter_context(socket.socket()) for _ in range(3)]
            for one in sockets:
                one.bind(("127.0.0.1", 0))
            gateway, worker, watchdog = (one.getsockname()[1] for one in sockets)
        self.home = home
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
        """A program's process, 0 for none."""
        return int(self.supervisorctl("pid", program))

    def status(self) -> rpb.WorkerStatus:
        """What the watchdog says of the worker."""
        with open_channel(self.watchdog, **self.security) as channel:
            stub = recovery_service_pb2_grpc.RecoveryServiceStub(channel)
            [worker] = stub.GetStatus(rpb.GetStatusRequest(), timeout=30, wait_for_ready=True).workers
            return worker

    def restarts(self) -> list[rpb.RecoveryEvent]:
        """The restarts in the audit log, oldest first."""
        with open_channel(self.watchdog, **self.security) as channel:
            stub = recovery_service_pb2_grpc.RecoveryServiceStub(channel)
            # A watchdog that was restarted opens its port in a while.
            request = rpb.ListEventsRequest(page_size=1000)
            events = stub.ListEvents(request, timeout=30, wait_for_ready=True).events
        return [event for event in reversed(events) if event.kind == "restart"]

    def recovered(self, count: int) -> bool:
        """True once that many restarts are done, all successful, and new work is accepted."""
        restarts = self.restarts()
        with Client(self.target, patience_s=0, **self.security) as client:
            is_accepting = not client.accepting()
        return len(restarts) >= count and all(e.outcome == "recovered" for e in restarts) and is_accepting

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
