"""Time as a dependency, so that tests can control it."""

import asyncio
import contextlib
import time
from datetime import UTC, datetime
from typing import Protocol


class Clock(Protocol):
    """A source of time."""

    def monotonic(self) -> float:
        """Seconds that never go backwards, from an arbitrary origin."""

    def now(self) -> datetime:
        """The current time, timezone-aware (UTC)."""


class SystemClock:
    """The system's clocks."""

    def monotonic(self) -> float:
        return time.monotonic()

    def now(self) -> datetime:
        return datetime.now(UTC)


async def is_set_within(event: asyncio.Event, timeout_s: float) -> bool:
    """Waits until an event is set. False: it was not within `timeout_s`."""
    # Not wait_for: before Python 3.12 that loses a cancellation which comes with the event.
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            return await event.wait()
    return False
