"""Many clients, some slow, some never reading: others are served, memory stays bounded, shutdown is graceful.

`LOAD=full` runs 200 clients and 5,000 watches of each kind.
"""

import asyncio
import os
import resource
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc
import psutil
import psycopg2
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from service.db.connection import Database, migrate
from tests.support.batches import finished, lines
from tests.support.ports import free_port
from tests.support.servers import PostgresServer, Server, Stack
from tests.support.waiting import until
from vllm_batch import CallError, Client
from vllm_batch.v1 import batch_service_pb2 as pb
from vllm_batch.v1 import batch_service_pb2_grpc

CLIENTS, WATCHES, CONNECTIONS = (200, 5000, 500) if os.environ.get("LOAD") == "full" else (50, 300, 150)
RESULTS = 2000
RESULT_BYTES = 50_000
# Gateway memory per stream: a client that does not read holds a page, one that waits next to nothing.
READER_MB = 1.5
WATCH_MB = 0.06
# For everything else that grows with clients: threads, pools, what the allocator keeps.
REST_MB = 60
SERVICE = "vllm_batch.v1.BatchService"
# Otherwise channels to one target share a connection.
OWN = (("grpc.use_local_subchannel_pool", 1),)

pytestmark = pytest.mark.timeout(900)


@pytest.fixture
def stack() -> Iterator[Stack]:
    """A gateway with a low limit of open files, and one worker."""
    # Not in pytest's folder: its path is too long for a socket.
    with tempfile.TemporaryDirectory(prefix="vbl-", ignore_cleanup_errors=True) as home:
        server = PostgresServer(Path(home))
        server.start()
        database = Database(server.url % "batch", "test")
        database.call(migrate)
        database.close()
        stack = Stack(server.url % "batch", Path(home), free_port(), [])
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (100, hard))
            stack.gateway()
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 4096), hard))
            stack.worker()
            stack.wait_until_accepting()
            yield stack
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            stack.end()
            server.stop()


def memory_mb(server: Server) -> float:
    return float(psutil.Process(server.process.pid).memory_info().rss) / (1 << 20)


def large_batch(stack: Stack, client: Client) -> str:
    """Creates a completed batch with results of 50 KB each."""
    batch_id = client.submit_lines(lines(RESULTS)).id
    assert finished(client, batch_id).counts.completed == RESULTS
    with psycopg2.connect(stack.database_url) as connection, connection.cursor() as cursor:
        body = "json_build_object('x', repeat(md5(random()::text), %s))::text"
        cursor.execute(f"UPDATE results SET body = {body}", (RESULT_BYTES // 32,))
    return batch_id


def idle_batches(stack: Stack, count: int) -> list[str]:
    """Creates batches in progress that no worker works on."""
    with psycopg2.connect(stack.database_url) as connection, connection.cursor() as cursor:
        cursor.execute(
            "INSERT INTO batches (state, digest, metadata, priority, models, total)"
            " SELECT 'in_progress', '', '{}', 0, '{tiny}', 1 FROM generate_series(1, %s) RETURNING id",
            (count,),
        )
        return [f"batch_{number}" for (number,) in cursor.fetchall()]


async def reads_slowly(stream: Any) -> int:
    """Reads a stream of results to its end, with pauses. Returns how many there were."""
    count = 0
    while (page := await stream.read()) is not grpc.aio.EOF:
        count += len(page.results)
        await asyncio.sleep(0.001)
    return count


async def end_of(stream: Any) -> tuple[grpc.StatusCode, str]:
    """The code and reason that a stream ends with."""
    try:
        while await stream.read() is not grpc.aio.EOF:
            pass
    except grpc.aio.AioRpcError as error:
        failed = CallError(error)
        return failed.code, failed.reason
    return grpc.StatusCode.OK, ""


def use(target: str) -> int:
    """Does what another client would do. Returns how many results it got."""
    with Client(target, patience_s=0) as client:
        batch = client.submit_lines(lines(5))
        assert finished(client, batch.id).counts.completed == 5
        assert client.get(batch.id).id in {found.id for found in client.list(limit=1000)}
        return len(list(client.results(batch.id)))


async def load(stack: Stack, large: str, idle: list[str]) -> None:
    gateway = stack.servers[0]
    before_mb = memory_mb(gateway)
    async with AsyncExitStack() as channels:

        async def connect() -> grpc.aio.Channel:
            return await channels.enter_async_context(grpc.aio.insecure_channel(stack.target, options=OWN))

        shared = [await connect() for _ in range(CONNECTIONS)]
        watches: list[Any] = []
        for number, batch_id in enumerate(idle):
            channel = shared[number % CONNECTIONS]
            watches.append(
                batch_service_pb2_grpc.BatchServiceStub(channel).WatchBatch(pb.WatchBatchRequest(batch_id=batch_id))
            )
            watches.append(health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=SERVICE)))
        firsts = await asyncio.gather(*(watch.read() for watch in watches))
        assert [one.batch.id for one in firsts[::2]] == idle
        assert {one.status for one in firsts[1::2]} == {health_pb2.HealthCheckResponse.SERVING}
        watching_mb = memory_mb(gateway)

        request = pb.StreamResultsRequest(batch_id=large)
        streams = [
            batch_service_pb2_grpc.BatchServiceStub(await connect()).StreamResults(request) for _ in range(CLIENTS)
        ]
        # Most of these read one page and then no more.
        pages = await asyncio.gather(*(stream.read() for stream in streams))
        slow = [asyncio.create_task(reads_slowly(stream)) for stream in streams[: CLIENTS // 10]]
        never = streams[CLIENTS // 10 :]

        with ThreadPoolExecutor(CLIENTS) as threads:
            loop = asyncio.get_running_loop()
            used = await asyncio.gather(*(loop.run_in_executor(threads, use, stack.target) for _ in range(CLIENTS)))
        assert used == [5] * CLIENTS
        assert set(await asyncio.gather(*slow)) == {RESULTS - len(pages[0].results)}
        after_mb = memory_mb(gateway)
        sys.stdout.write(
            f"\nmemory of the gateway: {before_mb:.0f} MB; with {len(watches)} watches {watching_mb:.0f} MB; with"
            f" {len(never)} clients that do not read, after {CLIENTS} that do, {after_mb:.0f} MB\n"
        )
        assert watching_mb - before_mb < WATCH_MB * len(watches) + REST_MB
        assert after_mb - watching_mb < READER_MB * len(never) + REST_MB

        gateway.process.terminate()
        ends = Counter(await asyncio.gather(*(end_of(watch) for watch in watches)))
        assert ends == {(grpc.StatusCode.UNAVAILABLE, "SHUTTING_DOWN"): len(watches)}
    # The clients that read nothing have disconnected, so there is nobody left to wait for.
    assert await asyncio.to_thread(gateway.process.wait, 120) == 0


@pytest.mark.thorough
def test_load(stack: Stack) -> None:
    """With many watches, slow readers and clients that never read, others are served and memory stays bounded."""
    with Client(stack.target) as client:
        large = large_batch(stack, client)
    asyncio.run(load(stack, large, idle_batches(stack, WATCHES)))
    assert not [event for name in ("call_failed", "call_without_database") for event in stack.servers[0].events(name)]
    until(lambda: stack.servers[0].events("gateway_ended"), "the gateway to log its end")
