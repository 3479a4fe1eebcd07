"""Intake: the lines of a new batch, from the stream of a client into Postgres, with constant memory."""

import asyncio
import hashlib
import json
import re
from bisect import bisect_right
from collections.abc import AsyncIterator, Callable, Iterator, Set
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import grpc
import msgspec
import psycopg2.errors
from google.protobuf.json_format import MessageToDict

from service.db import batches
from service.db.batches import Batch, Content, Limits, Options
from service.db.connection import Database, Unreachable
from service.errors import ApiError, Violation, invalid
from service.lines import MAX_VIOLATIONS, LineError, parse
from service.messages import creation_error, too_large
from vllm_batch.v1 import batch_service_pb2 as pb

# A client that sends nothing for this long has gone.
PIECE_TIMEOUT_S = 60.0
# The longest that one upload may take, all in all; and the transaction at its end, which makes the chunks.
STORE_TIMEOUT_S = 3600.0
CREATE_TIMEOUT_S = 300.0
# What is not more than this goes in with its batch; more of it by pieces of this size.
STAGE_BYTES = 4 << 20

_BOM = b"\xef\xbb\xbf"
_COPY_ROW = re.compile(r"COPY requests, line (\d+)")
_DUPLICATE = re.compile(r"\(batch_id, custom_id\)=\(\d+, (.*)\) already exists", re.DOTALL)


@dataclass(frozen=True)
class Offer:
    """What this worker serves."""

    models: Set[str]
    urls: Set[str]


@dataclass(frozen=True)
class Sizes:
    """How large one batch may be."""

    requests: int
    line_bytes: int
    batch_bytes: int


def file_place(number: int) -> str:
    """How the request on a line of a file (from 1) is named in errors."""
    return f"line {number}"


def inline_place(number: int) -> str:
    """How the inline request of a number (from 1) is named in errors."""
    return f"requests[{number - 1}]"


class Rows:
    """The requests of one new batch as rows for COPY, checked line by line as the pieces of their file come.

    `feed` and `end` raise ApiError for lines that are wrong.
    """

    def __init__(
        self, batch_id: int, offer: Offer, sizes: Sizes, place: Callable[[int], str] = file_place, salt: bytes = b""
    ) -> None:
        self.total = 0
        self._models: set[str] = set()
        self._batch_id = str(batch_id).encode()
        self._offer = offer
        self._sizes = sizes
        self._bytes = 0
        self._place = place
        self._hash = hashlib.sha256(salt)
        self._line_number = 0
        # Rows before which a blank line was skipped, to get from the row that COPY names to its line.
        self._blank_before: list[int] = []
        self._rest = b""

    @property
    def content(self) -> Content:
        """What it came to so far."""
        return Content(self.total, sorted(self._models), self._hash.digest())

    def place_of_row(self, row: int) -> str:
        """How the row of a number (from 1) is named in errors."""
        return self._place(row + bisect_right(self._blank_before, row - 1))

    def feed(self, piece: bytes) -> bytes:
        """The rows of the lines that this piece completes."""
        self._hash.update(piece)
        self._bytes += len(piece)
        if self._bytes > self._sizes.batch_bytes:
            raise too_large("bytes of the batch", self._sizes.batch_bytes, self._bytes)
        lines = (self._rest + piece).split(b"\n")
        self._rest = lines.pop()
        if len(self._rest) > self._sizes.line_bytes:
            # Read no further; it is refused with its number as any line that is too long.
            lines.append(self._rest)
        return self._rows(lines)

    def end(self) -> bytes:
        """The row of a last line without an end, if there is one."""
        rows = self._rows([self._rest]) if self._rest else b""
        if self.total == 0:
            raise invalid([Violation("requests", "there are none: a batch has at least one")])
        return rows

    def _rows(self, lines: list[bytes]) -> bytes:
        rows = []
        violations: list[Violation] = []
        for line in lines:
            self._line_number += 1
            if self._line_number == 1:
                line = line.removeprefix(_BOM)
            if not line or line.isspace():
                self._blank_before.append(self.total)
                continue
            place = self._place(self._line_number)
            if len(line) > self._sizes.line_bytes:
                raise too_large(f"bytes of {place}", self._sizes.line_bytes, len(line))
            if self.total >= self._sizes.requests:
                raise too_large("requests of the batch", self._sizes.requests, self.total + 1)
            try:
                parsed = parse(line, place, self._offer.models, self._offer.urls)
            except LineError as error:
                violations += error.violations
                if len(violations) >= MAX_VIOLATIONS:
                    break
                continue
            fields = (parsed.custom_id.encode(), parsed.url.encode(), parsed.body)
            if parsed.model is not None:
                self._models.add(parsed.model)
            rows.append(b"\t".join((self._batch_id, str(self.total).encode(), *map(_escape, fields))))
            self.total += 1
        if violations:
            raise invalid(violations[:MAX_VIOLATIONS])
        return b"\n".join(rows) + b"\n" if rows else b""


def _escape(field: bytes) -> bytes:
    """A value in COPY's text format."""
    field = field.replace(b"\\", b"\\\\")
    return field.replace(b"\t", b"\\t").replace(b"\n", b"\\n").replace(b"\r", b"\\r")


def inline_lines(request: pb.CreateBatchRequest) -> bytes:
    """Inline requests as the lines of a file. Raises INVALID_ARGUMENT for a body that is given twice or not at all."""
    lines, violations = [], []
    for number, item in enumerate(request.requests):
        if item.HasField("body") == bool(item.body_json):
            violations.append(Violation(f"requests[{number}]: body", "give one of `body` and `body_json`"))
            continue
        body = json.dumps(_integers(MessageToDict(item.body))) if item.HasField("body") else item.body_json
        try:
            msgspec.json.decode(body, type=msgspec.Raw)
        except (msgspec.DecodeError, RecursionError) as error:
            violations.append(Violation(f"requests[{number}]: body_json", f"not JSON: {error}"))
            continue
        # Between JSON tokens a line break means as much as a space, and within them there is none.
        body = body.replace("\n", " ")
        head = json.dumps({"custom_id": item.custom_id, "method": item.method or "POST", "url": item.url})
        lines.append(f'{head[:-1]}, "body": {body}}}\n')
    if violations:
        raise invalid(violations)
    return "".join(lines).encode()


def _integers(value: Any) -> Any:
    """A Struct has doubles alone: whole ones are written as the integers that the client meant."""
    if isinstance(value, dict):
        return {name: _integers(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_integers(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


@dataclass
class _Staging:
    """Rows on their way into Postgres: all with the batch if they are few, else by pieces, one while the next comes."""

    database: Database
    rows: Rows
    batch_id: int
    _waiting: list[bytes] = field(default_factory=list)
    _size: int = 0
    _storing: asyncio.Task[None] | None = None
    # Requests in the pieces that went before.
    _staged: int = 0

    async def add(self, rows: bytes) -> None:
        """Takes rows; with enough of them a piece is stored. Raises what storing an earlier one raised."""
        self._waiting.append(rows)
        self._size += len(rows)
        if self._size >= STAGE_BYTES:
            await self.settle()
            self._storing = asyncio.create_task(self._stage(self._staged, self._take()))
            self._staged = self.rows.total

    async def create(self, options: Options, limits: Limits) -> Batch:
        """Creates the batch with what is left."""
        await self.settle()
        content, is_staged = self.rows.content, self._staged > 0
        with self._telling_duplicates(self._staged):
            return await self.database.run(
                batches.create,
                self.batch_id,
                options,
                content,
                self._take(),
                is_staged,
                CREATE_TIMEOUT_S,
                limits,
            )

    async def settle(self) -> None:
        """Waits for the piece that is being stored. Raises what that raised."""
        if self._storing is not None:
            # A thread is at it, which hears of no cancellation.
            await asyncio.shield(self._storing)

    async def abandon(self) -> None:
        """Nothing of this will be a batch."""
        if self._storing is None:
            return
        await asyncio.wait({self._storing})
        with suppress(*Unreachable):
            await self.database.run(batches.abandon, self.batch_id)

    async def _stage(self, before: int, rows: bytes) -> None:
        with self._telling_duplicates(before):
            await self.database.run(batches.stage, self.batch_id, rows, 2 * STORE_TIMEOUT_S)

    def _take(self) -> bytes:
        taken, self._waiting, self._size = b"".join(self._waiting), [], 0
        return taken

    @contextmanager
    def _telling_duplicates(self, before: int) -> Iterator[None]:
        try:
            yield
        except psycopg2.errors.UniqueViolation as error:
            row = _COPY_ROW.search(error.diag.context or "")
            key = _DUPLICATE.search(error.diag.message_detail or "")
            place = self.rows.place_of_row(before + int(row[1])) if row else "requests"
            what = f"{key[1] if key else ''!r} was used on an earlier line"
            raise invalid([Violation(f"{place}: custom_id", what)]) from None


@dataclass(frozen=True)
class Intake:
    """Stores new batches within limits."""

    database: Database
    sizes: Sizes
    limits: Limits

    async def store(
        self, options: Options, salt: bytes, pieces: AsyncIterator[bytes], offer: Offer, place: Callable[[int], str]
    ) -> Batch:
        """Stores a batch from its lines, whole or not at all. The same again under its request_id gives the first.

        Raises ApiError: INVALID_ARGUMENT naming each wrong line and field, ALREADY_EXISTS; or one of `Unreachable`.
        """
        try:
            batch_id = await self.database.run(batches.reserve, self.limits)
        except batches.FullError as error:
            raise creation_error(error) from None
        rows = Rows(batch_id, offer, self.sizes, place, salt)
        staging = _Staging(self.database, rows, batch_id)
        try:
            async with _upload_timeout(STORE_TIMEOUT_S, "it took too long"):
                async for piece in _timely(pieces):
                    # In a thread: a piece may be large, and others want to be heard meanwhile.
                    await staging.add(await asyncio.to_thread(rows.feed, piece))
                await staging.add(await asyncio.to_thread(rows.end))
                return await staging.create(options, self.limits)
        except BaseException as error:
            # As a task of its own: the call of a client that has gone is cancelled more than once.
            await asyncio.shield(staging.abandon())
            if isinstance(error, batches.DuplicateError) and error.batch.digest == rows.content.digest:
                return error.batch
            if isinstance(error, batches.DuplicateError | batches.FullError):
                raise creation_error(error) from None
            raise


async def _timely(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The pieces, as long as each comes in time."""
    while True:
        async with _upload_timeout(PIECE_TIMEOUT_S, f"nothing came for {PIECE_TIMEOUT_S:.0f} s"):
            piece = await anext(pieces, None)
        if piece is None:
            return
        yield piece


@asynccontextmanager
async def _upload_timeout(timeout_s: float, why: str) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(timeout_s):
            yield
    except TimeoutError as error:
        raise ApiError(grpc.StatusCode.DEADLINE_EXCEEDED, f"upload stopped: {why}") from error
