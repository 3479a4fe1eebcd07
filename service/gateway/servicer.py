"""BatchService on the gateway: forwards new work to a live worker, and answers the rest from Postgres."""

import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NoReturn, TypeVar

import grpc
from google.rpc import error_details_pb2, status_pb2

from service.api import messages, named_models
from service.api.named_models import Named
from service.auth.tokens import CALLER_HEADER
from service.db.connection import Database
from service.db.heartbeats import SeenBeat
from service.db.limits import Limits
from service.errors import DATABASE_UNAVAILABLE, WORKER_LOADING, WORKER_OFFLINE, WORKER_STALLED, ApiError, invalid
from service.gateway import upload
from service.gateway.upload import Upload
from service.insight.channels import Channels
from service.insight.explainer import Explainer
from service.insight.links import LostError
from service.insight.presence import Presence
from service.insight.servicer import ExplainedServicer
from service.rpc import call_context
from service.rpc.handlers import Context
from service.telemetry import logs
from service.webhook_targets import Networks
from vllm_batch.v1 import batch_service_pb2 as pb

# For clients that set no deadline.
CREATE_TIMEOUT_S = 60.0
UPLOAD_TIMEOUT_S = 3600.0

UNAVAILABLE = grpc.StatusCode.UNAVAILABLE

# Reasons of a worker that need not concern the next one: it may reach a Postgres that this one does not.
_ITS_OWN = (DATABASE_UNAVAILABLE, WORKER_LOADING, WORKER_OFFLINE, WORKER_STALLED)

T = TypeVar("T", pb.CreateBatchResponse, pb.UploadBatchResponse)

log = logs.get("gateway")


class GatewayServicer(ExplainedServicer):
    """Forwards CreateBatch and UploadBatch to workers; serves all other calls itself.

    If a worker does not answer or does not accept new work, the next one is tried. The first may have stored the batch
    all the same: every forwarded call has a request_id, so that the second does not store it again. The error names
    it, for clients that set none and call again.
    """

    def __init__(
        self,
        database: Database,
        limits: Limits,
        presence: Presence,
        channels: Channels,
        explainer: Explainer,
        webhook_networks: Networks = (),
    ) -> None:
        super().__init__(database, limits, explainer)
        self._webhook_networks = webhook_networks
        self._presence = presence
        self._channels = channels

    async def GetServiceStatus(
        self, request: pb.GetServiceStatusRequest, context: Context
    ) -> pb.GetServiceStatusResponse:
        """Answers from what is known about the workers, without a call or a query."""
        try:
            workers = self._presence.live()
        except ApiError as refusal:
            return messages.not_accepting(refusal)
        return messages.accepting(model for seen in workers for model in seen.beat.models)

    async def CreateBatch(self, request: pb.CreateBatchRequest, context: Context) -> pb.CreateBatchResponse:
        """Forwards to a live worker that serves the models named, and to the next one if that worker is lost."""
        self._check_webhook(request.options)
        named = named_models.of_inline(request)
        # Refuse before doing any work.
        self._presence.live(named)
        request.options.request_id = request.options.request_id or str(uuid.uuid4())

        async def create(seen: SeenBeat) -> pb.CreateBatchResponse:
            async with self._channels.use(seen.beat.address) as worker:
                timeout_s = _timeout_s(context, CREATE_TIMEOUT_S)
                call = worker.batches.CreateBatch(request, timeout=timeout_s, metadata=_metadata(context))
                return await self._presence.call(seen, call)

        return await self._forward(context, request.options.request_id, named, create, lambda: True)

    async def UploadBatch(
        self, request_iterator: AsyncIterator[pb.UploadBatchRequest], context: Context
    ) -> pb.UploadBatchResponse:
        """Forwards to a live worker, best one that serves the model of the first line, message by message.

        While the first lines name models that no worker serves now, it reads on to see whether all of them do.
        Reads from the client only as fast as the worker takes it. Tries another worker only while everything read is
        still kept (KEPT_BYTES). If the worker hangs, the call ends when that worker is restarted.
        """
        # Refuse at once, not after the first line.
        self._presence.live()
        uploaded = Upload(aiter(request_iterator), str(uuid.uuid4()))

        async def send(seen: SeenBeat) -> pb.UploadBatchResponse:
            async with self._channels.use(seen.beat.address) as worker:
                timeout_s = _timeout_s(context, UPLOAD_TIMEOUT_S)
                return await upload.send(worker.blocking_batches, uploaded, timeout_s, _metadata(context))

        try:
            named = await uploaded.models(self._presence.serves)
            self._check_webhook(uploaded.options)
            return await self._forward(context, uploaded.request_id, named, send, lambda: uploaded.is_repeatable)
        finally:
            await uploaded.close()

    def _check_webhook(self, options: pb.BatchOptions) -> None:
        """Raises INVALID_ARGUMENT for a target to which nothing would be sent."""
        tenant = call_context.current().caller.tenant
        wrong = messages.wrong_webhook(
            options.webhook, tenant, self._limits.quotas(), self._webhook_networks, "options.webhook"
        )
        if wrong:
            raise invalid(wrong)

    async def _forward(
        self,
        context: Context,
        request_id: str,
        named: Named,
        call: Callable[[SeenBeat], Awaitable[T]],
        is_repeatable: Callable[[], bool],
    ) -> T:
        for seen in self._presence.live(named):
            try:
                with self._presence.forwarding(seen):
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
        if isinstance(failure, grpc.RpcError) and (failure.code() is not UNAVAILABLE or _info(failure).reason):
            await _pass_on(context, failure)
        raise self._presence.unreachable(seen, _cause(failure), request_id)


def _is_for_another(failure: LostError | grpc.RpcError) -> bool:
    """True if another worker may accept what this one did not."""
    if isinstance(failure, LostError):
        return True
    # Which models are away, all workers know alike.
    info = _info(failure)
    return failure.code() is UNAVAILABLE and info.reason in ("", *_ITS_OWN) and "models" not in info.metadata


def _cause(failure: LostError | grpc.RpcError) -> str:
    return str(failure) if isinstance(failure, LostError) else failure.details() or ""


def _info(error: grpc.RpcError) -> error_details_pb2.ErrorInfo:
    """The reason that a worker gave, with its metadata; empty if the error does not come from a worker."""
    info = error_details_pb2.ErrorInfo()
    trailers: Any = error.trailing_metadata() or ()
    for key, value in trailers:
        if key == "grpc-status-details-bin":
            for detail in status_pb2.Status.FromString(value).details:
                if detail.Unpack(info):
                    return info
    return info


async def _pass_on(context: Context, error: grpc.RpcError) -> NoReturn:
    """Ends the call with the worker's status."""
    trailers: Any = tuple(error.trailing_metadata() or ())
    await context.abort(error.code(), error.details() or "", trailers)
    raise AssertionError("abort raises")


def _metadata(context: Context) -> call_context.Metadata:
    """The id and trace of the client's call, and the client's token: the worker checks that again, and the gateway has
    none of its own. A client that was known by its certificate is named: the worker believes gateways that, by theirs.
    """
    given: Any = context.invocation_metadata() or ()
    call = call_context.current()
    who = tuple((key, str(value)) for key, value in given if key == "authorization")
    if not who and call.caller.name:
        who = ((CALLER_HEADER, call.caller.name),)
    return (*call.metadata(), *who)


def _timeout_s(context: Context, otherwise_s: float) -> float:
    remaining: float | None = context.time_remaining()
    return otherwise_s if remaining is None else remaining
