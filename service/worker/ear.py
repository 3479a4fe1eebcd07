"""The ear: what the heart listens to while it rests, calls of this process and notices of Postgres."""

import contextlib
import os
import select
from typing import Any

import psycopg2


class Ear:
    """For one thread that waits; any may wake it."""

    def __init__(self) -> None:
        self._reads, self._writes = os.pipe()
        os.set_blocking(self._reads, False)
        os.set_blocking(self._writes, False)

    def wake(self) -> None:
        """Ends the wait, or the next one."""
        # Full: it will wake up anyway.
        with contextlib.suppress(BlockingIOError):
            os.write(self._writes, b"!")

    def wait(self, connection: Any, timeout_s: float) -> tuple[bool, list[str]]:
        """Waits for up to `timeout_s`. Returns whether it was woken, and the notices that came meanwhile.

        `connection` is psycopg2's, or None. One that breaks wakes, too.
        """
        poll = select.poll()
        poll.register(self._reads, select.POLLIN)
        is_open = connection is not None and not connection.closed
        if is_open:
            if notices := _taken(connection):
                return False, notices
            poll.register(connection.fileno(), select.POLLIN)
        ready = {descriptor for descriptor, _ in poll.poll(timeout_s * 1000)}
        is_woken = self._reads in ready
        if is_woken:
            with contextlib.suppress(BlockingIOError):
                os.read(self._reads, 1 << 16)
        if not is_open or not ready - {self._reads}:
            return is_woken, []
        try:
            connection.poll()
        except psycopg2.Error:
            # The beat that follows finds out what it is.
            return True, []
        return is_woken, _taken(connection)


def _taken(connection: Any) -> list[str]:
    payloads = [notice.payload for notice in connection.notifies]
    connection.notifies.clear()
    return payloads
