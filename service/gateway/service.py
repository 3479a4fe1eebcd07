"""BatchService on the gateway: new work goes to a live worker, the rest is read from Postgres."""

import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NoReturn, TypeVar

import grpc
from google.rpc import error_details_pb2, status_pb2

from service import calls, logs
from service.db.batches import Limits
from service.db.connection import Database
from service.db.heartbeats import SeenBeat
from service.errors import WORKER_LOADING, WORKER_OFFLINE, WORKER_STALLED
from service.gateway import upload, wanted
from service.gateway.channels import Channels
from service.gateway.links import LostError
from service.gateway.presence import Presence
from service.gateway.upload import Upload
from service.stored import Context, StoredServicer
from vllm_batch.v1 import batch_service_pb2 as pb

# For a client that gave no deadline.
CREATE_TIMEOUT_S = 60.0
UPLOAD_TIMEOUT_S = 3600.0

UNAVAILABLE = grpc.StatusCode.UNAVAILABLE

T = TypeVar("T", pb.CreateBatchResponse, pb.UploadBatchResponse)

log = logs.get("gateway")


class GatewayServicer(StoredServicer):
    """Forwards CreateBatch and UploadBatch; reads.

    A worker that does not answer, or that does not take new work, is followed by the next that may. Whether the first
    has stored the batch nobody knows: that the second does not store it again is what the request_id is for, which
    every forwarded call has. It is named in the error, for a client that gave none and calls again.
    """

    def __init__(self, database: Database, limits: Limits, presence: Presence, channels: Channels) -> None:
        super().__init__(database, limits)
        self._presence = presence
        self._channels = channels

    async def CreateBatch(self, request: pb.CreateBatchRequest, context: Context) -> pb.CreateBatchResponse:
        """Forwards to a live worker that serves the models named; also when another was lost meanwhile."""
        models = wanted.of_inline(request)
        # Refused before anything is done for it.
        self._presence.live(models)
        request.options.request_id = request.options.request_id or str(uuid.uuid4())

        async def create(seen: SeenBeat) -> pb.CreateBatchResponse:
            stub = self._channels.batches(seen.beat.address)
            timeout_s = _timeout_s(context, CREATE_TIMEOUT_S)
            call = stub.CreateBatch(request, timeout=timeout_s, metadata=_metadata(context))
            return await self._presence.call(seen, call)

        return await self._forward(context, request.options.request_id, models, create, lambda: True)

    async def UploadBatch(
        self, request_iterator: AsyncIterator[pb.UploadBatchRequest], context: Context
    ) -> pb.UploadBatchResponse:
        """Forwards to a live worker that serves the model of the first line, piece by piece.

        What the worker has not taken is not read from the client. Another worker is tried only while all that was
        read is kept, which is little. A call whose worker hangs ends when that is restarted.
        """
        # Refused at once, not after the first line.
        self._presence.live(frozenset())
        uploaded = Upload(aiter(request_iterator), str(uuid.uuid4()))

        async def send(seen: SeenBeat) -> pb.UploadBatchResponse:
            stub = self._channels.blocking_batches(seen.beat.address)
            return await upload.send(stub, uploaded, _timeout_s(context, UPLOAD_TIMEOUT_S), _metadata(context))

        try:
            models = await uploaded.models()
            return await self._forward(context, uploaded.request_id, models, send, lambda: uploaded.is_repeatable)
        finally:
            await uploaded.close()

    async def _forward(
        self,
        context: Context,
        request_id: str,
        models: frozenset[str],
        call: Callable[[SeenBeat], Awaitable[T]],
        is_repeatable: Callable[[], bool],
    ) -> T:
        for seen in self._presence.live(models):
            try:
                answer = await call(seen)
                log.info("batch_forwarded", batch=answer.batch.id, worker_id=seen.beat.worker_id)
                return answer
            except (LostError, grpc.RpcError) as error:
                failure = error
            if not _is_for_another(failure):
                break
            log.warning("worker_unavailable", worker_id=seen.beat.worker_id, cause=_cause(failure))
            if not is_repeatable():
                break
        if isinstance(failure, grpc.RpcError) and (failure.code() is not UNAVAILABLE or _reason(failure)):
            await _pass_on(context, failure)
        raise self._presence.unreachable(seen, _cause(failure), request_id)


def _is_for_another(failure: LostError | grpc.RpcError) -> bool:
    """True when another worker may take what this one did not."""
    if isinstance(failure, LostError):
        return True
    return failure.code() is UNAVAILABLE and _reason(failure) in ("", WORKER_LOADING, WORKER_OFFLINE, WORKER_STALLED)


def _cause(failure: LostError | grpc.RpcError) -> str:
    return str(failure) if isinstance(failure, LostError) else failure.details() or ""


def _reason(error: grpc.RpcError) -> str:
    """The reason that a worker gave; empty for an error that none has made."""
    info = error_details_pb2.ErrorInfo()
    trailers: Any = error.trailing_metadata() or ()
    for key, value in trailers:
        if key == "grpc-status-details-bin":
            for detail in status_pb2.Status.FromString(value).details:
                if detail.Unpack(info):
                    return str(info.reason)
    return ""


async def _pass_on(context: Context, error: grpc.RpcError) -> NoReturn:
    """Ends the call as the worker did."""
    trailers: Any = tuple(error.trailing_metadata() or ())
    await context.abort(error.code(), error.details() or "", trailers)
    raise AssertionError("abort raises")


def _metadata(context: Context) -> calls.Metadata:
    """What makes the call known as the client's: its id and trace; and the client's token, which the worker checks
    again, as the gateway has none of its own."""
    given: Any = context.invocation_metadata() or ()
    token = tuple((key, str(value)) for key, value in given if key == "authorization")
    return (*calls.current().metadata(), *token)


def _timeout_s(context: Context, otherwise_s: float) -> float:
    remaining: float | None = context.time_remaining()
    return otherwise_s if remaining is None else remaining
