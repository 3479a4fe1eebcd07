"""Intake: the lines of a new batch, from the stream of a client into a COPY, with constant memory."""

import hashlib
import json
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass
from typing import Any

import grpc
import msgspec
import psycopg2.errors
from google.protobuf.json_format import MessageToDict

from service.db import batches
from service.db.batches import Batch, Limits, Options
from service.db.connection import Database
from service.errors import ApiError, Violation, invalid
from service.lines import MAX_VIOLATIONS, LineError, parse
from service.messages import creation_error, too_large
from service.streams import FromThread
from vllm_batch.v1 import batch_service_pb2 as pb

# A client that sends nothing for this long has gone.
PIECE_TIMEOUT_S = 60.0
# The longest that storing one batch may take, all in all.
STORE_TIMEOUT_S = 3600.0

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
    """The requests of one new batch as rows for COPY, checked line by line as COPY reads them.

    `read` raises ApiError for lines that are wrong; psycopg2 reports that as an error of its own, so the cause is
    kept in `failure`.
    """

    def __init__(
        self,
        batch_id: int,
        pieces: Iterator[bytes],
        offer: Offer,
        sizes: Sizes,
        place: Callable[[int], str],
        salt: bytes,
    ) -> None:
        self.total = 0
        self.models: set[str] = set()
        self.failure: BaseException | None = None
        self._batch_id = str(batch_id).encode()
        self._pieces = pieces
        self._offer = offer
        self._sizes = sizes
        self._bytes = 0
        self._place = place
        self._hash = hashlib.sha256(salt)
        self._line_number = 0
        # Rows before which a blank line was skipped, to get from the row that COPY names to its line.
        self._blank_before: list[int] = []
        self._rest = b""
        self._at_end = False

    @property
    def digest(self) -> bytes:
        """Hash of the content and the options."""
        return self._hash.digest()

    def place_of_row(self, row: int) -> str:
        """How the row of a number (from 1) is named in errors."""
        return self._place(row + bisect_right(self._blank_before, row - 1))

    def read(self, size: int) -> bytes:
        """The rows of the next piece that has any; b"" at the end."""
        try:
            while not self._at_end:
                rows = self._rows(self._lines())
                if rows:
                    return rows
            if self.total == 0:
                raise invalid([Violation("requests", "there are none: a batch has at least one")])
        except BaseException as error:
            self.failure = error
            raise
        return b""

    def _lines(self) -> list[bytes]:
        """The lines that the next piece completes."""
        piece = next(self._pieces, None)
        if piece is None:
            self._at_end = True
            last, self._rest = self._rest, b""
            return [last] if last else []
        self._hash.update(piece)
        self._bytes += len(piece)
        if self._bytes > self._sizes.batch_bytes:
            raise too_large("bytes of the batch", self._sizes.batch_bytes, self._bytes)
        lines = (self._rest + piece).split(b"\n")
        self._rest = lines.pop()
        if len(self._rest) > self._sizes.line_bytes:
            # Read no further; it is refused with its number as any line that is too long.
            lines.append(self._rest)
        return lines

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
                self.models.add(parsed.model)
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


@dataclass(frozen=True)
class Intake:
    """Stores new batches within limits."""

    database: Database
    sizes: Sizes
    limits: Limits

    async def store(
        self, options: Options, salt: bytes, pieces: FromThread[bytes], offer: Offer, place: Callable[[int], str]
    ) -> Batch:
        """Stores a batch from its lines, whole or not at all. The same again under its request_id gives the first.

        Raises ApiError: INVALID_ARGUMENT naming each wrong line and field, ALREADY_EXISTS; or one of `Unreachable`.
        """
        rows: Rows | None = None

        def make_rows(batch_id: int) -> Rows:
            nonlocal rows
            rows = Rows(batch_id, pieces, offer, self.sizes, place, salt)
            return rows

        try:
            return await self.database.run(batches.store, options, make_rows, STORE_TIMEOUT_S, self.limits)
        except batches.DuplicateError as error:
            assert rows is not None
            if error.batch.digest == rows.digest:
                return error.batch
            raise creation_error(error) from None
        except batches.FullError as error:
            raise creation_error(error) from None
        except psycopg2.errors.UniqueViolation as error:
            assert rows is not None
            raise _duplicate_custom_id(error, rows) from None
        except Exception as error:
            if rows is not None and isinstance(rows.failure, ApiError):
                raise rows.failure from None
            if rows is not None and isinstance(rows.failure, TimeoutError):
                raise ApiError(
                    grpc.StatusCode.DEADLINE_EXCEEDED, f"upload stopped: nothing came for {PIECE_TIMEOUT_S:.0f} s"
                ) from error
            raise
        finally:
            pieces.abort()


def _duplicate_custom_id(error: psycopg2.errors.UniqueViolation, rows: Rows) -> ApiError:
    row = _COPY_ROW.search(error.diag.context or "")
    key = _DUPLICATE.search(error.diag.message_detail or "")
    place = rows.place_of_row(int(row[1])) if row else "requests"
    return invalid([Violation(f"{place}: custom_id", f"{key[1] if key else ''!r} was used on an earlier line")])
