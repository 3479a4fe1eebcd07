"""Multipart forms, read as they arrive: fields come whole, files piece by piece."""

import asyncio
import re
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from urllib.parse import unquote_to_bytes

import grpc
from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from service.api.uploads import PIECE_TIMEOUT_S
from service.errors import ApiError
from service.http.objects import wrong

MAX_HEADER_BYTES = 16 << 10
_QUOTED = re.compile(rb'"(?:[^"\\]|\\.)*"')
_EXTENDED = re.compile(rb";\s*filename\*\s*=\s*(utf-8|iso-8859-1)'[^';]*'([^;\s]*)", re.IGNORECASE)


@dataclass(frozen=True)
class Field:
    """A field of a form. `filename` None: it is not a file."""

    name: str
    filename: str | None


class _Reader:
    """What the parser has found since it was last asked: data with its field; None is the end of a field."""

    def __init__(self, boundary: bytes) -> None:
        self.found: list[tuple[Field, bytes | None]] = []
        self.is_complete = False
        self._headers: dict[bytes, bytes] = {}
        self._header = (b"", b"")
        self._header_bytes = 0
        self._field = Field("", None)
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin,
                "on_header_field": self._name,
                "on_header_value": self._value,
                "on_header_end": self._header_end,
                "on_headers_finished": self._headers_end,
                "on_part_data": self._data,
                "on_part_end": self._end,
                "on_end": self._complete,
            },
        )

    def feed(self, data: bytes) -> list[tuple[Field, bytes | None]]:
        """What these bytes complete. Raises MultipartParseError."""
        self._parser.write(data)
        found, self.found = self.found, []
        return found

    def _begin(self) -> None:
        self._headers, self._header, self._header_bytes = {}, (b"", b""), 0

    def _name(self, data: bytes, start: int, end: int) -> None:
        self._count(end - start)
        self._header = (self._header[0] + data[start:end], self._header[1])

    def _value(self, data: bytes, start: int, end: int) -> None:
        self._count(end - start)
        self._header = (self._header[0], self._header[1] + data[start:end])

    def _count(self, size: int) -> None:
        self._header_bytes += size
        if self._header_bytes > MAX_HEADER_BYTES:
            raise MultipartParseError("the headers of a part are too long")

    def _header_end(self) -> None:
        name, value = self._header
        self._headers[name.lower()] = value
        self._header = (b"", b"")

    def _headers_end(self) -> None:
        disposition = self._headers.get(b"content-disposition", b"")
        _, options = parse_options_header(disposition)
        self._field = Field(options.get(b"name", b"").decode("utf-8", "replace"), filename_of(disposition, options))

    def _data(self, data: bytes, start: int, end: int) -> None:
        self.found.append((self._field, data[start:end]))

    def _end(self) -> None:
        self.found.append((self._field, None))

    def _complete(self) -> None:
        self.is_complete = True


def filename_of(disposition: bytes, options: Mapping[bytes, bytes]) -> str | None:
    """The name of a file, None if it has none: that of `filename*` (RFC 5987), if there is one, or of `filename`.

    Some clients send the former alone for what is not ASCII; the parser leaves it out of `options`.
    """
    found = _EXTENDED.search(_QUOTED.sub(b"", disposition))
    if found:
        return unquote_to_bytes(found[2]).decode(found[1].decode(), "replace")
    filename = options.get(b"filename")
    return None if filename is None else filename.decode("utf-8", "replace")


async def fields(request: Request) -> AsyncIterator[tuple[Field, bytes | None]]:
    """The data of each field as it arrives, and None at its end.

    Raises INVALID_ARGUMENT for what is not such a form, DEADLINE_EXCEEDED for a client that has gone silent.
    """
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    boundary = options.get(b"boundary")
    if kind != b"multipart/form-data" or not boundary:
        raise wrong("content-type", "must be multipart/form-data, with a boundary")
    try:
        reader = _Reader(boundary)
        async for data in timely(request.stream()):
            for found in reader.feed(data):
                yield found
    except MultipartParseError as error:
        raise wrong("body", f"is not multipart/form-data: {error}") from None
    if not reader.is_complete:
        raise wrong("body", "is not complete: the last boundary is missing")


@asynccontextmanager
async def timely_piece() -> AsyncIterator[None]:
    """Around the wait for the next piece of a body. Raises DEADLINE_EXCEEDED after PIECE_TIMEOUT_S."""
    try:
        async with asyncio.timeout(PIECE_TIMEOUT_S):
            yield
    except TimeoutError as error:
        why = f"upload stopped: no data arrived for {PIECE_TIMEOUT_S:.0f} s"
        raise ApiError(grpc.StatusCode.DEADLINE_EXCEEDED, why) from error


async def timely(stream: AsyncGenerator[bytes, None]) -> AsyncIterator[bytes]:
    """The body of a request. Raises DEADLINE_EXCEEDED if no data arrives for PIECE_TIMEOUT_S."""
    while True:
        async with timely_piece():
            data = await anext(stream, None)
        if data is None:
            return
        yield data
