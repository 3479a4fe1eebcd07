"""The bytes of files: of uploaded ones as they were stored, of output and error files made of the results."""

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any, TypeVar

from service.db import file_batches, files, output
from service.db.availability import DatabaseAwayError
from service.db.connection import Database
from service.db.output import Kind, Measuring, Page
from service.db.results import LARGE_BYTES

# Pages that are read at once, while another is sent.
AHEAD = 2
# Of a file's index, which is read in parts too.
PAGES = 256
# How many batches are measured at once.
BATCHES = 20
# How long a download waits for Postgres, rather than break.
PATIENCE_S = 60.0

T = TypeVar("T")


class GoneError(Exception):
    """The rest of a file is not there any more: it was deleted while it was read."""


async def measured(database: Database, batch_id: int, tenant: str | None = None) -> bool:
    """Measures output and error file of a batch that has ended, unless that was done.

    False: there is no such batch, or not of the tenant, or it has not ended.
    """
    if await database.read(output.is_measured, batch_id):
        return True
    found = await database.read(file_batches.get, batch_id, tenant)
    if found is None or not found.batch.is_terminal:
        return False
    measuring = Measuring(found.batch)
    for source, first in output.stretches(found.batch):
        await database.read(measuring.measure, source, first)
    await database.run_idempotent(measuring.store)
    return True


async def measure_ended(database: Database, tenant: str | None = None) -> bool:
    """Measures the files of batches that have ended since this was last done. True: there may be more."""
    found = await database.read(output.unmeasured, BATCHES, tenant)
    for batch in found:
        await measured(database, batch.id)
    return len(found) == BATCHES


async def of_input(database: Database, file_id: int, first: int, end: int) -> AsyncGenerator[bytes]:
    """The bytes of an uploaded file from `first` to `end`. Raises GoneError."""
    at = first
    reading = asyncio.ensure_future(_patiently(database, files.read_piece, file_id, at))
    try:
        while at < end:
            piece = (await reading)[: end - at]
            if not piece:
                raise GoneError
            at += len(piece)
            if at < end:
                reading = asyncio.ensure_future(_patiently(database, files.read_piece, file_id, at))
            yield piece
    finally:
        await _drop([reading])


async def of_output(database: Database, batch_id: int, kind: Kind, first: int, end: int) -> AsyncGenerator[bytes]:
    """The bytes of an output or error file that is measured, from `first` to `end`. Raises GoneError."""
    reading: deque[asyncio.Future[bytes]] = deque()
    try:
        async for page in _pages(database, batch_id, kind, first, end):
            begin, stop = max(0, first - page.first), min(page.bytes, end - page.first)
            if page.large:
                while reading:
                    yield await reading.popleft()
                async for piece in _large(database, batch_id, page, begin, stop):
                    yield piece
                continue
            reading.append(asyncio.ensure_future(_lines(database, batch_id, page, begin, stop)))
            if len(reading) > AHEAD:
                yield await reading.popleft()
        while reading:
            yield await reading.popleft()
    finally:
        await _drop(reading)


async def _pages(database: Database, batch_id: int, kind: Kind, first: int, end: int) -> AsyncIterator[Page]:
    at = first
    while at < end:
        found = await _patiently(database, output.pages, batch_id, kind, at, PAGES)
        if not found:
            raise GoneError
        for page in found:
            if page.first >= end:
                return
            yield page
        at = found[-1].first + found[-1].bytes


async def _lines(database: Database, batch_id: int, page: Page, begin: int, stop: int) -> bytes:
    lines = await _patiently(database, output.read, batch_id, page)
    if len(lines) != page.bytes:
        raise GoneError
    return lines[begin:stop]


async def _large(database: Database, batch_id: int, page: Page, begin: int, stop: int) -> AsyncIterator[bytes]:
    """The line of a large body, from its byte `begin` to `stop`."""
    at, body_at = begin, 0
    while at < stop:
        head, body, tail = await _patiently(database, output.read_large, batch_id, page, body_at)
        if len(head) + page.large + len(tail) != page.bytes:
            raise GoneError
        here = len(head) + body_at
        # What was read lies in the line with what is before and behind it, where these are next to it.
        data, data_at = body, here
        if not body_at:
            data, data_at = head + body, 0
        if body_at + len(body) == page.large:
            data += tail
        piece = data[max(0, at - data_at) : stop - data_at]
        if piece:
            yield piece
            at += len(piece)
        # The next one, or where the first byte that is asked for is.
        body_at = max(body_at + LARGE_BYTES, (at - len(head)) // LARGE_BYTES * LARGE_BYTES)
        body_at = min(body_at, (page.large - 1) // LARGE_BYTES * LARGE_BYTES)


async def _patiently(database: Database, function: Callable[..., T], *args: Any) -> T:
    """A read that is tried again while Postgres is away, for PATIENCE_S."""
    until_s = asyncio.get_running_loop().time() + PATIENCE_S
    while True:
        try:
            return await database.run(function, *args)
        except DatabaseAwayError:
            if asyncio.get_running_loop().time() > until_s:
                raise
            await asyncio.sleep(1)


async def _drop(reading: Any) -> None:
    for one in reading:
        one.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        # What they failed of, if they did, concerns nobody any more.
        await asyncio.gather(*reading, return_exceptions=True)
