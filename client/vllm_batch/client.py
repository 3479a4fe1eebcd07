"""The synchronous client: one channel, a deadline on every call, retries as the server asks for them."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, BinaryIO, TypeVar, Unpack

import grpc
import tenacity

from vllm_batch import requests
from vllm_batch.channel import DEFAULT_TARGET, check_target, open_channel
from vllm_batch.errors import CallError
from vllm_batch.retries import (
    CALL_TIMEOUT_S,
    PATIENCE_S,
    STATUS_TIMEOUT_S,
    UPLOAD_TIMEOUT_S,
    WEBHOOK_TIMEOUT_S,
    OnRetry,
    retry_rules,
)
from vllm_batch.uploads import Line, SubmitOptions, Upload, check_lines, to_bytes
from vllm_batch.v1 import batch_service_pb2 as pb
from vllm_batch.v1 import batch_service_pb2_grpc, host_service_pb2_grpc, webhook_service_pb2_grpc
from vllm_batch.v1 import host_service_pb2 as hpb
from vllm_batch.v1 import webhook_service_pb2 as wpb

T = TypeVar("T")
ALL = "RESULT_FILTER_UNSPECIFIED"


class Client:
    """BatchService at `target`, host:port. Every method raises CallError.

    UNAVAILABLE and rate limits are retried for up to `patience_s`, after the delay that the server asks for;
    `on_retry(error, delay_s)` is called before each wait. TLS and the token come from `security` (`tls_ca`, `token` and
    the other arguments listed in `vllm_batch.channel`) or from the environment.
    """

    def __init__(
        self,
        target: str = DEFAULT_TARGET,
        patience_s: float = PATIENCE_S,
        on_retry: OnRetry | None = None,
        **security: Any,
    ) -> None:
        check_target(target)
        self.target = target
        self._is_closed = False
        self._rules = retry_rules(patience_s, on_retry, lambda: self._is_closed)
        self._stream_rules = retry_rules(patience_s, on_retry, lambda: self._is_closed, of_stream=True)
        self._channel = open_channel(target, **security)
        self._stub = batch_service_pb2_grpc.BatchServiceStub(self._channel)
        self._host_stub = host_service_pb2_grpc.HostServiceStub(self._channel)
        self._webhook_stub = webhook_service_pb2_grpc.WebhookServiceStub(self._channel)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._is_closed = True
        self._channel.close()

    def service_status(self) -> pb.GetServiceStatusResponse:
        """Whether new work is accepted now, why not, and which models are served."""
        return self._retry(self._service_status)

    def accepting(self) -> str:
        """Why new work is not accepted now; empty when it is. Never retries, raises no CallError."""
        try:
            return self._service_status().message
        except grpc.RpcError as error:
            return CallError(error).message

    def submit(self, file: BinaryIO, **options: Unpack[SubmitOptions]) -> pb.Batch:
        """Upload a seekable JSONL file as one batch; exactly one, however often the upload is retried.

        What reading the file raises is raised here.
        """
        upload = Upload(file, options)
        with upload.reading():
            return self._retry(lambda: self._stub.UploadBatch(upload.messages(), timeout=UPLOAD_TIMEOUT_S).batch)

    def submit_lines(self, lines: Iterable[Line], **options: Unpack[SubmitOptions]) -> pb.Batch:
        """Upload requests as `submit` uploads a file. A temporary file keeps them for retries."""
        check_lines(lines)
        with tempfile.TemporaryFile() as file:
            file.writelines(map(to_bytes, lines))
            return self.submit(file, **options)

    def get(self, batch_id: str) -> pb.Batch:
        """One batch."""
        request = requests.message(pb.GetBatchRequest, batch_id=batch_id)
        return self._retry(lambda: self._stub.GetBatch(request, timeout=CALL_TIMEOUT_S).batch)

    def list(self, states: Iterable[str] = (), limit: int = 50, tenant: str = "") -> Iterator[pb.Batch]:
        """Up to `limit` batches, newest first, in any of `states`, such as `BATCH_STATE_COMPLETED`; none: all.

        Those of `tenant`, which only operators may ask for unless it is their own; empty: all that the caller may see.
        """
        listing = requests.Listing(requests.message(pb.ListBatchesRequest, states=states, tenant=tenant), limit)
        while not listing.is_complete:
            page = self._retry(lambda: self._stub.ListBatches(listing.request, timeout=CALL_TIMEOUT_S))
            listing.came(len(page.batches), page.next_page_token)
            yield from page.batches

    def tenants(self) -> Sequence[pb.Tenant]:
        """The caller's tenant with its share, queue, tokens used and limits; for operators all tenants."""
        return self._retry(lambda: self._stub.ListTenants(pb.ListTenantsRequest(), timeout=CALL_TIMEOUT_S).tenants)

    def hosts(self, name: str = "") -> Iterator[hpb.Host]:
        """All hosts by name, or the one called `name`; for operators."""
        request = requests.message(hpb.ListHostsRequest, page_size=requests.HOSTS_PAGE, name=name)
        while True:
            page = self._retry(lambda: self._host_stub.ListHosts(request, timeout=CALL_TIMEOUT_S))
            yield from page.hosts
            request.page_token = page.next_page_token
            if not page.next_page_token:
                return

    def drain_host(self, name: str, reason: str = "") -> None:
        """Order a host to drain: it gets no new work, finishes what is in its engines and releases the rest."""
        request = requests.message(hpb.DrainHostRequest, name=name, reason=reason)
        self._retry(lambda: self._host_stub.DrainHost(request, timeout=CALL_TIMEOUT_S))

    def resume_host(self, name: str) -> None:
        """Give a drained host work again."""
        request = requests.message(hpb.ResumeHostRequest, name=name)
        self._retry(lambda: self._host_stub.ResumeHost(request, timeout=CALL_TIMEOUT_S))

    def forget_host(self, name: str) -> None:
        """Remove what is stored about a host that is gone for good."""
        request = requests.message(hpb.ForgetHostRequest, name=name)
        self._retry(lambda: self._host_stub.ForgetHost(request, timeout=CALL_TIMEOUT_S))

    def deliveries(
        self, states: Iterable[str] = (), limit: int = 50, batch_id: str = "", tenant: str = ""
    ) -> Iterator[wpb.Delivery]:
        """Up to `limit` deliveries of webhooks, newest first, in any of `states`, such as `DELIVERY_STATE_GIVEN_UP`;
        none: all.

        Only that of `batch_id`, and only those of `tenant`; empty: all that the caller may see.
        """
        request = requests.message(wpb.ListDeliveriesRequest, states=states, batch_id=batch_id, tenant=tenant)
        listing = requests.Listing(request, limit)
        while not listing.is_complete:
            page = self._retry(lambda: self._webhook_stub.ListDeliveries(listing.request, timeout=CALL_TIMEOUT_S))
            listing.came(len(page.deliveries), page.next_page_token)
            yield from page.deliveries

    def test_webhook(self, url: str = "", tenant: str = "") -> wpb.TestWebhookResponse:
        """Send an event of the type `webhook.test` to `url`, or to the target of `tenant`; none: the caller's tenant's.

        A target that fails is no CallError: `error` of the answer says why.
        """
        request = requests.message(wpb.TestWebhookRequest, url=url, tenant=tenant)
        return self._retry(lambda: self._webhook_stub.TestWebhook(request, timeout=WEBHOOK_TIMEOUT_S))

    def replay_deliveries(self, *, delivery_id: str = "", batch_id: str = "") -> Sequence[wpb.Delivery]:
        """Send an event again, by its own id or that of its batch: give one of the two. It keeps its id."""
        request = requests.replay(delivery_id, batch_id)
        return self._retry(lambda: self._webhook_stub.ReplayDeliveries(request, timeout=CALL_TIMEOUT_S).deliveries)

    def watch(self, batch_id: str) -> Iterator[pb.Batch]:
        """The batch now and after each change, until it has ended. Survives lost connections."""
        request = requests.message(pb.WatchBatchRequest, batch_id=batch_id)
        for response in self._stream(lambda: self._stub.WatchBatch(request)):
            yield response.batch

    def wait(self, batch_id: str, on_progress: Callable[[pb.Batch], None] | None = None) -> pb.Batch:
        """The batch once it has ended. `on_progress(batch)` is called now and after each change."""
        batch = pb.Batch()
        for batch in self.watch(batch_id):
            if on_progress is not None:
                on_progress(batch)
        return batch

    def results(
        self, batch_id: str, *, follow: bool = False, order: str = "RESULT_ORDER_INPUT", filter: str = ALL
    ) -> Iterator[pb.Result]:
        """The results so far; with `follow`, until the batch has ended. `filter` `RESULT_FILTER_FAILED` or
        `RESULT_FILTER_SUCCEEDED`: only those.

        After a lost connection it resumes after the last result, without gap or repeat.
        """
        for page in self.result_pages(batch_id, follow=follow, order=order, filter=filter):
            yield from page.results

    def result_pages(
        self,
        batch_id: str,
        *,
        follow: bool = False,
        order: str = "RESULT_ORDER_INPUT",
        resume_token: str = "",
        filter: str = ALL,
    ) -> Iterator[pb.StreamResultsResponse]:
        """The results page by page. Each page has the token to resume after it, in another process if need be."""
        yield from self._pages(
            requests.results(batch_id, follow=follow, order=order, resume_token=resume_token, filter=filter)
        )

    def result_lines(
        self, batch_id: str, *, follow: bool = False, order: str = "RESULT_ORDER_INPUT", filter: str = ALL
    ) -> Iterator[bytes]:
        """The results as OpenAI batch output, several whole lines at a time: write them to a file unchanged.

        Several times as fast as `results`.
        """
        lines = requests.Lines()
        for piece in self.result_bytes(batch_id, follow=follow, order=order, filter=filter):
            if some := lines.take(piece):
                yield some

    def result_bytes(
        self, batch_id: str, *, follow: bool = False, order: str = "RESULT_ORDER_INPUT", filter: str = ALL
    ) -> Iterator[bytes]:
        """The same bytes as of `result_lines`, with lines of over 1 MiB in pieces: memory stays flat at any size."""
        for page in self._pages(requests.results(batch_id, follow=follow, order=order, as_lines=True, filter=filter)):
            yield page.jsonl

    def result_line(self, batch_id: str, result: pb.Result) -> Iterator[bytes]:
        """The line, in pieces, of a result whose body was left out of its message (`omitted_body_bytes`)."""
        for page in self._pages(requests.line(batch_id, result)):
            yield page.jsonl
            if page.jsonl.endswith(b"\n"):
                return

    def result(self, batch_id: str, custom_id: str) -> pb.Result:
        """The result of one request. Raises NOT_FOUND until the request has finished."""
        request = requests.message(pb.GetResultRequest, batch_id=batch_id, custom_id=custom_id)
        return self._retry(lambda: self._stub.GetResult(request, timeout=CALL_TIMEOUT_S).result)

    def errors(self, batch_id: str) -> pb.ListErrorsResponse:
        """The kinds of failure among the results of a batch, each with its count and an example."""
        request = requests.message(pb.ListErrorsRequest, batch_id=batch_id)
        return self._retry(lambda: self._stub.ListErrors(request, timeout=CALL_TIMEOUT_S))

    def retry(self, batch_id: str, request_id: str = "") -> pb.Batch:
        """Create a batch of the requests of an ended batch that failed or have no result."""
        request = requests.retry(batch_id, request_id)
        return self._retry(lambda: self._stub.RetryBatch(request, timeout=UPLOAD_TIMEOUT_S).batch)

    def delete(self, batch_id: str) -> None:
        """Delete an ended batch with its requests and results."""
        request = requests.message(pb.DeleteBatchRequest, batch_id=batch_id)
        self._retry(lambda: self._stub.DeleteBatch(request, timeout=CALL_TIMEOUT_S))

    def cancel(self, batch_id: str) -> pb.Batch:
        """Cancel a batch. Finished results are kept."""
        request = requests.message(pb.CancelBatchRequest, batch_id=batch_id)
        return self._retry(lambda: self._stub.CancelBatch(request, timeout=CALL_TIMEOUT_S).batch)

    def _service_status(self) -> pb.GetServiceStatusResponse:
        return self._stub.GetServiceStatus(pb.GetServiceStatusRequest(), timeout=STATUS_TIMEOUT_S)

    def _pages(self, request: pb.StreamResultsRequest) -> Iterator[pb.StreamResultsResponse]:
        for page in self._stream(lambda: self._stub.StreamResults(request)):
            request.resume_token = page.resume_token
            yield page

    def _retry(self, call: Callable[[], T], *, of_stream: bool = False) -> T:
        def attempt() -> T:
            try:
                return call()
            except grpc.RpcError as error:
                raise CallError(error) from error

        return tenacity.Retrying(**(self._stream_rules if of_stream else self._rules))(attempt)

    def _stream(self, call: Callable[[], Any]) -> Iterator[Any]:
        """The responses of a stream; `call` opens it, again after each failure that is retried."""
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
            while (response := self._retry(advance, of_stream=True)) is not None:
                yield response
        finally:
            if stream is not None:
                with contextlib.suppress(grpc.RpcError):
                    stream.cancel()
