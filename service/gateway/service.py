"""BatchService on the gateway: new work goes to a live worker, the rest is read from Postgres."""

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NoReturn, TypeVar

import grpc

from service import logs, rpc
from service.db.batches import Limits
from service.db.connection import Database
from service.db.heartbeats import SeenBeat
from service.gateway.presence import Presence
from service.gateway.workers import offline
from service.stored import Context, StoredServicer
from vllm_batch.v1 import batch_service_pb2 as pb
from vllm_batch.v1 import batch_service_pb2_grpc

# For a client that gave no deadline.
CREATE_TIMEOUT_S = 60.0
UPLOAD_TIMEOUT_S = 3600.0

T = TypeVar("T")

log = logs.get("gateway")


class GatewayServicer(StoredServicer):
    """Forwards CreateBatch and UploadBatch; reads."""

    def __init__(self, database: Database, limits: Limits, presence: Presence) -> None:
        super().__init__(database, limits)
        self._presence = presence
        self._channels: dict[str, grpc.aio.Channel] = {}

    async def CreateBatch(self, request: pb.CreateBatchRequest, context: Context) -> pb.CreateBatchResponse:
        """Forwards to a live worker."""
        return await self._forward(
            context,
            lambda worker: worker.CreateBatch(request, timeout=_timeout_s(context, CREATE_TIMEOUT_S)),
        )

    async def UploadBatch(
        self, request_iterator: AsyncIterator[pb.UploadBatchRequest], context: Context
    ) -> pb.UploadBatchResponse:
        """Forwards to a live worker, piece by piece: what the worker has not taken is not read from the client."""
        return await self._forward(
            context,
            lambda worker: worker.UploadBatch(request_iterator, timeout=_timeout_s(context, UPLOAD_TIMEOUT_S)),
        )

    async def close(self) -> None:
        """Closes the channels to the workers."""
        for channel in self._channels.values():
            await channel.close(None)

    async def _forward(self, context: Context, call: Callable[[Any], Awaitable[T]]) -> T:
        seen = self._presence.choose()
        try:
            return await call(self._stub(seen.beat.address))
        except grpc.aio.AioRpcError as error:
            await self._pass_on(context, seen, error)

    async def _pass_on(self, context: Context, seen: SeenBeat, error: grpc.aio.AioRpcError) -> NoReturn:
        """Ends the call as the worker did; or as offline when it was not the worker who said so."""
        trailers = tuple(error.trailing_metadata() or ())
        is_from_worker = any(key == "grpc-status-details-bin" for key, _ in trailers)
        if error.code() is grpc.StatusCode.UNAVAILABLE and not is_from_worker:
            cause = error.details() or ""
            log.warning("worker_unreachable", worker_id=seen.beat.worker_id, cause=cause)
            raise offline(seen, self._presence.age_s(seen), cause)
        await context.abort(error.code(), error.details() or "", trailers)
        raise AssertionError("abort raises")

    def _stub(self, address: str) -> batch_service_pb2_grpc.BatchServiceStub:
        if address not in self._channels:
            self._channels[address] = grpc.aio.insecure_channel(address, options=rpc.CHANNEL_OPTIONS)
        return batch_service_pb2_grpc.BatchServiceStub(self._channels[address])


def _timeout_s(context: Context, otherwise_s: float) -> float:
    remaining: float | None = context.time_remaining()
    return otherwise_s if remaining is None else remaining
