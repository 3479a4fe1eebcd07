"""How soon the gateway notices that a worker is lost, and that it is back: `python -m benchmarks.notice`.

From the fault to `not_accepting`, and from its end (for a worker that was killed: from `ready`) to `accepting`, by the
timestamps of the logs. `call`: how long a call takes to be refused then.
"""

import argparse
import os
import signal
import statistics
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path

from service.db.connection import Database, migrate
from tests.integration.conftest import PostgresServer, Server, Stack, free_port
from tests.waiting import until
from vllm_batch.client import Client

FAULTS: dict[str, tuple[signal.Signals, signal.Signals | None]] = {
    "killed": (signal.SIGKILL, None),
    "frozen": (signal.SIGSTOP, signal.SIGCONT),
    "blocked": (signal.SIGUSR1, signal.SIGUSR2),
    "drained": (signal.SIGTERM, None),
}


def wall_s(event: dict[str, object]) -> float:
    return datetime.fromisoformat(str(event["timestamp"])).timestamp()


def after(server: Server, name: str, count: int) -> float:
    """When the event that follows `count` others of its name was logged."""
    return wall_s(until(lambda: server.events(name)[count:], name)[0])


def measure(gateway: Server, worker: Server, client: Client, fault: str) -> tuple[float, float, float]:
    begin, end = FAULTS[fault]
    lost, back, readies = len(gateway.events("not_accepting")), len(gateway.events("accepting")), len(readied(worker))
    at_s = time.time()
    os.kill(worker.process.pid, begin)
    noticed_s = after(gateway, "not_accepting", lost) - at_s
    called_s = time.perf_counter()
    assert client.accepting()
    called_s = time.perf_counter() - called_s
    if end is not None:
        at_s = time.time()
        os.kill(worker.process.pid, end)
    else:
        worker.process.wait(60)
        worker.start()
        at_s = until(lambda: readied(worker)[readies:], "the worker to be ready")[0]
    return noticed_s, called_s, after(gateway, "accepting", back) - at_s


def readied(worker: Server) -> list[float]:
    return [wall_s(event) for event in worker.events("phase_entered") if event["phase"] == "ready"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="vbb-", ignore_cleanup_errors=True) as home:
        server = PostgresServer(Path(home))
        server.start()
        database = Database(server.url % "batch", "benchmark")
        database.call(migrate)
        stack = Stack(server.url % "batch", Path(home), free_port(), [])
        try:
            gateway = stack.gateway(heartbeat_interval_s=5)
            worker = stack.run(
                "tests.integration.blocking_worker", "worker", worker_port=free_port(), heartbeat_interval_s=5
            )
            stack.wait_until_accepting()
            with Client(stack.target, patience_s=0) as client:
                for fault in FAULTS:
                    rounds = [measure(gateway, worker, client, fault) for _ in range(options.rounds)]
                    report(fault, rounds)
        finally:
            stack.end()
            database.close()
            server.stop()


def report(fault: str, rounds: list[tuple[float, float, float]]) -> None:
    shown = [
        f"{name} {statistics.median(column):.3f} s (worst {max(column):.3f} s)"
        for name, column in zip(("noticed", "call", "back"), zip(*rounds, strict=True), strict=True)
    ]
    sys.stdout.write(f"{fault:<8} {', '.join(shown)}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
