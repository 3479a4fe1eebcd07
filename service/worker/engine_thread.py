"""A thread with an event loop of its own for the engine: loading a model blocks its loop for minutes."""

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import uvloop

T = TypeVar("T")


class EngineThread:
    """Runs coroutines of the engine and its runner. Started when made."""

    def __init__(self) -> None:
        # As vLLM's own server has it.
        self._loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="engine", daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> "asyncio.Future[T]":
        """Runs `work` in the engine's loop; to be awaited in the caller's."""
        return asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self._loop))

    def call_soon(self, function: Callable[[], None]) -> None:
        """Calls `function` in the engine's loop."""
        self._loop.call_soon_threadsafe(function)

    def stop(self, timeout_s: float) -> None:
        """Ends the loop and waits a while for the thread; a loop that is blocked ends with the process."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout_s)
