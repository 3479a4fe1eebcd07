"""Intake: streams the lines of a new batch from the client into Postgres, in constant memory."""

import asyncio
import hashlib
import json
import re
from bisect import bisect_right
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import grpc
import msgspec
import psycopg2.errors
from google.protobuf.json_format import MessageToDict

from service.api.messages import creation_error, too_large
from service.api.uploads import BOM, PIECE_TIMEOUT_S
from service.db import creation, served
from service.db.availability import DatabaseAwayError
from service.db.batches import Batch
from service.db.connection import Database
from service.db.creation import Content, Options
from service.db.limits import FullError, Limits
from service.db.run_order import RunOrder
from service.errors import MAX_VIOLATIONS, ApiError, Violation, invalid
from service.worker.lines import LineError, format_of, not_json, parse
from service.worker.offer import Offer
from service.worker.survey import Survey
from vllm_batch.v1 import batch_service_pb2 as pb

# For a whole upload, and for the transaction at its end, which creates the chunks.
STORE_TIMEOUT_S = 3600.0
CREATE_TIMEOUT_S = 300.0
# How much more is read after the first invalid line, to report the others too.
READ_ON_BYTES = 64 << 20
# Number of requests whose names are remembered, to report every repetition. Postgres knows all names and reports the
# first repetition.
REMEMBERED = 100_000
# Smaller batches are stored in one transaction; larger ones are staged in pieces of this size.
STAGE_BYTES = 4 << 20

# Messages are in the server's language: only numbers and names are the same in all languages.
_COPY_ROW = re.compile(r"COPY requests\D*(\d+)")
_DUPLICATE = re.compile(r"\(batch_id, custom_id\)=\(\d+, (.*)\)[^)]*\Z", re.DOTALL)


@dataclass(frozen=True)
class Sizes:
    """Limits on the size of one batch."""

    requests: int
    line_bytes: int
    batch_bytes: int


def file_place(number: int) -> str:
    """Names a line of a file (from 1) in errors."""
    return f"line {number}"


def inline_place(number: int) -> str:
    """Names an inline request (from 1) in errors."""
    return f"requests[{number - 1}]"


class Rows:
    """Turns the pieces of a file into rows for COPY, checking each line.

    `feed` and `end` raise ApiError for invalid lines: for all of them together, up to a number, or for a model that is
    away; `end` also if all models are. There are no more rows once a line is invalid. `run_order` is the client's: with
    `prefix` the rows have the keys of their prompts.
    """

    def __init__(
        self,
        batch_id: int,
        offer: Offer,
        sizes: Sizes,
        place: Callable[[int], str] = file_place,
        salt: bytes = b"",
        run_order: RunOrder = "prefix",
    ) -> None:
        self.total = 0
        self._run_order = run_order
        self._survey = Survey()
        self._models: set[str] = set()
        # Some request names no model: any worker runs it.
        self._is_for_any = False
        self._batch_id = str(batch_id).encode()
        self._offer = offer
        self._sizes = sizes
        self._bytes = 0
        self._place = place
        self._hash = hashlib.sha256(salt)
        self._line_number = 0
        # For each skipped blank line the number of rows before it: maps a row that COPY names to its line.
        self._blank_before: list[int] = []
        self._rest = b""
        self._names: set[str] = set()
        self._violations: list[Violation] = []
        # Of the batch, when the first wrong line was found.
        self._bytes_until_wrong = 0
        # The last line that is an opening brace and nothing else.
        self._brace_line = -1

    @property
    def content(self) -> Content:
        """Number of requests, models, digest, estimated tokens and order so far."""
        survey = self._survey
        plan = survey.plan(is_input_order=self._run_order == "input")
        return Content(self.total, sorted(self._models), self._hash.digest(), survey.tokens, plan)

    def place_of_row(self, row: int) -> str:
        """Names a row (from 1) in errors."""
        return self._place(row + bisect_right(self._blank_before, row - 1))

    def feed(self, piece: bytes) -> bytes:
        """Returns the rows of the lines that this piece completes."""
        self._hash.update(piece)
        self._bytes += len(piece)
        if self._bytes > self._sizes.batch_bytes:
            raise too_large("bytes of the batch", self._sizes.batch_bytes, self._bytes)
        lines = (self._rest + piece).split(b"\n")
        self._rest = lines.pop()
        if len(self._rest) > self._sizes.line_bytes:
            # Do not read on: `_rows` refuses it by its number, like any line that is too long.
            lines.append(self._rest)
        return self._rows(lines)

    def end(self) -> bytes:
        """Returns the row of a last line that has no line break, if any."""
        rows = self._rows([self._rest]) if self._rest else b""
        if self._violations:
            raise invalid(self._violations)
        if self.total == 0:
            raise invalid([Violation("requests", "must contain at least one request")])
        if not self._is_for_any:
            self._offer.check_some_live(self._models)
        return rows

    def _rows(self, lines: list[bytes]) -> bytes:
        rows = []
        tokens, keys, body_bytes = [], [], 0
        with_prefix = self._run_order == "prefix"
        for line in lines:
            self._line_number += 1
            if self._line_number == 1:
                line = line.removeprefix(BOM)
                if found := format_of(line):
                    raise invalid([Violation("file", f"is {found}: give JSON lines in UTF-8, one request a line")])
            if not line or line.isspace():
                self._blank_before.append(self.total)
                continue
            place = self._place(self._line_number)
            if len(line) > self._sizes.line_bytes:
                raise too_large(f"bytes of {place}", self._sizes.line_bytes, len(line))
            if self.total >= self._sizes.requests:
                raise too_large("requests of the batch", self._sizes.requests, self.total + 1)
            try:
                parsed = parse(line, place, self._offer, with_prefix)
            except LineError as error:
                if error.unknown_model:
                    self._offer.check_coming(error.unknown_model, place)
                self._check_layout(line)
                self._note_wrong(error.violations)
                continue
            if parsed.custom_id in self._names:
                self._note_wrong([Violation(f"{place}: custom_id", _used_before(parsed.custom_id))])
                continue
            if len(self._names) < REMEMBERED:
                self._names.add(parsed.custom_id)
            fields = (parsed.custom_id.encode(), parsed.url.encode(), parsed.body)
            if parsed.model is None:
                self._is_for_any = True
            elif parsed.model not in self._models:
                self._offer.check_live(parsed.model, place)
                self._models.add(parsed.model)
            key = b"\\\\x" + parsed.prefix.hex().encode() if parsed.prefix else b"\\N"
            estimate = str(parsed.estimated_tokens).encode()
            model = _escape((parsed.model or "").encode())
            row = (self._batch_id, str(self.total).encode(), *map(_escape, fields), key, estimate, model)
            rows.append(b"\t".join(row))
            self.total += 1
            tokens.append(parsed.estimated_tokens)
            body_bytes += len(parsed.body)
            if parsed.prefix:
                keys.append(parsed.prefix)
        if tokens:
            self._survey.add(tokens, body_bytes, keys)
        if self._violations:
            if self._bytes - self._bytes_until_wrong > READ_ON_BYTES:
                raise invalid(self._violations)
            return b""
        return b"\n".join(rows) + b"\n" if rows else b""

    def _check_layout(self, line: bytes) -> None:
        """Raises INVALID_ARGUMENT if this wrong line continues an object, as in pretty-printed JSON."""
        if line.strip() == b"{":
            self._brace_line = self._line_number
        elif self._brace_line == self._line_number - 1 and line.lstrip().startswith(b'"'):
            what = "pretty-printed JSON begins here: give JSON lines in UTF-8, one request a line"
            # Instead of the brace, and of each line that follows.
            raise invalid([*self._violations[:-1], Violation(self._place(self._brace_line), what)])

    def _note_wrong(self, violations: list[Violation]) -> None:
        self._bytes_until_wrong = self._bytes_until_wrong or self._bytes
        self._violations += violations
        if len(self._violations) >= MAX_VIOLATIONS:
            raise invalid(self._violations[:MAX_VIOLATIONS])


def _used_before(custom_id: str) -> str:
    return f"{custom_id[:100]!r} is already used by an earlier request"


def _escape(field: bytes) -> bytes:
    """Escapes a value for COPY's text format."""
    field = field.replace(b"\\", b"\\\\")
    return field.replace(b"\t", b"\\t").replace(b"\n", b"\\n").replace(b"\r", b"\\r")


def inline_lines(request: pb.CreateBatchRequest) -> bytes:
    """Converts inline requests to the lines of a file. Raises INVALID_ARGUMENT unless each has exactly one body."""
    lines, violations = [], []
    for number, item in enumerate(request.requests):
        if item.HasField("body") == bool(item.body_json):
            violations.append(Violation(f"requests[{number}]: body", "give exactly one of `body` and `body_json`"))
            continue
        try:
            body = json.dumps(_integers(MessageToDict(item.body))) if item.HasField("body") else item.body_json
        except ValueError:
            # The only numbers that a Struct can have and JSON cannot.
            what = "NaN and Infinity are no JSON numbers: use null, or leave the field out"
            violations.append(Violation(f"requests[{number}]: body", what))
            continue
        try:
            msgspec.json.decode(body, type=msgspec.Raw)
        except (msgspec.DecodeError, RecursionError) as error:
            is_deep = isinstance(error, RecursionError)
            what = "nested too deeply" if is_deep else not_json(item.body_json.encode(), error)
            violations.append(Violation(f"requests[{number}]: body_json", what))
            continue
        # In JSON line breaks occur only between tokens, where a space means the same.
        body = body.replace("\n", " ")
        head = json.dumps({"custom_id": item.custom_id, "method": item.method or "POST", "url": item.url})
        lines.append(f'{head[:-1]}, "body": {body}}}\n')
    if violations:
        raise invalid(violations[:MAX_VIOLATIONS])
    return "".join(lines).encode()


def _integers(value: Any) -> Any:
    """Converts whole doubles back to the integers that the client meant: a Struct has only doubles."""
    if isinstance(value, dict):
        return {name: _integers(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_integers(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


class Destination(Protocol):
    """Where the rows of a batch go. All of it may raise psycopg2's UniqueViolation for a repeated custom_id."""

    async def stage(self, rows: bytes) -> None:
        """Stores some of them, which nobody sees yet."""

    async def create(self, content: Content, rows: bytes, is_staged: bool) -> Batch:
        """Makes a batch of what was staged, if anything, and of these rows."""

    async def abandon(self) -> None:
        """Removes what was staged."""


@dataclass(frozen=True)
class NewBatch:
    """A batch that exists once it is whole."""

    database: Database
    batch_id: int
    options: Options
    limits: Limits

    async def stage(self, rows: bytes) -> None:
        """For as long as an upload may take."""
        await self.database.retry_once(
            lambda is_again: self.database.run(creation.stage, self.batch_id, rows, 2 * STORE_TIMEOUT_S, is_again)
        )

    async def create(self, content: Content, rows: bytes, is_staged: bool) -> Batch:
        """Raises DuplicateError, FullError too."""
        given = self.batch_id, self.options, content, rows, is_staged, CREATE_TIMEOUT_S, self.limits
        return await self.database.retry_once(lambda is_again: self.database.run(creation.create, *given, is_again))

    async def abandon(self) -> None:
        """Soon, by the gateway."""
        await self.database.run_idempotent(creation.abandon, self.batch_id)


@dataclass
class _Staging:
    """Writes rows to Postgres: few of them together with the batch, more in pieces, each while the next arrives."""

    destination: Destination
    rows: Rows
    _waiting: list[bytes] = field(default_factory=list)
    _size: int = 0
    _storing: asyncio.Task[None] | None = None
    # Number of requests in earlier pieces.
    _staged: int = 0

    async def add(self, rows: bytes) -> None:
        """Adds rows and stores a piece once there are enough. Raises the exception of an earlier piece, if any."""
        self._waiting.append(rows)
        self._size += len(rows)
        if self._size >= STAGE_BYTES:
            await self.settle()
            self._storing = asyncio.create_task(self._stage(self._staged, self._take()))
            self._staged = self.rows.total

    async def create(self) -> Batch:
        """Creates the batch with the remaining rows."""
        await self.settle()
        content, is_staged = self.rows.content, self._staged > 0
        with self._telling_duplicates(self._staged):
            return await self.destination.create(content, self._take(), is_staged)

    async def settle(self) -> None:
        """Waits for the piece that is being stored. Raises its exception, if any."""
        if self._storing is not None:
            # A thread does the work, and a thread cannot be cancelled.
            await asyncio.shield(self._storing)

    async def abandon(self) -> None:
        """Removes what was staged."""
        if self._storing is None:
            return
        await asyncio.wait({self._storing})
        with suppress(DatabaseAwayError):
            await self.destination.abandon()

    async def _stage(self, before: int, rows: bytes) -> None:
        with self._telling_duplicates(before):
            await self.destination.stage(rows)

    def _take(self) -> bytes:
        taken, self._waiting, self._size = b"".join(self._waiting), [], 0
        return taken

    @contextmanager
    def _telling_duplicates(self, before: int) -> Iterator[None]:
        try:
            yield
        except psycopg2.errors.UniqueViolation as error:
            if error.diag.constraint_name != creation.CUSTOM_IDS:
                raise
            row = _COPY_ROW.search(error.diag.context or "")
            key = _DUPLICATE.search(error.diag.message_detail or "")
            place = self.rows.place_of_row(before + int(row[1])) if row else "requests"
            raise invalid([Violation(f"{place}: custom_id", _used_before(key[1] if key else ""))]) from None


async def fill(rows: Rows, pieces: AsyncIterator[bytes], destination: Destination) -> Batch:
    """Checks the lines in `pieces` and stores them, all or nothing.

    Raises ApiError for wrong lines and for pieces that take too long, and what the destination raises.
    """
    staging = _Staging(destination, rows)
    try:
        async with _upload_timeout(STORE_TIMEOUT_S, f"it took longer than {STORE_TIMEOUT_S:.0f} s"):
            async for piece in _timely(pieces):
                # In a thread: parsing a large piece would block the event loop.
                await staging.add(await asyncio.to_thread(rows.feed, piece))
            await staging.add(await asyncio.to_thread(rows.end))
            return await staging.create()
    except BaseException:
        # Shielded: gRPC may cancel the call of a client that has gone more than once.
        await asyncio.shield(staging.abandon())
        raise


@dataclass(frozen=True)
class Intake:
    """Stores new batches within limits."""

    database: Database
    sizes: Sizes
    limits: Limits

    async def store(
        self, options: Options, salt: bytes, pieces: AsyncIterator[bytes], offer: Offer, place: Callable[[int], str]
    ) -> Batch:
        """Stores a batch from its lines, all or nothing. Repeated with the same request_id, returns the first batch.

        Raises DatabaseAwayError, or ApiError: INVALID_ARGUMENT naming each invalid line and field, UNAVAILABLE for a
        model that is away, ALREADY_EXISTS.
        """
        try:
            batch_id = await self.database.run_idempotent(creation.reserve, self.limits, options)
        except FullError as error:
            raise creation_error(error) from None
        others = await self.database.read(served.read)
        offer = replace(offer, others=others, require_live=options.require_live)
        rows = Rows(batch_id, offer, self.sizes, place, salt, options.run_order)
        try:
            return await fill(rows, pieces, NewBatch(self.database, batch_id, options, self.limits))
        except creation.DuplicateError as error:
            if error.batch.digest == rows.content.digest:
                return error.batch
            raise creation_error(error) from None
        except FullError as error:
            raise creation_error(error) from None


async def _timely(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Yields the pieces. Raises DEADLINE_EXCEEDED if one takes longer than PIECE_TIMEOUT_S."""
    while True:
        async with _upload_timeout(PIECE_TIMEOUT_S, f"no data arrived for {PIECE_TIMEOUT_S:.0f} s"):
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
