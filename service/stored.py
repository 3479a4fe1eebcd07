"""The calls of BatchService on what is stored. They go to Postgres, on the gateway and on the worker alike."""

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import grpc

from service import calls, logs, messages
from service.db import batches, results
from service.db.batches import Batch, Limits
from service.db.connection import Database
from service.errors import ApiError, Violation, ending, invalid, not_found
from vllm_batch.v1 import batch_service_pb2 as pb
from vllm_batch.v1 import batch_service_pb2_grpc

# How often the batches that somebody watches are looked at, all in one query.
POLL_INTERVAL_S = 0.5
# Results are read in pages of about so many bytes; one that is larger is a page by itself.
PAGE_BYTES = 192 << 10
LINES_BYTES = 512 << 10
# Pages that are read at once, while another is sent. A stream holds no more, whatever the size of the batch: the memory
# that a client costs who reads slowly or not at all.
AHEAD = 2

# Making a batch of the failed requests of a large one.
RETRY_TIMEOUT_S = 600.0

log = logs.get("batches")

Context = grpc.aio.ServicerContext[Any, Any]
# Lines, or what messages are made of.
_Page: TypeAlias = bytes | list[results.StoredResult]


@dataclass
class BatchWatch:
    """One query per interval for all watched batches of this process; wakes those whose batch changed."""

    database: Database
    interval_s: float = POLL_INTERVAL_S
    is_ended: bool = False
    # What each has seen who waits.
    _waiting: dict[asyncio.Future[Batch | None], Batch] = field(default_factory=dict)
    _task: asyncio.Task[None] | None = None

    async def next(self, seen: Batch) -> Batch | None:
        """The batch once it differs from `seen`; None once it is gone.

        Raises one of `Unreachable`, or UNAVAILABLE when the server ends.
        """
        if self.is_ended:
            raise ending()
        future: asyncio.Future[Batch | None] = asyncio.get_running_loop().create_future()
        self._waiting[future] = seen
        if self._task is None:
            self._task = asyncio.create_task(self._look())
        try:
            return await future
        finally:
            del self._waiting[future]

    def end(self) -> None:
        """Ends all waits."""
        self.is_ended = True
        for future in self._waiting:
            if not future.done():
                future.set_exception(ending())

    async def _look(self) -> None:
        """Looks as long as somebody waits."""
        try:
            while self._waiting:
                await asyncio.sleep(self.interval_s)
                # Who comes while the database is asked is not in its answer.
                due = list(self._waiting.items())
                try:
                    found = await self.database.run(batches.get_many, list({seen.id for _, seen in due}))
                except Exception as error:  # noqa: BLE001 - goes to those who wait
                    for future, _ in due:
                        if not future.done():
                            future.set_exception(error)
                    continue
                for future, seen in due:
                    batch = found.get(seen.id)
                    if batch != seen and not future.done():
                        future.set_result(batch)
        finally:
            self._task = None


class StoredServicer(batch_service_pb2_grpc.BatchServiceServicer):
    """All calls on batches that are stored already; those that create from a client's lines are in subclasses."""

    def __init__(self, database: Database, limits: Limits) -> None:
        self.database = database
        self._limits = limits
        self._watch = BatchWatch(database)

    def end_streams(self) -> None:
        """Ends the streams that wait for news, and the others behind their page, as UNAVAILABLE: for a server's end.

        Clients begin them again elsewhere, results by their token.
        """
        self._watch.end()

    async def GetBatch(self, request: pb.GetBatchRequest, context: Context) -> pb.GetBatchResponse:
        """Returns one batch."""
        return pb.GetBatchResponse(batch=messages.batch_message(await self._get(messages.batch_id(request.batch_id))))

    async def ListBatches(self, request: pb.ListBatchesRequest, context: Context) -> pb.ListBatchesResponse:
        """Returns a page of batches, newest first. The token is a position, so pages are stable as batches come in."""
        size = messages.page_size(request.page_size)
        before = messages.position(request.page_token, "batches", "page_token")
        known = set(pb.BatchState.values()) - {pb.BATCH_STATE_UNSPECIFIED}
        for place, state in enumerate(request.states):
            if state not in known:
                raise invalid([Violation(f"states[{place}]", f"{state} is no state")])
        states = [messages.state_name(state) for state in request.states]
        page = await self.database.run(batches.list_page, states, before, size + 1)
        more = len(page) > size
        return pb.ListBatchesResponse(
            batches=[messages.batch_message(batch) for batch in page[:size]],
            next_page_token=messages.token("batches", page[size - 1].id) if more else "",
        )

    async def WatchBatch(self, request: pb.WatchBatchRequest, context: Context) -> AsyncIterator[pb.WatchBatchResponse]:
        """Sends the batch now and after each change until it is terminal."""
        batch = await self._get(messages.batch_id(request.batch_id))
        while True:
            yield pb.WatchBatchResponse(batch=messages.batch_message(batch))
            if batch.is_terminal:
                return
            batch = await self._next(batch)

    async def StreamResults(
        self, request: pb.StreamResultsRequest, context: Context
    ) -> AsyncIterator[pb.StreamResultsResponse]:
        """Sends results page by page; with `follow`, until the batch is terminal and all are sent."""
        batch_id = messages.batch_id(request.batch_id)
        order: results.Order = "sequence" if request.order == pb.RESULT_ORDER_FINISHED else "index"
        # The last index or sequence number that was sent.
        last = messages.position(request.resume_token, order, "resume_token")
        if last is None:
            last = -1 if order == "index" else 0
        # Read before the results: what is terminal here has all its results there.
        batch = await self._get(batch_id)
        while True:
            # A gap in the order of the requests may be filled yet, and a token behind it would leave that out.
            may_skip = order == "sequence" or batch.is_terminal
            read = self._pages(request.format, order, batch_id, last + 1, may_skip)
            async with contextlib.aclosing(read) as pages:
                async for response, last in pages:
                    if self._watch.is_ended:
                        raise ending()
                    response.resume_token = messages.token(order, last)
                    yield response
            if batch.is_terminal or not request.follow:
                # Its rows go after it: what was read of a batch that is still there was whole.
                await self._get(batch_id)
                return
            batch = await self._next(batch)

    async def _pages(
        self, form: pb.ResultFormat, order: results.Order, batch_id: int, start: int, may_skip: bool
    ) -> AsyncGenerator[tuple[pb.StreamResultsResponse, int]]:
        """Pages without their token, each with the position of its last result."""
        as_lines = form == pb.RESULT_FORMAT_JSONL
        read: Callable[..., _Page] = results.read_lines if as_lines else results.read_page
        size = LINES_BYTES if as_lines else PAGE_BYTES
        reading: deque[tuple[asyncio.Future[_Page], int]] = deque()

        async def first() -> tuple[pb.StreamResultsResponse, int]:
            # Here, so that nothing keeps what a message was made of while that is sent.
            page, last = reading.popleft()
            return _response(batch_id, await page), last

        try:
            while spans := await self.database.run(results.divide, order, batch_id, start, size, may_skip):
                for span in spans:
                    reading.append((self.database.run(read, order, batch_id, span), span.last))
                    if len(reading) > AHEAD:
                        yield await first()
                start = spans[-1].last + 1
            while reading:
                yield await first()
        finally:
            for page, _ in reading:
                page.cancel()
            # What they failed of, if they did, concerns nobody any more.
            await asyncio.gather(*(page for page, _ in reading), return_exceptions=True)

    async def GetResult(self, request: pb.GetResultRequest, context: Context) -> pb.GetResultResponse:
        """Returns the result of one request."""
        batch_id = messages.batch_id(request.batch_id)
        if not request.custom_id or "\0" in request.custom_id:
            raise invalid([Violation("custom_id", "is required, without NUL")])
        result = await self.database.run(results.read_one, batch_id, request.custom_id)
        if result is None:
            await self._get(batch_id)
            raise not_found(f"a result of {request.custom_id!r} in {request.batch_id}")
        return pb.GetResultResponse(result=messages.result_message(batch_id, result))

    async def CancelBatch(self, request: pb.CancelBatchRequest, context: Context) -> pb.CancelBatchResponse:
        """Cancels a batch; one that is cancelled already stays so."""
        batch_id = messages.batch_id(request.batch_id)
        with _conflicts():
            batch = await self.database.run(batches.cancel, batch_id)
        if batch is None:
            raise not_found(f"batch {request.batch_id!r}")
        log.info("batch_cancelled", batch=request.batch_id, state=batch.state)
        return pb.CancelBatchResponse(batch=messages.batch_message(batch))

    async def DeleteBatch(self, request: pb.DeleteBatchRequest, context: Context) -> pb.DeleteBatchResponse:
        """Deletes a batch that has ended."""
        batch_id = messages.batch_id(request.batch_id)
        with _conflicts():
            is_deleted = await self.database.run(batches.delete, batch_id)
        if not is_deleted:
            raise not_found(f"batch {request.batch_id!r}")
        log.info("batch_deleted", batch=request.batch_id)
        return pb.DeleteBatchResponse()

    async def RetryBatch(self, request: pb.RetryBatchRequest, context: Context) -> pb.RetryBatchResponse:
        """Makes a batch of what failed in another."""
        batch_id = messages.batch_id(request.batch_id)
        request_id = messages.options(pb.BatchOptions(request_id=request.request_id)).request_id
        with _conflicts():
            batch = await self.database.run(
                batches.retry, batch_id, request_id, RETRY_TIMEOUT_S, self._limits, calls.current().traceparent
            )
        if batch is None:
            raise not_found(f"batch {request.batch_id!r}")
        log.info("batch_retried", batch=request.batch_id, retried_as=messages.batch_name(batch.id))
        return pb.RetryBatchResponse(batch=messages.batch_message(batch))

    async def _get(self, batch_id: int) -> Batch:
        batch = await self.database.run(batches.get, batch_id)
        if batch is None:
            raise not_found(f"batch {messages.batch_name(batch_id)!r}")
        return batch

    async def _next(self, seen: Batch) -> Batch:
        batch = await self._watch.next(seen)
        if batch is None:
            raise not_found(f"batch {messages.batch_name(seen.id)!r}")
        return batch


def _response(batch_id: int, page: _Page) -> pb.StreamResultsResponse:
    if isinstance(page, bytes):
        return pb.StreamResultsResponse(jsonl=page)
    return pb.StreamResultsResponse(results=[messages.result_message(batch_id, result) for result in page])


@contextmanager
def _conflicts() -> Iterator[None]:
    """What a batch's state or a limit does not let happen, as the errors of the contract."""
    try:
        yield
    except batches.StateError as error:
        name = messages.batch_name(error.batch.id)
        message = f"{name} {error}"
        raise ApiError(
            grpc.StatusCode.FAILED_PRECONDITION, message, "BATCH_STATE", {"batch_id": name, "state": error.batch.state}
        ) from None
    except (batches.DuplicateError, batches.FullError) as error:
        raise messages.creation_error(error) from None
