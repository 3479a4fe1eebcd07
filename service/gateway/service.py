"""BatchService on the gateway: new work goes to a live worker, the rest is read from Postgres."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, NoReturn, TypeVar

import grpc

from service import calls, logs, rpc
from service.db.batches import Limits
from service.db.connection import Database
from service.db.heartbeats import SeenBeat
from service.gateway.presence import Presence
from service.stored import Context, StoredServicer
from service.streams import FromThread
from vllm_batch.v1 import batch_service_pb2 as pb
from vllm_batch.v1 import batch_service_pb2_grpc

# For a client that gave no deadline.
CREATE_TIMEOUT_S = 60.0
UPLOAD_TIMEOUT_S = 3600.0

T = TypeVar("T", pb.CreateBatchResponse, pb.UploadBatchResponse)

log = logs.get("gateway")


class GatewayServicer(StoredServicer):
    """Forwards CreateBatch and UploadBatch; reads."""

    def __init__(self, database: Database, limits: Limits, presence: Presence) -> None:
        super().__init__(database, limits)
        self._presence = presence
        self._channels = _Channels()

    async def CreateBatch(self, request: pb.CreateBatchRequest, context: Context) -> pb.CreateBatchResponse:
        """Forwards to a live worker."""
        timeout_s = _timeout_s(context, CREATE_TIMEOUT_S)
        return await self._forward(
            context,
            lambda address, metadata: self._channels.stub(address).CreateBatch(
                request, timeout=timeout_s, metadata=metadata
            ),
        )

    async def UploadBatch(
        self, request_iterator: AsyncIterator[pb.UploadBatchRequest], context: Context
    ) -> pb.UploadBatchResponse:
        """Forwards to a live worker, piece by piece: what the worker has not taken is not read from the client."""
        timeout_s = _timeout_s(context, UPLOAD_TIMEOUT_S)
        return await self._forward(
            context,
            lambda address, metadata: _upload(
                self._channels.blocking_stub(address), aiter(request_iterator), timeout_s, metadata
            ),
        )

    async def close(self) -> None:
        """Closes the channels to the workers."""
        await self._channels.close()

    async def _forward(self, context: Context, call: Callable[[str, calls.Metadata], Awaitable[T]]) -> T:
        seen = self._presence.choose()
        try:
            answer = await call(seen.beat.address, calls.current().metadata())
        except grpc.RpcError as error:
            await self._pass_on(context, seen, error)
        log.info("batch_forwarded", batch=answer.batch.id, worker_id=seen.beat.worker_id)
        return answer

    async def _pass_on(self, context: Context, seen: SeenBeat, error: grpc.RpcError) -> NoReturn:
        """Ends the call as the worker did; or as offline when it was not the worker who said so."""
        trailers: Any = tuple(error.trailing_metadata() or ())
        is_from_worker = any(key == "grpc-status-details-bin" for key, _ in trailers)
        if error.code() is grpc.StatusCode.UNAVAILABLE and not is_from_worker:
            cause = error.details() or ""
            log.warning("worker_unreachable", worker_id=seen.beat.worker_id, cause=cause)
            raise self._presence.unreachable(seen, cause)
        await context.abort(error.code(), error.details() or "", trailers)
        raise AssertionError("abort raises")


@dataclass
class _Channels:
    """The channels to the workers by address, made when first used."""

    _channels: dict[str, grpc.aio.Channel] = field(default_factory=dict)
    _blocking: dict[str, grpc.Channel] = field(default_factory=dict)

    def stub(self, address: str) -> "batch_service_pb2_grpc.BatchServiceAsyncStub":
        if address not in self._channels:
            self._channels[address] = grpc.aio.insecure_channel(address, options=rpc.CHANNEL_OPTIONS)
        return batch_service_pb2_grpc.BatchServiceStub(self._channels[address])

    def blocking_stub(self, address: str) -> batch_service_pb2_grpc.BatchServiceStub:
        if address not in self._blocking:
            self._blocking[address] = grpc.insecure_channel(address, options=rpc.CHANNEL_OPTIONS)
        return batch_service_pb2_grpc.BatchServiceStub(self._blocking[address])

    async def close(self) -> None:
        for channel in self._channels.values():
            await channel.close(None)
        for blocking in self._blocking.values():
            blocking.close()


async def _upload(
    stub: batch_service_pb2_grpc.BatchServiceStub,
    messages: AsyncIterator[pb.UploadBatchRequest],
    timeout_s: float,
    metadata: calls.Metadata,
) -> pb.UploadBatchResponse:
    """UploadBatch by gRPC's blocking API.

    The one for asyncio puts INTERNAL in the place of what a server says that ends a call before it has read all of
    it (github.com/grpc/grpc/issues/36066).
    """
    loop = asyncio.get_running_loop()
    pieces = FromThread(messages, loop)
    answer: asyncio.Future[pb.UploadBatchResponse] = loop.create_future()

    def hand_over() -> None:
        if answer.done():
            return
        try:
            answer.set_result(call.result())
        except grpc.FutureCancelledError:
            answer.cancel()
        except grpc.RpcError as error:
            answer.set_exception(pieces.failure or error)

    call: Any = stub.UploadBatch.future(pieces, timeout=timeout_s, metadata=metadata)
    call.add_done_callback(lambda _: loop.call_soon_threadsafe(hand_over))
    try:
        return await answer
    finally:
        call.cancel()
        pieces.abort()


def _timeout_s(context: Context, otherwise_s: float) -> float:
    remaining: float | None = context.time_remaining()
    return otherwise_s if remaining is None else remaining
