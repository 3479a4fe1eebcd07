"""BatchService on the worker: takes new batches in, and reads."""

from collections.abc import AsyncIterator, Callable
from dataclasses import replace

from service import calls, logs, messages
from service.db.batches import Batch
from service.errors import Violation, invalid
from service.stored import Context, StoredServicer
from service.worker.intake import Intake, file_place, inline_lines, inline_place
from service.worker.life import Life
from vllm_batch.v1 import batch_service_pb2 as pb

log = logs.get("intake")


class WorkerServicer(StoredServicer):
    """CreateBatch and UploadBatch beside the calls that read. `on_stored` is told of each new batch."""

    def __init__(self, intake: Intake, life: Life, on_stored: Callable[[], None]) -> None:
        super().__init__(intake.database, intake.limits)
        self._intake = intake
        self._life = life
        self._on_stored = on_stored

    async def CreateBatch(self, request: pb.CreateBatchRequest, context: Context) -> pb.CreateBatchResponse:
        """Stores a batch from inline requests."""
        self._life.accepting()
        if not request.requests:
            raise invalid([Violation("requests", "there are none: a batch has at least one")])
        lines = inline_lines(request)

        async def pieces() -> AsyncIterator[bytes]:
            yield lines

        batch = await self._store(request.options, pieces(), inline_place)
        return pb.CreateBatchResponse(batch=messages.batch_message(batch))

    async def UploadBatch(
        self, request_iterator: AsyncIterator[pb.UploadBatchRequest], context: Context
    ) -> pb.UploadBatchResponse:
        """Stores a batch from a stream: options first, then the file in pieces, then its end.

        The end is said, as a stream that was broken off by its client ends like any other.
        """
        self._life.accepting()
        first = await anext(aiter(request_iterator), None)
        if first is None or first.WhichOneof("piece") != "options":
            raise invalid([Violation("options", "the first message of an upload holds the options, even if empty")])

        async def pieces() -> AsyncIterator[bytes]:
            async for message in request_iterator:
                piece = message.WhichOneof("piece")
                if piece == "end":
                    return
                if piece != "data":
                    raise invalid([Violation("data", "is all there may be between options and end")])
                yield message.data
            raise invalid([Violation("end", "the upload broke off: its last message holds the end")])

        batch = await self._store(first.options, pieces(), file_place)
        return pb.UploadBatchResponse(batch=messages.batch_message(batch))

    async def _store(
        self, message: pb.BatchOptions, pieces: AsyncIterator[bytes], place: Callable[[int], str]
    ) -> Batch:
        options = replace(messages.options(message), traceparent=calls.current().traceparent)
        salted = pb.BatchOptions()
        salted.CopyFrom(message)
        salted.request_id = ""
        batch = await self._intake.store(
            options,
            salted.SerializeToString(deterministic=True),
            pieces,
            self._life.accepting(),
            place,
        )
        log.info("batch_stored", batch=messages.batch_name(batch.id), requests=batch.total)
        self._on_stored()
        return batch
