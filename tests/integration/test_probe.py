"""The probe of a worker's health, at a server that stops answering as servers do."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from tests.integration.conftest import ROOT
from tests.ports import free_port
from tests.waiting import until
from watchdog.health import Probe
from watchdog.policy import Health

# As the worker's: asyncio, with the health servicer of grpcio. SIGUSR1 blocks its event loop for good.
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
    """Pid and port of a server that will not be there after the test."""
    port = free_port()
    process = subprocess.Popen([sys.executable, "-c", SERVER, str(port)], cwd=ROOT)
    yield process.pid, port
    process.kill()
    process.wait(10)


@pytest.mark.parametrize("fault", [signal.SIGUSR1, signal.SIGSTOP, signal.SIGKILL], ids=["blocked", "frozen", "killed"])
def test_server_that_answers_no_more_is_noticed_without_being_checked(server: tuple[int, int], fault: int) -> None:
    """A blocked event loop, which keeps its streams open, wakes the guard like a death does; and is told at once."""
    pid, port = server
    woken = threading.Event()
    probe = Probe(f"127.0.0.1:{port}", woken.set)
    try:
        until(lambda: probe.check(5) is Health.SERVING, "the server")
        woken.clear()
        os.kill(pid, fault)
        assert woken.wait(60)
        assert probe.check(1) in (Health.DEADLINE_EXCEEDED, Health.UNAVAILABLE)
    finally:
        probe.close()
