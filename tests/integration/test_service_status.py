"""GetServiceStatus of gateway and worker, through both clients: whether new work is accepted, and if not, why."""

import asyncio
import tempfile
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from service.db.connection import Database, migrate
from tests.support.batches import count, lines, refused
from tests.support.ports import free_port
from tests.support.servers import PostgresServer, Stack
from tests.support.waiting import until
from vllm_batch import AsyncClient, CallError, Client
from vllm_batch.v1 import batch_service_pb2 as pb
from vllm_batch.v1 import batch_service_pb2_grpc


def of_async_client(target: str) -> tuple[pb.GetServiceStatusResponse, str]:
    """The status and the refusal that AsyncClient reports."""

    async def ask() -> tuple[pb.GetServiceStatusResponse, str]:
        async with AsyncClient(target, patience_s=0) as client:
            return await client.service_status(), await client.accepting()

    return asyncio.run(ask())


def of_worker(port: int) -> pb.GetServiceStatusResponse:
    """The status that a worker reports about itself."""
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = batch_service_pb2_grpc.BatchServiceStub(channel)
        return stub.GetServiceStatus(pb.GetServiceStatusRequest(), timeout=30, wait_for_ready=True)


def check_is_refusal(status: pb.GetServiceStatusResponse, error: CallError) -> None:
    """Checks that a status matches the refusal of new work, but for ages, which depend on the time of the call."""
    assert not status.accepting
    assert (status.reason, list(status.models)) == (error.reason, [])
    assert set(status.metadata) == set(error.metadata)
    assert status.metadata.get("worker_id") == error.metadata.get("worker_id")
    assert status.message.partition("(")[0] == error.message.partition("(")[0] != ""
    assert status.HasField("retry_delay")
    assert error.retry_delay_s is not None
    assert status.retry_delay.ToMilliseconds() > 0


def test_accepting(stack: Stack, client: Client) -> None:
    """While new work is accepted, the status lists every model once and no reason, and asking creates no batch."""
    stack.gateway()
    first, second = stack.worker("first"), stack.worker("second")
    for worker in (first, second):
        until(lambda worker=worker: of_worker(worker.port).accepting, "the worker to accept work")  # type: ignore[misc]
    stack.wait_until_accepting()
    expected = pb.GetServiceStatusResponse(accepting=True, models=["tiny"])
    assert client.service_status() == expected
    assert of_async_client(stack.target) == (expected, "")
    assert of_worker(first.port) == expected
    assert client.accepting() == ""
    assert count(stack, "batches") == 0


def test_no_worker(stack: Stack, client: Client) -> None:
    """Without a worker the status equals the refusal that new work gets."""
    stack.gateway()
    until(lambda: "never seen" in client.accepting(), "the gateway to report that no worker was ever seen")
    status = client.service_status()
    assert (status.reason, status.message) == ("WORKER_OFFLINE", "worker offline (never seen)")
    check_is_refusal(status, refused(lambda: client.submit_lines(lines(1))))
    assert of_async_client(stack.target) == (status, status.message)


def test_loading_worker(stack: Stack, client: Client) -> None:
    """While a worker is loading, both its own status and the gateway's say so."""
    stack.gateway()
    worker = stack.worker(simulated_load_s=600)
    until(lambda: "worker is loading" in client.accepting(), "the worker to be loading")
    assert client.service_status().reason == "WORKER_LOADING"
    check_is_refusal(client.service_status(), refused(lambda: client.submit_lines(lines(1))))
    own = of_worker(worker.port)
    assert (own.accepting, own.reason, own.metadata["phase"]) == (False, "WORKER_LOADING", "loading")
    assert (own.message, list(own.models)) == ("worker is loading its model", [])
    assert own.retry_delay.ToMilliseconds() > 0


@pytest.fixture
def postgres_of_its_own() -> Iterator[PostgresServer]:
    """A Postgres with the schema that the test may stop."""
    with tempfile.TemporaryDirectory(prefix="vbt-", ignore_cleanup_errors=True) as home:
        server = PostgresServer(Path(home))
        server.start()
        database = Database(server.url % "batch", "test")
        database.call(migrate)
        database.close()
        yield server
        server.stop()


def test_database_away(postgres_of_its_own: PostgresServer, tmp_path: Path) -> None:
    """While Postgres is away the gateway still answers, with that as the reason; afterwards new work is accepted."""
    stack = Stack(postgres_of_its_own.url % "batch", tmp_path, free_port(), [])
    try:
        stack.gateway(database_timeout_s=1)
        stack.worker(database_timeout_s=1)
        stack.wait_until_accepting()
        postgres_of_its_own.stop()
        with Client(stack.target, patience_s=0) as client:
            until(lambda: not client.service_status().accepting, "the outage to be noticed")
            status = client.service_status()
            assert status.reason == "DATABASE_UNAVAILABLE"
            assert status.message.startswith("database unavailable: ")
            check_is_refusal(status, refused(lambda: client.submit_lines(lines(1))))
            assert of_async_client(stack.target)[1].startswith("database unavailable: ")
            postgres_of_its_own.start()
            until(lambda: client.service_status().accepting, "new work to be accepted again")
    finally:
        stack.end()


def test_gateway_away(stack: Stack, client: Client) -> None:
    """Without a gateway `accepting` returns the failure of the call, while `service_status` raises it."""
    error = refused(client.service_status)
    assert error.code is grpc.StatusCode.UNAVAILABLE
    assert error.reason == ""
    assert "connect" in client.accepting().lower()

    async def ask() -> str:
        async with AsyncClient(stack.target, patience_s=0) as other:
            with pytest.raises(CallError):
                await other.service_status()
            return await other.accepting()

    assert "connect" in asyncio.run(ask()).lower()
