"""What becomes of the gateway's calls to a worker when the files of its client certificate are replaced."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from service.clock import SystemClock
from service.config import Settings
from service.insight import links
from service.insight.channel_opener import ChannelOpener
from service.insight.channels import Channels
from service.insight.links import Links
from service.insight.routing import LinkState
from tests.support.certificates import Authority, replace
from tests.support.loops import in_loop
from vllm_batch.v1 import batch_service_pb2 as pb
from vllm_batch.v1 import batch_service_pb2_grpc

REQUEST = pb.CreateBatchRequest()


class Worker(health_pb2_grpc.HealthServicer, batch_service_pb2_grpc.BatchServiceServicer):
    """Serves, and answers a create once told to."""

    def __init__(self) -> None:
        # Where health was watched from, and creates were sent from.
        self.watchers: list[str] = []
        self.callers: list[str] = []
        self.watched = asyncio.Event()
        self.came = asyncio.Event()
        self.may_answer = asyncio.Event()

    async def Watch(
        self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        self.watchers.append(context.peer())
        self.watched.set()
        yield await self.Check(request, context)
        await asyncio.Event().wait()

    async def Check(
        self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext
    ) -> health_pb2.HealthCheckResponse:
        return health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)

    async def CreateBatch(
        self, request: pb.CreateBatchRequest, context: grpc.aio.ServicerContext
    ) -> pb.CreateBatchResponse:
        self.callers.append(context.peer())
        self.came.set()
        await self.may_answer.wait()
        return pb.CreateBatchResponse()


@asynccontextmanager
async def serving(authority: Authority) -> AsyncIterator[tuple[Worker, str]]:
    """A worker that requires client certificates, with its address."""
    certificate, key = (path.read_bytes() for path in authority.issue())
    credentials = grpc.ssl_server_credentials([(key, certificate)], authority.file.read_bytes(), True)
    server, worker = grpc.aio.server(), Worker()
    health_pb2_grpc.add_HealthServicer_to_server(worker, server)
    batch_service_pb2_grpc.add_BatchServiceServicer_to_server(worker, server)  # type: ignore[no-untyped-call]
    port = server.add_secure_port("127.0.0.1:0", credentials)
    await server.start()
    try:
        yield worker, f"127.0.0.1:{port}"
    finally:
        await server.stop(0)


def calling(authority: Authority, pair: tuple[Path, Path]) -> Channels:
    """Channels with these files."""
    files = {"server_cert": pair[0], "server_key": pair[1], "tls_cert": pair[0], "tls_key": pair[1]}
    return Channels(ChannelOpener(Settings(tls_ca=authority.file, **files)))


@in_loop
async def test_calls_under_way_end_as_they_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the files change, new calls use them, those under way end undisturbed, and the link stays up."""
    monkeypatch.setattr(links, "CHECK_INTERVAL_S", 0.05)
    authority = Authority(tmp_path, "ca")
    pair = authority.issue()
    channels = calling(authority, pair)
    states: list[LinkState] = []
    has_changed = asyncio.Event()

    def note() -> None:
        states.append(to_it.contacts[address].health)
        has_changed.set()

    async def create(blocking: bool) -> None:
        async with channels.use(address) as to:
            if blocking:
                await asyncio.to_thread(to.blocking_batches.CreateBatch, REQUEST, timeout=20)
            else:
                await to_it.call(address, to.batches.CreateBatch(REQUEST, timeout=20))

    async with serving(authority) as (worker, address):
        to_it = Links(channels, SystemClock(), note)
        await to_it.keep({address})
        await has_changed.wait()
        for count, blocking in enumerate((False, True), 1):
            worker.watched.clear()
            worker.came.clear()
            under_way = asyncio.create_task(create(blocking))
            await worker.came.wait()
            replace(pair, authority.issue())
            await worker.watched.wait()
            worker.came.clear()
            after = asyncio.create_task(create(blocking))
            await worker.came.wait()
            assert worker.callers[-1] != worker.callers[-2]
            assert worker.watchers[-1] != worker.watchers[-2]
            worker.may_answer.set()
            await asyncio.gather(under_way, after)
            worker.may_answer.clear()
            assert (len(worker.callers), states) == (2 * count, [LinkState.SERVING])
        await to_it.close()
        await channels.close_all()


@in_loop
async def test_files_that_do_not_fit_yet(tmp_path: Path) -> None:
    """Files are replaced one after the other: until they fit together, calls go on with the earlier ones."""
    authority = Authority(tmp_path, "ca")
    pair, new = authority.issue(), authority.issue()
    channels = calling(authority, pair)

    async def caller() -> str:
        worker.may_answer.set()
        async with channels.use(address) as to:
            await to.batches.CreateBatch(REQUEST, timeout=20)
        return worker.callers[-1]

    async with serving(authority) as (worker, address):
        first = await caller()
        pair[0].write_bytes(new[0].read_bytes())
        assert await caller() == first
        pair[1].unlink()
        assert await caller() == first
        pair[1].touch(0o600)
        pair[1].write_bytes(new[1].read_bytes())
        assert await caller() != first
        await channels.close_all()


@in_loop
async def test_a_worker_that_is_gone_ends_all_calls(tmp_path: Path) -> None:
    """Closing what leads to a worker ends the calls under way, also those of before the files changed."""
    authority = Authority(tmp_path, "ca")
    pair = authority.issue()
    channels = calling(authority, pair)

    async def upload() -> None:
        async with channels.use(address) as to:
            await asyncio.to_thread(to.blocking_batches.CreateBatch, REQUEST, timeout=20)

    async with serving(authority) as (worker, address):
        calls = []
        for _ in range(2):
            worker.came.clear()
            calls.append(asyncio.create_task(upload()))
            await worker.came.wait()
            replace(pair, authority.issue())
        await channels.close(address)
        ended = await asyncio.gather(*calls, return_exceptions=True)
        assert [error.code() for error in ended if isinstance(error, grpc.RpcError)] == [grpc.StatusCode.CANCELLED] * 2
