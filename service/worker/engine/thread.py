"""A thread with its own event loop for the engine: loading a model blocks the loop for minutes."""

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import uvloop

T = TypeVar("T")


class EngineThread:
    """Runs the coroutines of the engine and its runner. Starts when created."""

    def __init__(self) -> None:
        # As in vLLM's own server.
        self._loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="engine", daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> "asyncio.Future[T]":
        """Runs `work` in the engine's loop. Await the result in the caller's."""
        return asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self._loop))

    def call_soon(self, function: Callable[[], None]) -> None:
        """Calls `function` in the engine's loop."""
        self._loop.call_soon_threadsafe(function)

    def stop(self, timeout_s: float) -> None:
        """Stops the loop and waits up to `timeout_s` for the thread; a blocked loop ends with the process."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout_s)
