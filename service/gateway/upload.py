"""An upload on its way to a worker: peeked at to choose one, and kept while it is small, to try another."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import CancelledError
from typing import Any

import grpc

from service.calls import Metadata
from service.errors import ApiError
from service.gateway import wanted
from service.gateway.links import LostError
from service.streams import FromThread
from vllm_batch.v1 import batch_service_pb2 as pb
from vllm_batch.v1.batch_service_pb2_grpc import BatchServiceStub

# What is kept of an upload. The first line is within it, but for a very long one.
KEPT_BYTES = 256 << 10
# What a message costs beside its data: they may be tiny.
MESSAGE_BYTES = 500
# A client that sends nothing for this long has gone.
PIECE_TIMEOUT_S = 60.0

_BOM = b"\xef\xbb\xbf"


class Upload:
    """The messages of one upload. `request_id` is that of the client; the one given here where it gave none."""

    def __init__(self, source: AsyncIterator[pb.UploadBatchRequest], request_id: str) -> None:
        self._source = source
        self.request_id = request_id
        self._kept: list[pb.UploadBatchRequest] = []
        self._kept_bytes = 0
        self._is_at_end = False
        self._reading: asyncio.Future[pb.UploadBatchRequest | None] | None = None

    @property
    def is_repeatable(self) -> bool:
        """True while all that was read is kept."""
        return self._kept_bytes <= KEPT_BYTES

    async def models(self) -> frozenset[str]:
        """The model that the first line names. Raises DEADLINE_EXCEEDED for a client that does not send it."""
        head = b""
        try:
            async with asyncio.timeout(PIECE_TIMEOUT_S):
                async for message in self.messages():
                    head = (head + message.data).lstrip()
                    if b"\n" in head or not self.is_repeatable:
                        break
        except TimeoutError as error:
            why = f"upload stopped: no line came for {PIECE_TIMEOUT_S:.0f} s"
            raise ApiError(grpc.StatusCode.DEADLINE_EXCEEDED, why) from error
        return wanted.of_line(head.removeprefix(_BOM).partition(b"\n")[0])

    async def messages(self) -> AsyncIterator[pb.UploadBatchRequest]:
        """All messages from the first. Again only as long as `is_repeatable`."""
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
        """Ends a read that nobody waits for any more."""
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.gather(self._reading, return_exceptions=True)

    async def _read(self) -> bool:
        """Reads one message more into what is kept. False: there is none."""
        # Whoever waits for it may give up; what the client sends next must not be lost with that.
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
        return message


async def send(stub: BatchServiceStub, upload: Upload, timeout_s: float, metadata: Metadata) -> pb.UploadBatchResponse:
    """UploadBatch by gRPC's blocking API.

    The one for asyncio puts INTERNAL in the place of what a server says that ends a call before it has read all of
    it (github.com/grpc/grpc/issues/36066).
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
            # Not by us: then the answer would have been given up before.
            answer.set_exception(LostError("the channel was closed"))
        except grpc.RpcError as error:
            answer.set_exception(pieces.failure or error)

    call: Any = stub.UploadBatch.future(_until_aborted(pieces), timeout=timeout_s, metadata=metadata)
    call.add_done_callback(lambda _: loop.call_soon_threadsafe(hand_over))
    try:
        return await answer
    finally:
        call.cancel()
        pieces.abort()


def _until_aborted(pieces: FromThread[pb.UploadBatchRequest]) -> Iterator[pb.UploadBatchRequest]:
    """gRPC goes on asking when the call is over, and logs what it is told then."""
    with contextlib.suppress(CancelledError, ConnectionAbortedError):
        yield from pieces
