"""Deadlines on our side of a connection.

Those of Postgres are kept by Postgres: a server that is frozen ends no statement, and as long as its kernel answers
neither TCP nor a Unix socket says that anything is wrong (libpq has no such deadline of its own).
"""

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import psycopg2

from service import logs

LOOK_INTERVAL_S = 0.2

log = logs.get("database")


@dataclass(eq=False)
class _Call:
    connection: Any
    due_s: float


class Deadlines:
    """Cuts the connections of calls that take too long: what waits on one gets psycopg2's OperationalError."""

    def __init__(self) -> None:
        self._calls: set[_Call] = set()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    @contextlib.contextmanager
    def within(self, connection: Any, timeout_s: float) -> Iterator[None]:
        """Cuts `connection` (psycopg2's) unless the block ends within `timeout_s`, or as `extend` has it."""
        call = _Call(connection, time.monotonic() + timeout_s)
        with self._changed:
            if self._thread is None:
                self._thread = threading.Thread(target=self._watch, name="deadlines", daemon=True)
                self._thread.start()
            self._calls.add(call)
            self._changed.notify()
        outer, _current.call = getattr(_current, "call", None), call
        try:
            yield
        finally:
            _current.call = outer
            with self._changed:
                self._calls.discard(call)

    def _watch(self) -> None:
        while True:
            with self._changed:
                while not self._calls:
                    self._changed.wait()
                now_s = time.monotonic()
                for call in [call for call in self._calls if call.due_s <= now_s]:
                    self._calls.discard(call)
                    _cut(call.connection)
            time.sleep(LOOK_INTERVAL_S)


_current = threading.local()


def extend(timeout_s: float) -> None:
    """Gives the call that this thread is in so long from now."""
    call: _Call | None = getattr(_current, "call", None)
    if call is not None:
        call.due_s = max(call.due_s, time.monotonic() + timeout_s)


def _cut(connection: Any) -> None:
    log.warning("connection_cut", why="a call took longer than its deadline")
    # Of a copy: the descriptor itself is libpq's, who closes it when it finds the connection broken.
    with (
        contextlib.suppress(psycopg2.InterfaceError, OSError),
        socket.socket(fileno=os.dup(connection.fileno())) as own,
    ):
        own.shutdown(socket.SHUT_RDWR)
