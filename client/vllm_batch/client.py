"""A small synchronous client: one channel, deadlines on every call, retries as the server asks for them."""

from __future__ import annotations

import contextlib
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator
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
from vllm_batch.channel import open_channel
from vllm_batch.uploads import Line, SubmitOptions, Upload, to_bytes
from vllm_batch.v1 import batch_service_pb2 as pb
from vllm_batch.v1 import batch_service_pb2_grpc

__all__ = ["DEFAULT_TARGET", "PATIENCE_S", "CallError", "Client", "Line", "SubmitOptions"]

T = TypeVar("T")


class Client:
    """BatchService at `target`. UNAVAILABLE is retried for `patience_s`, after the delay that the server names, as is
    a rate limit that was reached.

    TLS and token are as `security` says (`tls_ca`, `token` and others of `vllm_batch.channel`), or the environment.
    `on_retry(error, delay_s)` is called before each wait. All methods raise CallError. For asyncio: `aio.AsyncClient`.
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
        self._channel = open_channel(target, **security)
        self._stub = batch_service_pb2_grpc.BatchServiceStub(self._channel)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the channel."""
        self._channel.close()

    def submit(self, file: BinaryIO, **options: Unpack[SubmitOptions]) -> pb.Batch:
        """Uploads a JSONL file that can be rewound, as one batch; exactly one, however often it had to be tried."""
        upload = Upload(file, options)
        return self._retry(lambda: self._stub.UploadBatch(upload.messages(), timeout=UPLOAD_TIMEOUT_S).batch)

    def submit_lines(self, lines: Iterable[Line], **options: Unpack[SubmitOptions]) -> pb.Batch:
        """Uploads requests as `submit` does a file. They are kept in a temporary file for further tries."""
        with tempfile.TemporaryFile() as file:
            file.writelines(map(to_bytes, lines))
            return self.submit(file, **options)

    def get(self, batch_id: str) -> pb.Batch:
        """One batch."""
        request = pb.GetBatchRequest(batch_id=batch_id)
        return self._retry(lambda: self._stub.GetBatch(request, timeout=CALL_TIMEOUT_S).batch)

    def list(self, states: Iterable[str] = (), limit: int = 50) -> Iterator[pb.Batch]:
        """Up to `limit` batches, newest first; `states` as `BATCH_STATE_COMPLETED`."""
        request = pb.ListBatchesRequest(states=states)
        left = limit
        while left > 0:
            request.page_size = min(left, 1000)
            page = self._retry(lambda: self._stub.ListBatches(request, timeout=CALL_TIMEOUT_S))
            yield from page.batches
            left -= len(page.batches)
            request.page_token = page.next_page_token
            if not page.next_page_token:
                return

    def watch(self, batch_id: str) -> Iterator[pb.Batch]:
        """The batch now and whenever it changes, until it is terminal; goes on after a lost connection."""
        request = pb.WatchBatchRequest(batch_id=batch_id)
        for response in self._stream(lambda: self._stub.WatchBatch(request)):
            yield response.batch

    def wait(self, batch_id: str, on_progress: Callable[[pb.Batch], None] = lambda batch: None) -> pb.Batch:
        """The batch once it is terminal; `on_progress` is told of it now and whenever it changes."""
        batch = pb.Batch()
        for batch in self.watch(batch_id):
            on_progress(batch)
        return batch

    def results(self, batch_id: str, *, follow: bool = False, order: str = "RESULT_ORDER_INPUT") -> Iterator[pb.Result]:
        """The results of a batch; after a lost connection it goes on behind the last, without gap or repeat."""
        for page in self.result_pages(batch_id, follow=follow, order=order):
            yield from page.results

    def result_pages(
        self,
        batch_id: str,
        *,
        follow: bool = False,
        order: str = "RESULT_ORDER_INPUT",
        resume_token: str = "",
    ) -> Iterator[pb.StreamResultsResponse]:
        """The results page by page, each with the token to go on behind it, for who wants to in another process."""
        request = pb.StreamResultsRequest(batch_id=batch_id, order=order, follow=follow, resume_token=resume_token)
        yield from self._pages(request)

    def result_lines(
        self, batch_id: str, *, follow: bool = False, order: str = "RESULT_ORDER_INPUT"
    ) -> Iterator[bytes]:
        """The same as lines of OpenAI's batch output, some whole ones at a time, to be written to a file as they are.

        Several times as fast as messages.
        """
        request = pb.StreamResultsRequest(batch_id=batch_id, order=order, follow=follow, format=pb.RESULT_FORMAT_JSONL)
        for page in self._pages(request):
            yield page.jsonl

    def result(self, batch_id: str, custom_id: str) -> pb.Result:
        """The result of one request; CallError with NOT_FOUND until it has one."""
        request = pb.GetResultRequest(batch_id=batch_id, custom_id=custom_id)
        return self._retry(lambda: self._stub.GetResult(request, timeout=CALL_TIMEOUT_S).result)

    def retry(self, batch_id: str, request_id: str = "") -> pb.Batch:
        """A new batch of the requests of an ended one that failed or have no result."""
        request = pb.RetryBatchRequest(batch_id=batch_id, request_id=request_id or str(uuid.uuid4()))
        return self._retry(lambda: self._stub.RetryBatch(request, timeout=UPLOAD_TIMEOUT_S).batch)

    def delete(self, batch_id: str) -> None:
        """Deletes a batch that has ended, with its requests and results."""
        request = pb.DeleteBatchRequest(batch_id=batch_id)
        self._retry(lambda: self._stub.DeleteBatch(request, timeout=CALL_TIMEOUT_S))

    def cancel(self, batch_id: str) -> pb.Batch:
        """Stops a batch."""
        request = pb.CancelBatchRequest(batch_id=batch_id)
        return self._retry(lambda: self._stub.CancelBatch(request, timeout=CALL_TIMEOUT_S).batch)

    def accepting(self) -> str:
        """Why new work is not accepted now; empty when it is."""
        try:
            # A batch without requests is never stored: it is refused as UNAVAILABLE or as INVALID_ARGUMENT.
            self._stub.CreateBatch(pb.CreateBatchRequest(), timeout=5)
        except grpc.RpcError as error:
            failed = CallError(error)
            return "" if failed.code is grpc.StatusCode.INVALID_ARGUMENT else failed.message
        return ""

    def _pages(self, request: pb.StreamResultsRequest) -> Iterator[pb.StreamResultsResponse]:
        for page in self._stream(lambda: self._stub.StreamResults(request)):
            request.resume_token = page.resume_token
            yield page

    def _retry(self, call: Callable[[], T]) -> T:
        def attempt() -> T:
            try:
                return call()
            except grpc.RpcError as error:
                raise CallError(error) from error

        return tenacity.Retrying(**self._rules)(attempt)

    def _stream(self, call: Callable[[], Any]) -> Iterator[Any]:
        """The responses of a stream that is begun again by `call` when it breaks."""
        stream: Any = None

        def advance() -> Any:
            nonlocal stream
            if stream is None:
                stream = call()
            try:
                return next(stream, None)
            except grpc.RpcError:
                stream = None
                raise

        try:
            while (response := self._retry(advance)) is not None:
                yield response
        finally:
            if stream is not None:
                with contextlib.suppress(grpc.RpcError):
                    stream.cancel()
