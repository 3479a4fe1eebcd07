"""A small synchronous client: one channel, deadlines on every call, retries as the server asks for them."""

from __future__ import annotations

import contextlib
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, BinaryIO, TypeVar

import grpc
import tenacity
from google.rpc import error_details_pb2, status_pb2

from vllm_batch.channel import open_channel
from vllm_batch.v1 import batch_service_pb2 as pb
from vllm_batch.v1 import batch_service_pb2_grpc

DEFAULT_TARGET = "127.0.0.1:50051"
CALL_TIMEOUT_S = 30.0
UPLOAD_TIMEOUT_S = 3600.0
# For how long UNAVAILABLE is retried: a model of some size is loaded in less.
PATIENCE_S = 600.0
PIECE_BYTES = 256 << 10

T = TypeVar("T")


class CallError(Exception):
    """A call that failed for good, with what google.rpc details say of it."""

    def __init__(self, error: grpc.RpcError) -> None:
        self.code: grpc.StatusCode = error.code()
        self.message: str = error.details() or self.code.name
        self.reason = ""
        self.metadata: dict[str, str] = {}
        self.retry_delay_s: float | None = None
        # (field, description) of each wrong field of an INVALID_ARGUMENT.
        self.violations: list[tuple[str, str]] = []
        trailers: Any = error.trailing_metadata() or ()
        for key, value in trailers:
            if key == "grpc-status-details-bin":
                self._read(value)
        super().__init__(f"{self.code.name}: {self.message}")

    def _read(self, packed: bytes) -> None:
        info, retry, bad = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo(), error_details_pb2.BadRequest()
        for detail in status_pb2.Status.FromString(packed).details:
            if detail.Unpack(info):
                self.reason, self.metadata = info.reason, dict(info.metadata)
            elif detail.Unpack(retry):
                self.retry_delay_s = retry.retry_delay.ToMilliseconds() / 1000
            elif detail.Unpack(bad):
                self.violations = [(v.field, v.description) for v in bad.field_violations]


class Client:
    """BatchService at `target`. UNAVAILABLE is retried for `patience_s`, after the delay that the server names, as is
    a rate limit that was reached.

    TLS and token are as `security` says (`tls_ca`, `token` and others of `vllm_batch.channel`), or the environment.
    `on_retry(error, delay_s)` is called before each wait. All methods raise CallError.
    """

    def __init__(
        self,
        target: str = DEFAULT_TARGET,
        patience_s: float = PATIENCE_S,
        on_retry: Callable[[CallError, float], None] = lambda error, delay_s: None,
        **security: Any,
    ) -> None:
        self.target = target
        self._patience_s = patience_s
        self._on_retry = on_retry
        self._channel = open_channel(target, **security)
        self._stub = batch_service_pb2_grpc.BatchServiceStub(self._channel)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the channel."""
        self._channel.close()

    def submit(
        self,
        file: BinaryIO,
        *,
        request_id: str = "",
        metadata: Mapping[str, str] | None = None,
        priority: int = 0,
        completion_window_s: float | None = None,
        on_sent: Callable[[int], None] = lambda sent: None,
    ) -> pb.Batch:
        """Uploads a JSONL file that can be rewound, as one batch; exactly one, however often it had to be tried.

        `on_sent` is told how many bytes have gone out; it starts again from 0 with each try.
        """
        options = pb.BatchOptions(
            # Made once, before the first try: it is what makes the others harmless.
            request_id=request_id or str(uuid.uuid4()),
            metadata=dict(metadata or {}),
            priority=priority,
        )
        if completion_window_s is not None:
            options.completion_window.FromMilliseconds(round(completion_window_s * 1000))

        def messages() -> Iterator[pb.UploadBatchRequest]:
            yield pb.UploadBatchRequest(options=options)
            sent = 0
            while piece := file.read(PIECE_BYTES):
                yield pb.UploadBatchRequest(data=piece)
                sent += len(piece)
                on_sent(sent)
            yield pb.UploadBatchRequest(end=pb.UploadEnd())

        def upload() -> pb.Batch:
            file.seek(0)
            return self._stub.UploadBatch(messages(), timeout=UPLOAD_TIMEOUT_S).batch

        return self._retry(upload)

    def submit_lines(self, lines: Iterable[bytes | str], **options: Any) -> pb.Batch:
        """Uploads the lines of a JSONL file, as `submit` does. They are kept in a temporary file for further tries."""
        with tempfile.TemporaryFile() as file:
            for line in lines:
                data = line.encode() if isinstance(line, str) else line
                file.write(data if data.endswith(b"\n") else data + b"\n")
            return self.submit(file, **options)

    def get(self, batch_id: str) -> pb.Batch:
        """One batch."""
        request = pb.GetBatchRequest(batch_id=batch_id)
        return self._retry(lambda: self._stub.GetBatch(request, timeout=CALL_TIMEOUT_S).batch)

    def list(self, states: Iterable[str] = (), limit: int = 50) -> Iterator[pb.Batch]:
        """Up to `limit` batches, newest first; `states` as `BATCH_STATE_COMPLETED`."""
        wanted = tuple(states)
        token, left = "", limit
        while left > 0:
            request = pb.ListBatchesRequest(page_size=min(left, 1000), page_token=token, states=wanted)
            page = self._retry(lambda request=request: self._stub.ListBatches(request, timeout=CALL_TIMEOUT_S))  # type: ignore[misc]
            yield from page.batches
            left -= len(page.batches)
            token = page.next_page_token
            if not token:
                return

    def watch(self, batch_id: str) -> Iterator[pb.Batch]:
        """The batch now and whenever it changes, until it is terminal; goes on after a lost connection."""
        request = pb.WatchBatchRequest(batch_id=batch_id)
        for response in self._stream(lambda: self._stub.WatchBatch(request)):
            yield response.batch

    def results(
        self,
        batch_id: str,
        *,
        follow: bool = False,
        order: str = "RESULT_ORDER_INPUT",
        resume_token: str = "",
    ) -> Iterator[pb.StreamResultsResponse]:
        """The results of a batch; after a lost connection it goes on behind the last, without gap or repeat."""
        last = resume_token

        def call() -> Iterator[pb.StreamResultsResponse]:
            return self._stub.StreamResults(
                pb.StreamResultsRequest(batch_id=batch_id, order=order, follow=follow, resume_token=last)
            )

        for response in self._stream(call):
            last = response.resume_token
            yield response

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

    def _retry(self, call: Callable[[], T]) -> T:
        def attempt() -> T:
            try:
                return call()
            except grpc.RpcError as error:
                raise CallError(error) from error

        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(_is_retryable),
            wait=_wait_s,
            stop=tenacity.stop_after_delay(self._patience_s),
            before_sleep=self._tell,
            reraise=True,
        )
        return retrying(attempt)

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

    def _tell(self, state: tenacity.RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        if isinstance(error, CallError) and state.next_action is not None:
            self._on_retry(error, state.next_action.sleep)


def _is_retryable(error: BaseException) -> bool:
    return isinstance(error, CallError) and (
        error.code is grpc.StatusCode.UNAVAILABLE or error.reason == "RATE_LIMITED"
    )


def _wait_s(state: tenacity.RetryCallState) -> float:
    """What the server asked for; else from half a second on, doubling up to 10 s."""
    error = state.outcome.exception() if state.outcome else None
    asked = error.retry_delay_s if isinstance(error, CallError) else None
    return asked if asked is not None else min(10.0, 0.5 * 2 ** (state.attempt_number - 1))
