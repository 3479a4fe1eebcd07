"""An upload on its way to a worker: read ahead to choose one, and kept while small, so that another can be tried."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import CancelledError
from typing import Any

import grpc

from service.api import named_models
from service.api.named_models import Named
from service.api.uploads import BOM, PIECE_TIMEOUT_S
from service.errors import ApiError
from service.gateway.thread_stream import FromThread
from service.insight.links import LostError
from service.rpc.call_context import Metadata
from vllm_batch.v1 import batch_service_pb2 as pb
from vllm_batch.v1.batch_service_pb2_grpc import BatchServiceStub

# How much of an upload is kept, and read ahead at most. The first line fits unless it is very long.
KEPT_BYTES = 256 << 10
# The overhead of a message: its data may be tiny.
MESSAGE_BYTES = 500


class Upload:
    """The messages of one upload. `request_id` is the client's or, if it sets none, the one given here."""

    def __init__(self, source: AsyncIterator[pb.UploadBatchRequest], request_id: str) -> None:
        self._source = source
        self.request_id = request_id
        # The client's, once they have arrived.
        self.options = pb.BatchOptions()
        self._kept: list[pb.UploadBatchRequest] = []
        self._kept_bytes = 0
        self._is_at_end = False
        self._reading: asyncio.Future[pb.UploadBatchRequest | None] | None = None

    @property
    def is_repeatable(self) -> bool:
        """True while everything read is still kept."""
        return self._kept_bytes <= KEPT_BYTES

    async def models(self, is_enough: Callable[[str], bool]) -> Named:
        """The models that its lines name, read until `is_enough` of one, or a line names none.

        Reads no further than what is kept. Raises DEADLINE_EXCEEDED if the client does not send the first line in time.
        """
        names: set[str] = set()
        rest = b""
        try:
            async with asyncio.timeout(PIECE_TIMEOUT_S):
                async for message in self.messages():
                    is_end = message.WhichOneof("piece") == "end"
                    *lines, rest = (rest + message.data).split(b"\n")
                    for line in (*lines, rest) if is_end else lines:
                        line = line.strip().removeprefix(BOM)
                        if not line:
                            continue
                        model = named_models.of_line(line)
                        if not model:
                            return Named(frozenset(names))
                        if model in names:
                            continue
                        names.add(model)
                        if is_enough(model):
                            return Named(frozenset(names))
                    if is_end:
                        return Named(frozenset(names), are_all=True)
                    if not self.is_repeatable:
                        break
        except TimeoutError as error:
            if not names:
                why = f"upload stopped: the first line did not arrive within {PIECE_TIMEOUT_S:.0f} s"
                raise ApiError(grpc.StatusCode.DEADLINE_EXCEEDED, why) from error
        return Named(frozenset(names))

    async def messages(self) -> AsyncIterator[pb.UploadBatchRequest]:
        """All messages from the first. Can be repeated only while `is_repeatable`."""
        place = 0
        while True:
            if place == len(self._kept):
                if not self.is_repeatable:
                    self._kept, place = [], 0
                if not await self._read():
                    return
            message = self._kept[place]
            place += 1
            yield message

    async def close(self) -> None:
        """Cancels a read that nobody waits for any more."""
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.gather(self._reading, return_exceptions=True)

    async def _read(self) -> bool:
        """Reads one more message and keeps it. False: there is none."""
        # Shielded: if the caller gives up, the client's next message must not be lost.
        self._reading = self._reading or asyncio.ensure_future(self._next())
        message = await asyncio.shield(self._reading)
        self._reading = None
        if message is None:
            self._is_at_end = True
            return False
        self._kept.append(message)
        self._kept_bytes += len(message.data) + MESSAGE_BYTES
        return True

    async def _next(self) -> pb.UploadBatchRequest | None:
        message = None if self._is_at_end else await anext(self._source, None)
        if message is not None and message.WhichOneof("piece") == "options":
            self.request_id = message.options.request_id = message.options.request_id or self.request_id
            self.options = message.options
        return message


async def send(stub: BatchServiceStub, upload: Upload, timeout_s: float, metadata: Metadata) -> pb.UploadBatchResponse:
    """UploadBatch through gRPC's blocking API.

    If a server ends a call before it has read all of it, the asyncio API reports INTERNAL instead of the server's
    status (github.com/grpc/grpc/issues/36066).
    """
    loop = asyncio.get_running_loop()
    pieces = FromThread(upload.messages(), loop)
    answer: asyncio.Future[pb.UploadBatchResponse] = loop.create_future()

    def hand_over() -> None:
        if answer.done():
            return
        try:
            answer.set_result(call.result())
        except grpc.FutureCancelledError:
            # Not cancelled by us: then `answer` would be done already.
            answer.set_exception(LostError("the channel was closed"))
        except grpc.RpcError as error:
            # Cancelled by nobody: the channel was closed because the worker is gone.
            lost = LostError("the channel was closed") if error.code() is grpc.StatusCode.CANCELLED else error
            answer.set_exception(pieces.failure or lost)

    call: Any = stub.UploadBatch.future(_until_aborted(pieces), timeout=timeout_s, metadata=metadata)
    call.add_done_callback(lambda _: loop.call_soon_threadsafe(hand_over))
    try:
        return await answer
    finally:
        call.cancel()
        pieces.abort()


def _until_aborted(pieces: FromThread[pb.UploadBatchRequest]) -> Iterator[pb.UploadBatchRequest]:
    """Ends quietly: gRPC keeps reading after the call has ended, and would log these errors."""
    with contextlib.suppress(CancelledError, ConnectionAbortedError):
        yield from pieces
