"""peewee's database with our sessions, and a pool of them: lent to one thread at a time, closed when idle."""

import contextlib
import select
import threading
import time
from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

import peewee
from psycopg2.extensions import TRANSACTION_STATUS_IDLE

from service.db import sessions, standby
from service.db.availability import DatabaseAwayError

# How long a connection stays open that nobody uses.
IDLE_S = 10.0
# How long to wait for a connection of others, whose calls mostly take milliseconds, before another is opened.
PATIENCE_S = 0.2


class Postgres(peewee.PostgresqlDatabase):
    """peewee's database with our sessions and libpq's own parameters, so that a URL means what it means to psql."""

    session_timeout_s: float
    synchronous_commit: str

    def _connect(self) -> Any:
        return sessions.open_session(
            self.session_timeout_s, self.synchronous_commit == standby.LOCAL, **self.connect_params
        )


class Pool(Postgres):
    """As many connections as are used at once. A thread that connects holds up no other."""

    def __init__(self, database: str, **parameters: Any) -> None:
        super().__init__(database, **parameters)
        # peewee holds its lock while it connects, and takes it to close. What it guards belongs to each thread.
        self._lock = contextlib.nullcontext()
        self._changed = threading.Condition()
        self._lent = 0
        # With the time since which each is idle. The last one is lent first, so that the others can be closed.
        self._idle: list[tuple[float, Any]] = []
        # How often `renew` was called, and how often before each connection was opened.
        self._renewed = 0
        self._opened: WeakKeyDictionary[Any, int] = WeakKeyDictionary()
        self._closer: threading.Thread | None = None

    def renew(self) -> None:
        """Closes all connections: the idle ones now, and those that are lent once they come back."""
        with self._changed:
            self._renewed += 1
        self.close_idle()

    def close_idle(self, unused_s: float = 0.0) -> None:
        """Closes the connections that nobody has used for `unused_s`."""
        until_s = time.monotonic() - unused_s
        with self._changed:
            closing = [connection for since_s, connection in self._idle if since_s <= until_s]
            self._idle = [each for each in self._idle if each[0] > until_s]
        for connection in closing:
            _close(connection)

    def _connect(self) -> Any:
        with self._changed:
            if self._lent and not self._idle:
                self._changed.wait(PATIENCE_S)
            self._lent += 1
        try:
            while (connection := self._take()) is not None:
                if _is_alive(connection):
                    return connection
                _close(connection)
            renewed = self._renewed
            connection = super()._connect()
            with self._changed:
                self._opened[connection] = renewed
            return connection
        except BaseException:
            self._returned(None)
            raise

    def _take(self) -> Any:
        with self._changed:
            return self._idle.pop()[1] if self._idle else None

    def _close(self, connection: Any) -> None:
        is_fine = not connection.closed and connection.info.transaction_status == TRANSACTION_STATUS_IDLE
        if not self._returned(connection if is_fine else None):
            _close(connection)

    def _returned(self, connection: Any | None) -> bool:
        """False: it is not kept."""
        with self._changed:
            self._lent -= 1
            is_kept = connection is not None and self._opened.get(connection) == self._renewed
            if is_kept:
                self._idle.append((time.monotonic(), connection))
                if self._closer is None:
                    closer = threading.Thread(target=self._close_unused, name="pool", daemon=True)
                    # Where no thread can be had, the next connection that comes back tries again: what this one was
                    # for is done, and may be stored.
                    with contextlib.suppress(RuntimeError):
                        closer.start()
                        self._closer = closer
            self._changed.notify()
            return is_kept

    def _close_unused(self) -> None:
        while True:
            time.sleep(IDLE_S / 2)
            self.close_idle(IDLE_S)
            with self._changed:
                if not self._idle and not self._lent:
                    self._closer = None
                    return


class Turns:
    """Lets `count` callers in at a time; the others wait."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._free = threading.Semaphore(count)

    @contextlib.contextmanager
    def one(self, timeout_s: float) -> Iterator[None]:
        """Raises DatabaseAwayError if there is no turn within `timeout_s`."""
        if not self._free.acquire(timeout=timeout_s):
            raise DatabaseAwayError(f"all {self._count} connections were in use for {timeout_s:.3g} s")
        try:
            yield
        finally:
            self._free.release()


def _is_alive(connection: Any) -> bool:
    """False if the server closed it while it was idle; without asking the server."""
    if connection.closed:
        return False
    # An idle connection has data to read only if the server closed it. Not select(), which does not support the
    # descriptors over 1023 that a gateway with many clients has.
    poll = select.poll()
    poll.register(connection, select.POLLIN)
    return not poll.poll(0)


def _close(connection: Any) -> None:
    with contextlib.suppress(Exception):
        connection.close()
