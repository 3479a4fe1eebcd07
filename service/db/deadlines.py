"""Client-side deadlines for calls to Postgres.

Postgres' own timeouts do not help if the server is frozen, and as long as its kernel answers, neither TCP nor a Unix
socket reports a problem (libpq has no such deadline).
"""

import contextlib
import math
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import psycopg2

from service.db.availability import DATABASE_ERRORS, DatabaseAwayError
from service.telemetry import logs

LOOK_INTERVAL_S = 0.2

log = logs.get("database")


@dataclass(eq=False)
class _Call:
    connection: Any
    due_s: float
    slow_s: float
    on_slow: Callable[[], None]
    is_cut: bool = False


class Deadlines:
    """Cuts the connections of calls that take too long; those calls then raise DatabaseAwayError."""

    def __init__(self) -> None:
        self._calls: set[_Call] = set()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    @contextlib.contextmanager
    def within(
        self, connection: Any, timeout_s: float, slow_s: float = math.inf, on_slow: Callable[[], None] = lambda: None
    ) -> Iterator[None]:
        """Cuts `connection` (psycopg2's) unless the block ends within `timeout_s`; `extend` moves that deadline.

        `on_slow` is called again and again from `slow_s` on until the end; it must not block.
        """
        begin_s = time.monotonic()
        call = _Call(connection, begin_s + timeout_s, begin_s + slow_s, on_slow)
        with self._changed:
            if self._thread is None:
                thread = threading.Thread(target=self._watch, name="deadlines", daemon=True)
                thread.start()
                self._thread = thread
            self._calls.add(call)
            self._changed.notify()
        outer, _current.call = getattr(_current, "call", None), call
        try:
            yield
        except DATABASE_ERRORS:
            if not call.is_cut:
                raise
            # libpq only saw the connection end.
            raise DatabaseAwayError(f"Postgres did not answer within {call.due_s - begin_s:.3g} s") from None
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
                for call in [call for call in self._calls if call.slow_s <= now_s]:
                    try:
                        call.on_slow()
                    except Exception as error:
                        # Such as: no thread can be started. Without this thread no call would have a deadline.
                        log.exception("slow_call_not_looked_after", cause=repr(error))
                        call.slow_s = math.inf
                for call in [call for call in self._calls if call.due_s <= now_s]:
                    self._calls.discard(call)
                    call.is_cut = True
                    cut(call.connection, "a call exceeded its deadline")
            time.sleep(LOOK_INTERVAL_S)


_current = threading.local()


def extend(timeout_s: float) -> None:
    """Gives this thread's current call at least `timeout_s` from now."""
    call: _Call | None = getattr(_current, "call", None)
    if call is not None:
        call.due_s = max(call.due_s, time.monotonic() + timeout_s)


def cut(connection: Any, why: str) -> None:
    """Breaks a connection that another thread may be waiting for."""
    # Whoever waits for it reports that, once for an outage.
    log.debug("connection_cut", why=why)
    # On a duplicate: libpq owns the descriptor, and closes it when it finds the connection broken.
    with (
        contextlib.suppress(psycopg2.InterfaceError, OSError),
        socket.socket(fileno=os.dup(connection.fileno())) as own,
    ):
        own.shutdown(socket.SHUT_RDWR)
