"""The event that an idle runner waits for."""

import asyncio

from service.clock import is_set_within

# How long to wait before looking again after finding no work or no Postgres.
IDLE_S = 1.0


class Wakeup:
    """Wakes the runner when a request has ended, a result is stored or work has arrived. For one waiter at a time."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def set(self) -> None:
        """Wakes the waiter, or the next one. Call in the runner's loop."""
        self._event.set()

    async def wait(self, timeout_s: float = IDLE_S) -> None:
        """Waits until something has happened, for at most `timeout_s`."""
        await is_set_within(self._event, timeout_s)
        self._event.clear()
