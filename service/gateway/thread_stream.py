"""Reads a stream of the event loop from a thread."""

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


class FromThread(Iterator[T]):
    """The items of `stream`, awaited in `loop` one at a time as a thread asks for them.

    `next` raises what the stream raises, or CancelledError or ConnectionAbortedError after `abort`. `failure` keeps
    what the stream raised, for readers that do not report it.
    """

    def __init__(self, stream: AsyncIterator[T], loop: asyncio.AbstractEventLoop) -> None:
        self.failure: Exception | None = None
        self._stream = stream
        self._loop = loop
        self._next: Future[tuple[T] | None] | None = None
        self._is_aborted = False
        # A read that begins while `abort` runs would never be cancelled, and take an item from the next reader.
        self._lock = threading.Lock()

    def __next__(self) -> T:
        with self._lock:
            if self._is_aborted:
                raise ConnectionAbortedError("the stream was aborted")
            self._next = asyncio.run_coroutine_threadsafe(self._read(), self._loop)
        found = self._next.result()
        if found is None:
            raise StopIteration
        return found[0]

    async def _read(self) -> tuple[T] | None:
        try:
            return (await anext(self._stream),)
        except StopAsyncIteration:
            return None
        except Exception as error:
            self.failure = error
            raise

    def abort(self) -> None:
        """Ends the thread's wait and refuses further reads."""
        with self._lock:
            self._is_aborted = True
            if self._next is not None:
                self._next.cancel()
