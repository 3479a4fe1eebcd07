"""The BatchService calls on stored batches, which gateway and worker both answer from Postgres."""

import asyncio
import contextlib
import uuid
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias

import grpc

from service.api import error_kinds, messages
from service.api.watching import BatchWatch
from service.auth import roles
from service.auth.roles import Role
from service.db import batches, creation, endings, failures, results, usage
from service.db.availability import DatabaseAwayError
from service.db.batches import Batch
from service.db.connection import Database
from service.db.limits import FullError, Limits
from service.db.results import Span
from service.db.usage import Usage
from service.errors import ApiError, Violation, ending, invalid, not_found
from service.rpc import call_context, pages
from service.rpc.handlers import Context
from service.telemetry import logs
from vllm_batch.v1 import batch_service_pb2 as pb
from vllm_batch.v1 import batch_service_pb2_grpc

# Results are read in pages of about this many bytes; a larger result is a page of its own.
PAGE_BYTES = 192 << 10
LINES_BYTES = 512 << 10
# How many pages are read ahead while another is sent. A stream holds no more, whatever the size of the batch: this is
# what a client that reads slowly costs in memory. Beside a page with a large body, nothing is read ahead.
AHEAD = 2

# How long WatchBatch goes on while Postgres is away. Then it ends, and its client retries for as long as it wants.
AWAY_S = 60.0

# For creating a batch of a large batch's failed requests.
RETRY_TIMEOUT_S = 600.0

log = logs.get("batches")

# Lines, or the results that messages are built from.
_Page: TypeAlias = bytes | list[results.StoredResult]


class _Begin(NamedTuple):
    """Where results begin: at a position, or `offset` bytes into the large body at that position."""

    position: int
    offset: int = 0


class BatchServicer(batch_service_pb2_grpc.BatchServiceServicer):
    """All calls on stored batches; subclasses add those that create batches from a client's lines."""

    def __init__(self, database: Database, limits: Limits) -> None:
        self.database = database
        self._limits = limits
        self._watch = BatchWatch(database, self._described)

    def end_streams(self) -> None:
        """Ends waiting streams at once and others after their current page, as UNAVAILABLE, because the server ends.

        Clients reopen them elsewhere, results by their token.
        """
        self._watch.end()

    async def GetBatch(self, request: pb.GetBatchRequest, context: Context) -> pb.GetBatchResponse:
        """Returns one batch."""
        [described] = await self._described([await self._get(messages.batch_id(request.batch_id))])
        return pb.GetBatchResponse(batch=described)

    async def ListBatches(self, request: pb.ListBatchesRequest, context: Context) -> pb.ListBatchesResponse:
        """Returns a page of batches, newest first. The token is a position, so pages are stable as batches come in."""
        size = pages.size(request.page_size)
        before = pages.position(request.page_token, "batches", "page_token")
        known = set(pb.BatchState.values()) - {pb.BATCH_STATE_UNSPECIFIED}
        for place, state in enumerate(request.states):
            if state not in known:
                raise invalid([Violation(f"states[{place}]", f"{state} is no state")])
        states = [messages.state_name(state) for state in request.states]
        tenant = asked_tenant(request.tenant, "Listing the batches")
        page = await self.database.read(batches.list_page, states, before, size + 1, tenant)
        more = len(page) > size
        return pb.ListBatchesResponse(
            batches=await self._described(page[:size]),
            next_page_token=pages.token("batches", page[size - 1].id) if more else "",
        )

    async def WatchBatch(self, request: pb.WatchBatchRequest, context: Context) -> AsyncIterator[pb.WatchBatchResponse]:
        """Sends the batch now and after each change until it is terminal; for a while also when Postgres is away."""
        batch = await self._get(messages.batch_id(request.batch_id))
        [sent] = await self._described([batch])
        away_since_s: float | None = None
        while True:
            yield pb.WatchBatchResponse(batch=sent)
            if batch.is_terminal:
                return
            while True:
                try:
                    batch = await self._next(batch, sent)
                    [sent], away_since_s = await self._described([batch]), None
                    break
                except DatabaseAwayError:
                    now_s = asyncio.get_running_loop().time()
                    if away_since_s is None:
                        away_since_s, sent = now_s, messages.database_away(sent)
                        break
                    if now_s - away_since_s > AWAY_S:
                        raise

    async def StreamResults(
        self, request: pb.StreamResultsRequest, context: Context
    ) -> AsyncIterator[pb.StreamResultsResponse]:
        """Sends results page by page; with `follow`, until the batch is terminal and all are sent."""
        batch_id = messages.batch_id(request.batch_id)
        order: results.Order = "sequence" if request.order == pb.RESULT_ORDER_FINISHED else "index"
        which = messages.which(request.filter)
        kind = order if which == "all" else f"{order}-{which}"
        begin = _Begin(0 if order == "index" else 1)
        if request.resume_token:
            position, offset = pages.place(request.resume_token, kind, "resume_token")
            begin = _Begin(position, offset) if offset else _Begin(position + 1)
        # Read before the results: if the batch is terminal here, all its results are there.
        batch = await self._get(batch_id)
        while True:
            # A gap in input order may still be filled, and a token after it would skip that result.
            may_skip = order == "sequence" or batch.is_terminal
            read = self._pages(request.format, order, which, batch_id, begin, may_skip)
            async with contextlib.aclosing(read):
                async for response, begin in read:
                    if self._watch.is_ended:
                        raise ending()
                    if response is None:
                        continue
                    last = begin.position if begin.offset else begin.position - 1
                    response.resume_token = pages.token(kind, last, begin.offset)
                    yield response
            if batch.is_terminal or not request.follow:
                # Rows are removed after their batch: while the batch exists, what was read is complete.
                await self._get(batch_id)
                return
            batch = await self._next(batch)

    async def _pages(
        self,
        form: pb.ResultFormat,
        order: results.Order,
        which: results.Which,
        batch_id: int,
        begin: _Begin,
        may_skip: bool,
    ) -> AsyncGenerator[tuple[pb.StreamResultsResponse | None, _Begin]]:
        """Pages without their token, each with the position at which the next one begins; None where it only passed
        over results that are not asked for."""
        as_lines = form == pb.RESULT_FORMAT_JSONL
        size = LINES_BYTES if as_lines else PAGE_BYTES
        reading: deque[tuple[asyncio.Future[_Page], _Begin]] = deque()

        def read(span: Span, offset: int) -> tuple[asyncio.Future[_Page], _Begin]:
            end = offset + results.LARGE_BYTES
            after = _Begin(span.last, end) if as_lines and end < span.large else _Begin(span.last + 1)
            page: asyncio.Future[Any]
            if not as_lines:
                page = self.database.read(results.read_page, order, which, batch_id, span, messages.MAX_BODY_BYTES)
            elif span.large:
                page = self.database.read(results.read_piece, order, batch_id, span, offset)
            else:
                page = self.database.read(results.read_lines, order, which, batch_id, span)
            return page, after

        async def first() -> tuple[pb.StreamResultsResponse, _Begin]:
            # Popped here, so that nothing keeps the results in memory while their message is sent.
            page, after = reading.popleft()
            return _response(batch_id, await page), after

        position, offset = begin if as_lines else (begin.position, 0)
        try:
            following: int | None = position
            while following is not None:
                position = following
                spans, following = await self.database.read(
                    results.divide, order, which, batch_id, position, size, may_skip
                )
                if offset and not (spans and spans[0].last == position and offset < spans[0].large):
                    raise pages.wrong_token("resume_token")
                for span in spans:
                    is_alone = span.large > 0 and not as_lines
                    for piece in range(offset, max(1, span.large if as_lines else 1), results.LARGE_BYTES):
                        while reading and (is_alone or len(reading) > AHEAD):
                            yield await first()
                        reading.append(read(span, piece))
                    while reading and is_alone:
                        yield await first()
                    offset = 0
                if following is not None and which != "all":
                    while reading:
                        yield await first()
                    yield None, _Begin(following)
            while reading:
                yield await first()
        finally:
            for page, _ in reading:
                page.cancel()
            # Nobody needs their results or errors any more.
            await asyncio.gather(*(page for page, _ in reading), return_exceptions=True)

    async def ListErrors(self, request: pb.ListErrorsRequest, context: Context) -> pb.ListErrorsResponse:
        """Returns the kinds of failure in a batch."""
        batch = await self._get(messages.batch_id(request.batch_id))
        if not batch.failed:
            return pb.ListErrorsResponse()
        return error_kinds.response(await self.database.read(failures.count, batch.id), batch.failed)

    async def GetResult(self, request: pb.GetResultRequest, context: Context) -> pb.GetResultResponse:
        """Returns the result of one request."""
        batch_id = messages.batch_id(request.batch_id)
        if not request.custom_id or "\0" in request.custom_id:
            raise invalid([Violation("custom_id", "is required, without NUL")])
        name, scope = request.custom_id, call_context.scope()
        result = await self.database.read(results.read_one, batch_id, name, messages.MAX_BODY_BYTES, scope)
        if result is None:
            await self._get(batch_id)
            raise not_found(f"a result of {name[:100]!r} in {request.batch_id}")
        return pb.GetResultResponse(result=messages.result_message(batch_id, result))

    async def CancelBatch(self, request: pb.CancelBatchRequest, context: Context) -> pb.CancelBatchResponse:
        """Cancels a batch; one already cancelled stays so."""
        batch_id = messages.batch_id(request.batch_id)
        with _conflicts():
            batch = await self.database.run_idempotent(endings.cancel, batch_id, call_context.scope())
        if batch is None:
            raise not_found(f"batch {request.batch_id!r}")
        log.info("batch_cancelled", batch=request.batch_id, state=batch.state)
        return pb.CancelBatchResponse(batch=messages.batch_message(batch))

    async def DeleteBatch(self, request: pb.DeleteBatchRequest, context: Context) -> pb.DeleteBatchResponse:
        """Deletes a batch that has ended."""
        batch_id = messages.batch_id(request.batch_id)
        await self._get(batch_id)
        with _conflicts():
            # What is not there any more by then is deleted.
            await self.database.run_idempotent(endings.delete, batch_id, call_context.scope())
        log.info("batch_deleted", batch=request.batch_id)
        return pb.DeleteBatchResponse()

    async def RetryBatch(self, request: pb.RetryBatchRequest, context: Context) -> pb.RetryBatchResponse:
        """Creates a batch of another's failed requests."""
        batch_id = messages.batch_id(request.batch_id)
        # Under one id, it can be made again.
        request_id = messages.options(pb.BatchOptions(request_id=request.request_id)).request_id or str(uuid.uuid4())
        trace, scope = call_context.current().traceparent, call_context.scope()
        given = batch_id, request_id, RETRY_TIMEOUT_S, self._limits, trace, scope
        with _conflicts():
            batch = await self.database.run_idempotent(creation.retry, *given)
        if batch is None:
            raise not_found(f"batch {request.batch_id!r}")
        log.info("batch_retried", batch=request.batch_id, retried_as=messages.batch_name(batch.id))
        return pb.RetryBatchResponse(batch=messages.batch_message(batch))

    async def ListTenants(self, request: pb.ListTenantsRequest, context: Context) -> pb.ListTenantsResponse:
        """Returns the caller's tenant, or all: those that ever had a batch and those in the file of tenants."""
        caller, quotas = call_context.current().caller, self._limits.quotas()
        found = {each.tenant: each for each in await self.database.read(usage.take)}
        names = {caller.tenant} | ({*found, *quotas.named} if caller.sees_all else set())
        busy = {each.tenant for each in found.values() if each.open_batches}
        return pb.ListTenantsResponse(
            tenants=[messages.tenant_message(found.get(name, Usage(name)), busy, quotas) for name in sorted(names)]
        )

    async def _get(self, batch_id: int) -> Batch:
        """One batch. Raises NOT_FOUND also for one of another tenant than the caller's."""
        batch = await self.database.read(batches.get, batch_id, call_context.scope())
        if batch is None:
            raise not_found(f"batch {messages.batch_name(batch_id)!r}")
        return batch

    async def _described(self, found: Sequence[Batch]) -> list[pb.Batch]:
        """Batches as clients see them."""
        return [messages.batch_message(batch) for batch in found]

    async def _next(self, seen: Batch, sent: pb.Batch | None = None) -> Batch:
        batch = await self._watch.next(seen, sent)
        # A standby that was behind may give ids again once it is promoted.
        if batch is None or batch.tenant != seen.tenant:
            raise not_found(f"batch {messages.batch_name(seen.id)!r}")
        return batch


def asked_tenant(tenant: str, what: str) -> str | None:
    """The tenant that a call is about, given what the caller asks for (empty: all it may see); None: all.

    Raises INVALID_ARGUMENT for a name that no tenant can have, and PERMISSION_DENIED, which says `what`, for another
    tenant than the caller's.
    """
    if "\0" in tenant:
        raise invalid([Violation("tenant", "must not contain NUL")])
    caller = call_context.current().caller
    if tenant and not caller.sees_all and tenant != caller.tenant:
        raise roles.missing(f"{what} of another tenant", caller.role, Role.OPERATE)
    return tenant or caller.scope


def _response(batch_id: int, page: _Page) -> pb.StreamResultsResponse:
    if isinstance(page, bytes):
        if not page:
            # Its batch was deleted meanwhile.
            raise not_found(f"batch {messages.batch_name(batch_id)!r}")
        return pb.StreamResultsResponse(jsonl=page)
    return pb.StreamResultsResponse(results=[messages.result_message(batch_id, result) for result in page])


@contextmanager
def _conflicts() -> Iterator[None]:
    """Converts errors about a batch's state or a limit to the errors of the contract."""
    try:
        yield
    except batches.StateError as error:
        name = messages.batch_name(error.batch.id)
        message = f"{name} {error}"
        raise ApiError(
            grpc.StatusCode.FAILED_PRECONDITION, message, "BATCH_STATE", {"batch_id": name, "state": error.batch.state}
        ) from None
    except (creation.DuplicateError, FullError) as error:
        raise messages.creation_error(error) from None
