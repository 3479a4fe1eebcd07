"""The health probe against a server that stops answering in various ways."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from tests.support.ports import free_port
from tests.support.servers import ROOT
from tests.support.waiting import until
from watchdog.observe.probe import Probe
from watchdog.policy import ProbeAnswer

# Like the worker: asyncio, with grpcio's health servicer. SIGUSR1 blocks its event loop for good.
SERVER = """
import asyncio, signal, sys, time
import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

async def main():
    server = grpc.aio.server()
    servicer = health.aio.HealthServicer()
    await servicer.set("", health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    server.add_insecure_port("127.0.0.1:" + sys.argv[1])
    await server.start()
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, lambda: time.sleep(1000))
    await server.wait_for_termination()

asyncio.run(main())
"""


@pytest.fixture
def server() -> Iterator[tuple[int, int]]:
    """Pid and port of a server that is killed after the test."""
    port = free_port()
    process = subprocess.Popen([sys.executable, "-c", SERVER, str(port)], cwd=ROOT)
    yield process.pid, port
    process.kill()
    process.wait(10)


@pytest.mark.parametrize("fault", [signal.SIGUSR1, signal.SIGSTOP, signal.SIGKILL], ids=["blocked", "frozen", "killed"])
def test_server_that_answers_no_more_is_noticed_without_being_checked(server: tuple[int, int], fault: int) -> None:
    """A blocked, frozen or killed server wakes the guard, and the next check reports that it does not answer."""
    pid, port = server
    woken = threading.Event()
    probe = Probe(f"127.0.0.1:{port}", woken.set, ask_interval_s=1.5)

    def is_serving() -> bool:
        # In this order: what wakes the guard while we look has ended by the next look.
        woken.clear()
        return probe.check(5) is ProbeAnswer.SERVING and not woken.is_set()

    try:
        until(is_serving, "the server to be serving")
        os.kill(pid, fault)
        assert woken.wait(60)
        assert probe.check(1) in (ProbeAnswer.DEADLINE_EXCEEDED, ProbeAnswer.UNAVAILABLE)
    finally:
        probe.close()
