"""Claim: clients learn within seconds that a worker is gone or stuck, and that worker is restarted.

Against: 60 s, the age of a heartbeat at which a worker counts as offline (`BATCH_HEARTBEAT_TIMEOUT_S`); for the restart
supervisord's own `autorestart`, which notices a process that is gone and never one that is frozen.
Target: a killed worker: p99 1 s. A frozen process: p95 6 s. A frozen engine: p95 15 s.

From the signal to the first CreateBatch that the gateway refuses as UNAVAILABLE, with calls going on all the time; and
to the next process of the program. The engine is simulated; the worker is idle.
"""

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import psutil

from benchmarks.lib.harness import Figure, Sizes, at_most, main
from benchmarks.lib.stacks import simulated
from tests.support.stacks import BIN, FullStack
from tests.support.waiting import until
from vllm_batch import Client
from vllm_batch.v1 import batch_service_pb2 as pb
from vllm_batch.v1 import batch_service_pb2_grpc
from watchdog.supervisor import Supervisor, SupervisorAwayError

SIZES: Sizes = {"kills": (20, 2), "freezes": (5, 1)}
TIMEOUT_S = 120
DOCUMENTED_S = 60.0
CONF = """
[unix_http_server]
file={home}/run/supervisor.sock
[supervisord]
logfile={home}/supervisord.log
pidfile={home}/supervisord.pid
nodaemon=true
[rpcinterface:supervisor]
supervisor.rpcinterface_factory=supervisor.rpcinterface:make_main_rpcinterface
[program:worker]
command=sleep infinity
autorestart=true
startsecs=0
"""


def refused_s(target: str, begin_s: float) -> float:
    """Waits until new work is refused. Returns the seconds since `begin_s`."""
    with grpc.insecure_channel(target) as channel:
        stub = batch_service_pb2_grpc.BatchServiceStub(channel)
        while True:
            try:
                stub.CreateBatch(pb.CreateBatchRequest(), timeout=TIMEOUT_S)
            except grpc.RpcError as error:
                if error.code() is grpc.StatusCode.UNAVAILABLE:
                    return time.monotonic() - begin_s
                # A live worker's answer to a batch without requests.
                if error.code() is not grpc.StatusCode.INVALID_ARGUMENT:
                    raise
            time.sleep(0.002)


def restarted_s(home: Path, pid: int, begin_s: float) -> float:
    """Waits until supervisord shows another process. Returns the seconds since `begin_s`."""
    supervisor = Supervisor(f"unix://{home}/run/supervisor.sock", 10)
    until(lambda: supervisor.info("worker").pid not in (0, pid), "a new process", TIMEOUT_S)
    return time.monotonic() - begin_s


def engine(pid: int) -> int:
    """The pid of the simulated engine."""
    return int(psutil.Process(pid).children()[0].pid)


def strike(stack: FullStack, number: int, victim: Callable[[int], int]) -> tuple[float, float]:
    """Sends a signal. Returns the seconds until new work was refused, and until there was another process."""
    with Client(stack.target, patience_s=0) as client:
        until(lambda: not client.accepting(), "new work to be accepted", TIMEOUT_S)
    pid = stack.pid("worker")
    begin_s = time.monotonic()
    os.kill(victim(pid), number)
    refused = refused_s(stack.target, begin_s)
    return refused, restarted_s(stack.home, pid, begin_s)


@contextmanager
def supervisord() -> Iterator[Path]:
    """A supervisord that restarts its one program by itself."""
    with tempfile.TemporaryDirectory(prefix="vbb-") as name:
        home = Path(name)
        (home / "run").mkdir()
        conf = home / "supervisord.conf"
        conf.write_text(CONF.format(home=home))
        command = [str(BIN / "supervisord"), "-c", str(conf)]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            supervisor = Supervisor(f"unix://{home}/run/supervisor.sock", 10)

            def is_up() -> bool:
                try:
                    return supervisor.info("worker").pid != 0
                except SupervisorAwayError:
                    return False

            try:
                until(is_up, "supervisord")
                yield home
            finally:
                process.terminate()


def by_itself_s(home: Path) -> float:
    """The seconds that supervisord takes to restart a killed program."""
    pid = Supervisor(f"unix://{home}/run/supervisor.sock", 10).info("worker").pid
    begin_s = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    return restarted_s(home, pid, begin_s)


def measure(kills: int, freezes: int) -> Iterator[Figure]:
    """Kills, alternating with supervisord's own restarts; then both kinds of freezes."""
    settings = {"BATCH_MAX_RESTARTS_PER_HOUR": "1000", "BATCH_RESTART_BACKOFF_MAX_S": "0.1"}
    with simulated(**settings) as stack, supervisord() as other:
        refused, restarted, by_itself = [], [], []
        for _ in range(kills):
            one = strike(stack, signal.SIGKILL, lambda pid: pid)
            refused.append(one[0])
            restarted.append(one[1])
            by_itself.append(by_itself_s(other))
        stopped = [strike(stack, signal.SIGSTOP, lambda pid: pid) for _ in range(freezes)]
        stalled = [strike(stack, signal.SIGSTOP, engine) for _ in range(freezes)]
    old, seconds = "heartbeat alone", "s"
    yield Figure("worker killed, to UNAVAILABLE", seconds, refused, old, [DOCUMENTED_S], at_most("p99", 1))
    yield Figure("worker killed, to the next process", seconds, restarted, "autorestart", by_itself)
    first, second = ([each[place] for each in stopped] for place in (0, 1))
    yield Figure("worker frozen, to UNAVAILABLE", seconds, first, old, [DOCUMENTED_S], at_most("p95", 6))
    yield Figure("worker frozen, to the next process", seconds, second, "autorestart: never")
    first, second = ([each[place] for each in stalled] for place in (0, 1))
    yield Figure("engine frozen, to UNAVAILABLE", seconds, first, "heartbeat alone: never", (), at_most("p95", 15))
    yield Figure("engine frozen, to the next process", seconds, second, "autorestart: never")


if __name__ == "__main__":
    main(__file__, __doc__, SIZES, measure)
