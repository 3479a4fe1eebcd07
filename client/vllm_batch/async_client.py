"""The client for asyncio: the same calls, deadlines and retries as `Client`."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable, Iterable, Sequence
from typing import Any, BinaryIO, TypeVar, Unpack

import grpc
import tenacity

from vllm_batch import requests
from vllm_batch.channel import DEFAULT_TARGET, check_target, open_aio_channel, open_channel
from vllm_batch.errors import CallError
from vllm_batch.retries import (
    CALL_TIMEOUT_S,
    CHANNEL_CLOSED,
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


def _failure(code: grpc.StatusCode, message: str) -> grpc.RpcError:
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), details=message)


_CLOSED = _failure(grpc.StatusCode.CANCELLED, CHANNEL_CLOSED)
# The words of gRPC's blocking API.
_UNREADABLE = _failure(grpc.StatusCode.INTERNAL, "Exception deserializing response!")


class AsyncClient:
    """BatchService at `target`, host:port; create it in a running event loop. Every method raises CallError.

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
        self._channel = open_aio_channel(target, **security)
        self._stub = batch_service_pb2_grpc.BatchServiceStub(self._channel)
        self._host_stub: Any = host_service_pb2_grpc.HostServiceStub(self._channel)
        self._webhook_stub: Any = webhook_service_pb2_grpc.WebhookServiceStub(self._channel)
        # Uploads use the blocking API in a thread: the file is read there too, and the asyncio API may report INTERNAL
        # instead of the server's error when that ends an upload early (github.com/grpc/grpc/issues/36066).
        self._upload_channel = open_channel(target, **security)
        self._upload_stub = batch_service_pb2_grpc.BatchServiceStub(self._upload_channel)

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        self._is_closed = True
        self._upload_channel.close()
        await self._channel.close(None)

    async def service_status(self) -> pb.GetServiceStatusResponse:
        """Whether new work is accepted now, why not, and which models are served."""
        return await self._retry(self._service_status)

    async def accepting(self) -> str:
        """Why new work is not accepted now; empty when it is. Never retries, raises no CallError."""
        try:
            return (await _attempt(self._service_status)).message
        except CallError as error:
            return error.message

    async def submit(self, file: BinaryIO, **options: Unpack[SubmitOptions]) -> pb.Batch:
        """Upload a seekable JSONL file as one batch; exactly one, however often the upload is retried.

        What reading the file raises is raised here. A thread reads it.
        """
        upload = Upload(file, options)

        async def call() -> pb.Batch:
            # No thread waits for it: uploads may take an hour, and the loop has few threads, which others need too.
            loop = asyncio.get_running_loop()
            answer: asyncio.Future[pb.UploadBatchResponse] = loop.create_future()
            sending: Any = self._upload_stub.UploadBatch.future(upload.messages(), timeout=UPLOAD_TIMEOUT_S)

            def hand_over() -> None:
                if answer.done():
                    return
                try:
                    answer.set_result(sending.result())
                except (grpc.RpcError, grpc.FutureCancelledError) as error:
                    answer.set_exception(error)

            def ended(_: object) -> None:
                # After a cancelled call the loop may be closed by now.
                with contextlib.suppress(RuntimeError):
                    loop.call_soon_threadsafe(hand_over)

            sending.add_done_callback(ended)
            try:
                return (await answer).batch
            finally:
                sending.cancel()

        with upload.reading():
            return await self._retry(call)

    async def submit_lines(
        self, lines: Iterable[Line] | AsyncIterable[Line], **options: Unpack[SubmitOptions]
    ) -> pb.Batch:
        """Upload requests as `submit` uploads a file. A temporary file keeps them for retries."""
        check_lines(lines)
        with tempfile.TemporaryFile() as file:
            if isinstance(lines, AsyncIterable):
                async for line in lines:
                    file.write(to_bytes(line))
            else:
                file.writelines(map(to_bytes, lines))
            return await self.submit(file, **options)

    async def get(self, batch_id: str) -> pb.Batch:
        """One batch."""
        request = requests.message(pb.GetBatchRequest, batch_id=batch_id)
        return (await self._retry(lambda: self._stub.GetBatch(request, timeout=CALL_TIMEOUT_S))).batch

    async def list(
        self, states: Iterable[str] = (), limit: int = 50, tenant: str = ""
    ) -> AsyncGenerator[pb.Batch, None]:
        """Up to `limit` batches, newest first, in any of `states`, such as `BATCH_STATE_COMPLETED`; none: all.

        Those of `tenant`, which only operators may ask for unless it is their own; empty: all that the caller may see.
        """
        listing = requests.Listing(requests.message(pb.ListBatchesRequest, states=states, tenant=tenant), limit)
        while not listing.is_complete:
            page = await self._retry(lambda: self._stub.ListBatches(listing.request, timeout=CALL_TIMEOUT_S))
            listing.came(len(page.batches), page.next_page_token)
            for batch in page.batches:
                yield batch

    async def tenants(self) -> Sequence[pb.Tenant]:
        """The caller's tenant with its share, queue, tokens used and limits; for operators all tenants."""
        request = pb.ListTenantsRequest()
        return (await self._retry(lambda: self._stub.ListTenants(request, timeout=CALL_TIMEOUT_S))).tenants

    async def hosts(self, name: str = "") -> AsyncGenerator[hpb.Host, None]:
        """All hosts by name, or the one called `name`; for operators."""
        request = requests.message(hpb.ListHostsRequest, page_size=requests.HOSTS_PAGE, name=name)
        while True:
            page = await self._retry(lambda: self._host_stub.ListHosts(request, timeout=CALL_TIMEOUT_S))
            for host in page.hosts:
                yield host
            request.page_token = page.next_page_token
            if not page.next_page_token:
                return

    async def drain_host(self, name: str, reason: str = "") -> None:
        """Order a host to drain: it gets no new work, finishes what is in its engines and releases the rest."""
        request = requests.message(hpb.DrainHostRequest, name=name, reason=reason)
        await self._retry(lambda: self._host_stub.DrainHost(request, timeout=CALL_TIMEOUT_S))

    async def resume_host(self, name: str) -> None:
        """Give a drained host work again."""
        request = requests.message(hpb.ResumeHostRequest, name=name)
        await self._retry(lambda: self._host_stub.ResumeHost(request, timeout=CALL_TIMEOUT_S))

    async def forget_host(self, name: str) -> None:
        """Remove what is stored about a host that is gone for good."""
        request = requests.message(hpb.ForgetHostRequest, name=name)
        await self._retry(lambda: self._host_stub.ForgetHost(request, timeout=CALL_TIMEOUT_S))

    async def deliveries(
        self, states: Iterable[str] = (), limit: int = 50, batch_id: str = "", tenant: str = ""
    ) -> AsyncGenerator[wpb.Delivery, None]:
        """Up to `limit` deliveries of webhooks, newest first, in any of `states`, such as `DELIVERY_STATE_GIVEN_UP`;
        none: all.

        Only that of `batch_id`, and only those of `tenant`; empty: all that the caller may see.
        """
        request = requests.message(wpb.ListDeliveriesRequest, states=states, batch_id=batch_id, tenant=tenant)
        listing = requests.Listing(request, limit)
        while not listing.is_complete:
            page = await self._retry(lambda: self._webhook_stub.ListDeliveries(listing.request, timeout=CALL_TIMEOUT_S))
            listing.came(len(page.deliveries), page.next_page_token)
            for delivery in page.deliveries:
                yield delivery

    async def test_webhook(self, url: str = "", tenant: str = "") -> wpb.TestWebhookResponse:
        """Send an event of the type `webhook.test` to `url`, or to the target of `tenant`; none: the caller's tenant's.

        A target that fails is no CallError: `error` of the answer says why.
        """
        request = requests.message(wpb.TestWebhookRequest, url=url, tenant=tenant)
        return await self._retry(lambda: self._webhook_stub.TestWebhook(request, timeout=WEBHOOK_TIMEOUT_S))

    async def replay_deliveries(self, *, delivery_id: str = "", batch_id: str = "") -> Sequence[wpb.Delivery]:
        """Send an event again, by its own id or that of its batch: give one of the two. It keeps its id."""
        request = requests.replay(delivery_id, batch_id)
        answer: wpb.ReplayDeliveriesResponse = await self._retry(
            lambda: self._webhook_stub.ReplayDeliveries(request, timeout=CALL_TIMEOUT_S)
        )
        return answer.deliveries

    async def watch(self, batch_id: str) -> AsyncGenerator[pb.Batch, None]:
        """The batch now and after each change, until it has ended. Survives lost connections."""
        request = requests.message(pb.WatchBatchRequest, batch_id=batch_id)
        async with contextlib.aclosing(self._stream(lambda: self._stub.WatchBatch(request))) as responses:
            async for response in responses:
                yield response.batch

    async def wait(self, batch_id: str, on_progress: Callable[[pb.Batch], None] | None = None) -> pb.Batch:
        """The batch once it has ended. `on_progress(batch)` is called now and after each change."""
        batch = pb.Batch()
        async for batch in self.watch(batch_id):
            if on_progress is not None:
                on_progress(batch)
        return batch

    async def results(
        self, batch_id: str, *, follow: bool = False, order: str = "RESULT_ORDER_INPUT", filter: str = ALL
    ) -> AsyncGenerator[pb.Result, None]:
        """The results so far; with `follow`, until the batch has ended. `filter` `RESULT_FILTER_FAILED` or
        `RESULT_FILTER_SUCCEEDED`: only those.

        After a lost connection it resumes after the last result, without gap or repeat.
        """
        async with contextlib.aclosing(self.result_pages(batch_id, follow=follow, order=order, filter=filter)) as pages:
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
        filter: str = ALL,
    ) -> AsyncGenerator[pb.StreamResultsResponse, None]:
        """The results page by page. Each page has the token to resume after it, in another process if need be."""
        request = requests.results(batch_id, follow=follow, order=order, resume_token=resume_token, filter=filter)
        async with contextlib.aclosing(self._pages(request)) as pages:
            async for page in pages:
                yield page

    async def result_lines(
        self, batch_id: str, *, follow: bool = False, order: str = "RESULT_ORDER_INPUT", filter: str = ALL
    ) -> AsyncGenerator[bytes, None]:
        """The results as OpenAI batch output, several whole lines at a time: write them to a file unchanged.

        Several times as fast as `results`.
        """
        lines = requests.Lines()
        async with contextlib.aclosing(
            self.result_bytes(batch_id, follow=follow, order=order, filter=filter)
        ) as pieces:
            async for piece in pieces:
                if some := lines.take(piece):
                    yield some

    async def result_bytes(
        self, batch_id: str, *, follow: bool = False, order: str = "RESULT_ORDER_INPUT", filter: str = ALL
    ) -> AsyncGenerator[bytes, None]:
        """The same bytes as of `result_lines`, with lines of over 1 MiB in pieces: memory stays flat at any size."""
        request = requests.results(batch_id, follow=follow, order=order, as_lines=True, filter=filter)
        async with contextlib.aclosing(self._pages(request)) as pages:
            async for page in pages:
                yield page.jsonl

    async def result_line(self, batch_id: str, result: pb.Result) -> AsyncGenerator[bytes, None]:
        """The line, in pieces, of a result whose body was left out of its message (`omitted_body_bytes`)."""
        async with contextlib.aclosing(self._pages(requests.line(batch_id, result))) as pages:
            async for page in pages:
                yield page.jsonl
                if page.jsonl.endswith(b"\n"):
                    return

    async def result(self, batch_id: str, custom_id: str) -> pb.Result:
        """The result of one request. Raises NOT_FOUND until the request has finished."""
        request = requests.message(pb.GetResultRequest, batch_id=batch_id, custom_id=custom_id)
        return (await self._retry(lambda: self._stub.GetResult(request, timeout=CALL_TIMEOUT_S))).result

    async def errors(self, batch_id: str) -> pb.ListErrorsResponse:
        """The kinds of failure among the results of a batch, each with its count and an example."""
        request = requests.message(pb.ListErrorsRequest, batch_id=batch_id)
        return await self._retry(lambda: self._stub.ListErrors(request, timeout=CALL_TIMEOUT_S))

    async def retry(self, batch_id: str, request_id: str = "") -> pb.Batch:
        """Create a batch of the requests of an ended batch that failed or have no result."""
        request = requests.retry(batch_id, request_id)
        return (await self._retry(lambda: self._stub.RetryBatch(request, timeout=UPLOAD_TIMEOUT_S))).batch

    async def delete(self, batch_id: str) -> None:
        """Delete an ended batch with its requests and results."""
        request = requests.message(pb.DeleteBatchRequest, batch_id=batch_id)
        await self._retry(lambda: self._stub.DeleteBatch(request, timeout=CALL_TIMEOUT_S))

    async def cancel(self, batch_id: str) -> pb.Batch:
        """Cancel a batch. Finished results are kept."""
        request = requests.message(pb.CancelBatchRequest, batch_id=batch_id)
        return (await self._retry(lambda: self._stub.CancelBatch(request, timeout=CALL_TIMEOUT_S))).batch

    async def _service_status(self) -> pb.GetServiceStatusResponse:
        return await self._stub.GetServiceStatus(pb.GetServiceStatusRequest(), timeout=STATUS_TIMEOUT_S)

    async def _pages(self, request: pb.StreamResultsRequest) -> AsyncGenerator[pb.StreamResultsResponse, None]:
        async with contextlib.aclosing(self._stream(lambda: self._stub.StreamResults(request))) as pages:
            async for page in pages:
                request.resume_token = page.resume_token
                yield page

    async def _retry(self, call: Callable[[], Awaitable[T]], *, of_stream: bool = False) -> T:
        return await tenacity.AsyncRetrying(**(self._stream_rules if of_stream else self._rules))(_attempt, call)

    async def _stream(self, call: Callable[[], Any]) -> AsyncGenerator[Any, None]:
        """The responses of a stream; `call` opens it, again after each failure that is retried."""
        stream: Any = None

        async def advance() -> Any:
            nonlocal stream
            if stream is None:
                stream = call()
            try:
                return await stream.read()
            except (grpc.RpcError, asyncio.CancelledError):
                stream = None
                raise

        try:
            while (response := await self._retry(advance, of_stream=True)) is not grpc.aio.EOF:
                yield response
        finally:
            if stream is not None:
                stream.cancel()


async def _attempt(call: Callable[[], Awaitable[T]]) -> T:
    """One attempt of a call. Raises CallError."""
    try:
        answer = await call()
    except grpc.RpcError as error:
        raise CallError(error) from error
    except (asyncio.CancelledError, grpc.FutureCancelledError):
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        # What gRPC raises in a task that nobody has cancelled when the channel of its call is closed.
        raise CallError(_CLOSED) from None
    if answer is None:
        # What gRPC returns for an answer that is none of ours, as of another server.
        raise CallError(_UNREADABLE)
    return answer
