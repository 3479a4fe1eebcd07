"""The client for asyncio: the same calls, deadlines and retries as `client.Client`."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
import uuid
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable
from typing import Any, BinaryIO, TypeVar, Unpack

import grpc
import tenacity

from vllm_batch.calls import (
    CALL_TIMEOUT_S,
    DEFAULT_TARGET,
    PATIENCE_S,
    UPLOAD_TIMEOUT_S,
    CallError,
    retry_rules,
    tell_nobody,
)
from vllm_batch.channel import open_aio_channel, open_channel
from vllm_batch.uploads import Line, SubmitOptions, Upload, to_bytes
from vllm_batch.v1 import batch_service_pb2 as pb
from vllm_batch.v1 import batch_service_pb2_grpc

__all__ = ["AsyncClient", "CallError", "Line", "SubmitOptions"]

T = TypeVar("T")


class AsyncClient:
    """BatchService at `target`, to be made in a running event loop. UNAVAILABLE is retried for `patience_s`, as is a
    rate limit that was reached.

    TLS and token are as `security` says (`tls_ca`, `token` and others of `vllm_batch.channel`), or the environment.
    `on_retry(error, delay_s)` is called before each wait. All methods raise CallError.
    """

    def __init__(
        self,
        target: str = DEFAULT_TARGET,
        patience_s: float = PATIENCE_S,
        on_retry: Callable[[CallError, float], None] = tell_nobody,
        **security: Any,
    ) -> None:
        self.target = target
        self._rules = retry_rules(patience_s, on_retry)
        self._channel = open_aio_channel(target, **security)
        self._stub = batch_service_pb2_grpc.BatchServiceStub(self._channel)
        # By the blocking API, in a thread: the file is read there too, and the one for asyncio may put INTERNAL in the
        # place of what a server says that ends an upload early (github.com/grpc/grpc/issues/36066).
        self._upload_channel = open_channel(target, **security)
        self._upload_stub = batch_service_pb2_grpc.BatchServiceStub(self._upload_channel)

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the channels."""
        self._upload_channel.close()
        await self._channel.close(None)

    async def submit(self, file: BinaryIO, **options: Unpack[SubmitOptions]) -> pb.Batch:
        """Uploads a JSONL file that can be rewound, as one batch; exactly one, however often it had to be tried.

        The file is read in a thread.
        """
        upload = Upload(file, options)

        async def call() -> pb.Batch:
            sending: Any = self._upload_stub.UploadBatch.future(upload.messages(), timeout=UPLOAD_TIMEOUT_S)
            try:
                answer: pb.UploadBatchResponse = await asyncio.to_thread(sending.result)
                return answer.batch
            finally:
                sending.cancel()

        return await self._retry(call)

    async def submit_lines(
        self, lines: Iterable[Line] | AsyncIterable[Line], **options: Unpack[SubmitOptions]
    ) -> pb.Batch:
        """Uploads requests as `submit` does a file. They are kept in a temporary file for further tries."""
        with tempfile.TemporaryFile() as file:
            if isinstance(lines, AsyncIterable):
                async for line in lines:
                    file.write(to_bytes(line))
            else:
                file.writelines(map(to_bytes, lines))
            return await self.submit(file, **options)

    async def get(self, batch_id: str) -> pb.Batch:
        """One batch."""
        request = pb.GetBatchRequest(batch_id=batch_id)
        return (await self._retry(lambda: self._stub.GetBatch(request, timeout=CALL_TIMEOUT_S))).batch

    async def list(self, states: Iterable[str] = (), limit: int = 50) -> AsyncIterator[pb.Batch]:
        """Up to `limit` batches, newest first; `states` as `BATCH_STATE_COMPLETED`."""
        request = pb.ListBatchesRequest(states=states)
        left = limit
        while left > 0:
            request.page_size = min(left, 1000)
            page = await self._retry(lambda: self._stub.ListBatches(request, timeout=CALL_TIMEOUT_S))
            for batch in page.batches:
                yield batch
            left -= len(page.batches)
            request.page_token = page.next_page_token
            if not page.next_page_token:
                return

    async def watch(self, batch_id: str) -> AsyncIterator[pb.Batch]:
        """The batch now and whenever it changes, until it is terminal; goes on after a lost connection."""
        request = pb.WatchBatchRequest(batch_id=batch_id)
        async with contextlib.aclosing(self._stream(lambda: self._stub.WatchBatch(request))) as responses:
            async for response in responses:
                yield response.batch

    async def wait(self, batch_id: str, on_progress: Callable[[pb.Batch], None] = lambda batch: None) -> pb.Batch:
        """The batch once it is terminal; `on_progress` is told of it now and whenever it changes."""
        batch = pb.Batch()
        async for batch in self.watch(batch_id):
            on_progress(batch)
        return batch

    async def results(
        self, batch_id: str, *, follow: bool = False, order: str = "RESULT_ORDER_INPUT"
    ) -> AsyncIterator[pb.Result]:
        """The results of a batch; after a lost connection it goes on behind the last, without gap or repeat."""
        async with contextlib.aclosing(self.result_pages(batch_id, follow=follow, order=order)) as pages:
            async for page in pages:
                for result in page.results:
                    yield result

    async def result_pages(
        self,
        batch_id: str,
        *,
        follow: bool = False,
        order: str = "RESULT_ORDER_INPUT",
        resume_token: str = "",
    ) -> AsyncGenerator[pb.StreamResultsResponse, None]:
        """The results page by page, each with the token to go on behind it, for who wants to in another process."""
        request = pb.StreamResultsRequest(batch_id=batch_id, order=order, follow=follow, resume_token=resume_token)
        async with contextlib.aclosing(self._pages(request)) as pages:
            async for page in pages:
                yield page

    async def result_lines(
        self, batch_id: str, *, follow: bool = False, order: str = "RESULT_ORDER_INPUT"
    ) -> AsyncIterator[bytes]:
        """The same as lines of OpenAI's batch output, some whole ones at a time, to be written to a file as they are.

        Several times as fast as messages.
        """
        request = pb.StreamResultsRequest(batch_id=batch_id, order=order, follow=follow, format=pb.RESULT_FORMAT_JSONL)
        async with contextlib.aclosing(self._pages(request)) as pages:
            async for page in pages:
                yield page.jsonl

    async def result(self, batch_id: str, custom_id: str) -> pb.Result:
        """The result of one request; CallError with NOT_FOUND until it has one."""
        request = pb.GetResultRequest(batch_id=batch_id, custom_id=custom_id)
        return (await self._retry(lambda: self._stub.GetResult(request, timeout=CALL_TIMEOUT_S))).result

    async def retry(self, batch_id: str, request_id: str = "") -> pb.Batch:
        """A new batch of the requests of an ended one that failed or have no result."""
        request = pb.RetryBatchRequest(batch_id=batch_id, request_id=request_id or str(uuid.uuid4()))
        return (await self._retry(lambda: self._stub.RetryBatch(request, timeout=UPLOAD_TIMEOUT_S))).batch

    async def delete(self, batch_id: str) -> None:
        """Deletes a batch that has ended, with its requests and results."""
        request = pb.DeleteBatchRequest(batch_id=batch_id)
        await self._retry(lambda: self._stub.DeleteBatch(request, timeout=CALL_TIMEOUT_S))

    async def cancel(self, batch_id: str) -> pb.Batch:
        """Stops a batch."""
        request = pb.CancelBatchRequest(batch_id=batch_id)
        return (await self._retry(lambda: self._stub.CancelBatch(request, timeout=CALL_TIMEOUT_S))).batch

    async def _pages(self, request: pb.StreamResultsRequest) -> AsyncGenerator[pb.StreamResultsResponse, None]:
        async with contextlib.aclosing(self._stream(lambda: self._stub.StreamResults(request))) as pages:
            async for page in pages:
                request.resume_token = page.resume_token
                yield page

    async def _retry(self, call: Callable[[], Awaitable[T]]) -> T:
        async def attempt() -> T:
            try:
                return await call()
            except grpc.RpcError as error:
                raise CallError(error) from error

        return await tenacity.AsyncRetrying(**self._rules)(attempt)

    async def _stream(self, call: Callable[[], Any]) -> AsyncGenerator[Any, None]:
        """The responses of a stream that is begun again by `call` when it breaks."""
        stream: Any = None

        async def advance() -> Any:
            nonlocal stream
            if stream is None:
                stream = call()
            try:
                return await stream.read()
            except grpc.RpcError:
                stream = None
                raise

        try:
            while (response := await self._retry(advance)) is not grpc.aio.EOF:
                yield response
        finally:
            if stream is not None:
                stream.cancel()
