"""BatchService on the worker: accepts new batches, and serves reads."""

from collections.abc import AsyncIterator, Callable
from dataclasses import replace

from service.api import messages
from service.api.servicer import BatchServicer
from service.db.batches import Batch
from service.errors import ApiError, Violation, invalid
from service.rpc import call_context
from service.rpc.handlers import Context
from service.telemetry import logs
from service.worker.intake import Intake, file_place, inline_lines, inline_place
from service.worker.state import WorkerState
from vllm_batch.v1 import batch_service_pb2 as pb

log = logs.get("intake")


class WorkerServicer(BatchServicer):
    """Adds CreateBatch and UploadBatch to the calls that read. Calls `on_stored` after storing a batch."""

    def __init__(self, intake: Intake, state: WorkerState, on_stored: Callable[[], None]) -> None:
        super().__init__(intake.database, intake.limits)
        self._intake = intake
        self._state = state
        self._on_stored = on_stored

    async def GetServiceStatus(
        self, request: pb.GetServiceStatusRequest, context: Context
    ) -> pb.GetServiceStatusResponse:
        """Answers from this worker's phase."""
        try:
            return messages.accepting(self._state.accepting().models)
        except ApiError as refusal:
            return messages.not_accepting(refusal)

    async def CreateBatch(self, request: pb.CreateBatchRequest, context: Context) -> pb.CreateBatchResponse:
        """Stores a batch from inline requests."""
        self._state.accepting()
        if not request.requests:
            raise invalid([Violation("requests", "must contain at least one request")])
        lines = inline_lines(request)

        async def pieces() -> AsyncIterator[bytes]:
            yield lines

        batch = await self._store(request.options, pieces(), inline_place)
        return pb.CreateBatchResponse(batch=messages.batch_message(batch))

    async def UploadBatch(
        self, request_iterator: AsyncIterator[pb.UploadBatchRequest], context: Context
    ) -> pb.UploadBatchResponse:
        """Stores a batch from a stream: options first, then the file in pieces, then an explicit end.

        The end is explicit because a stream that the client aborts looks like one that ended.
        """
        self._state.accepting()
        first = await anext(aiter(request_iterator), None)
        if first is None or first.WhichOneof("piece") != "options":
            raise invalid([Violation("options", "must be the first message of an upload, even if empty")])

        async def pieces() -> AsyncIterator[bytes]:
            async for message in request_iterator:
                piece = message.WhichOneof("piece")
                if piece == "end":
                    return
                if piece != "data":
                    raise invalid([Violation("data", "unexpected message: only data may come between options and end")])
                yield message.data
            raise invalid([Violation("end", "missing: the upload stopped before its last message")])

        batch = await self._store(first.options, pieces(), file_place)
        return pb.UploadBatchResponse(batch=messages.batch_message(batch))

    async def _store(
        self, message: pb.BatchOptions, pieces: AsyncIterator[bytes], place: Callable[[int], str]
    ) -> Batch:
        call = call_context.current()
        options = replace(messages.options(message), traceparent=call.traceparent, tenant=call.caller.tenant)
        salted = pb.BatchOptions()
        salted.CopyFrom(message)
        salted.request_id = ""
        batch = await self._intake.store(
            options,
            salted.SerializeToString(deterministic=True),
            pieces,
            self._state.accepting(),
            place,
        )
        log.info("batch_stored", batch=messages.batch_name(batch.id), requests=batch.total)
        self._on_stored()
        return batch
