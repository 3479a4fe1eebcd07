"""The servers that a URL names: finds the one that takes writes, quickly, also while others are down or frozen.

libpq tries several hosts in turn, and waits for each one that is down for as long as a connection attempt may take.
"""

import queue
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import psycopg2

from service.db.deadlines import cut
from service.telemetry import logs

# How long the server that took writes before may take to answer before all are asked.
KNOWN_S = 3.0
# How long to wait before asking a standby again, which may be promoted, while another server keeps silent.
RETRY_S = 1.0
# A call that takes this long may be waiting for a server that is gone.
SLOW_S = 3.0
# How often such calls make us look for another server.
LOOK_INTERVAL_S = 2.0

Connect = Callable[[Mapping[str, Any], float], Any]

log = logs.get("database")


class Servers:
    """The servers of one URL, for all connections of a process.

    `connect(parameters, timeout_s)` opens a connection to one of them, and raises psycopg2's errors.
    """

    def __init__(self, servers: Sequence[Mapping[str, str]], connect: Connect) -> None:
        self._servers = servers
        self._connect = connect
        self._lock = threading.Lock()
        self._known: int | None = None
        self._open: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        # Held while all are asked, so that one thread asks for all that need a connection.
        self._searching = threading.Lock()
        self._failure: Exception | None = None
        self._failed_s = 0.0
        self._looked_s = float("-inf")

    def connect(self, given: Mapping[str, Any], timeout_s: float) -> Any:
        """Connects to the server that takes writes; to the only one, whether it does or not.

        When that is another one than before, all connections to others are cut: what waits for them would wait for its
        deadline. Raises psycopg2's errors.
        """
        if len(self._servers) == 1:
            return self._connect({**given, **self._servers[0]}, timeout_s)
        known = self._known
        if known is not None:
            try:
                return self._connect_to(known, given, min(timeout_s, KNOWN_S))
            except psycopg2.OperationalError:
                with self._lock:
                    if self._known == known:
                        self._known = None
        return self._search(given, timeout_s)

    def look(self, given: Mapping[str, Any], timeout_s: float) -> None:
        """Checks in a thread of its own whether another server takes writes now. For calls that take long."""
        with self._lock:
            now_s = time.monotonic()
            if len(self._servers) == 1 or now_s < self._looked_s + LOOK_INTERVAL_S:
                return
            # Not again before this one has ended.
            self._looked_s = float("inf")

        def look() -> None:
            try:
                self.connect(given, timeout_s).close()
            except psycopg2.Error as error:
                log.debug("no_server", cause=str(error))
            finally:
                self._looked_s = time.monotonic()

        try:
            threading.Thread(target=look, name="servers", daemon=True).start()
        except RuntimeError:
            self._looked_s = now_s
            raise

    def _connect_to(self, index: int, given: Mapping[str, Any], timeout_s: float) -> Any:
        connection = self._connect({**given, **self._servers[index]}, timeout_s)
        if self._known not in (None, index):
            connection.close()
            raise psycopg2.OperationalError("another server takes writes now")
        self._note(index, connection)
        return connection

    def _search(self, given: Mapping[str, Any], timeout_s: float) -> Any:
        asked_s = time.monotonic()
        with self._searching:
            # Another thread may have asked them all while we waited.
            known = self._known
            if known is not None:
                return self._connect_to(known, given, min(timeout_s, KNOWN_S))
            if self._failure is not None and self._failed_s > asked_s:
                raise self._failure
            try:
                index, connection = _Race(self._servers, self._connect, given, timeout_s).run()
            except psycopg2.Error as error:
                self._failure, self._failed_s = error, time.monotonic()
                raise
            self._note(index, connection)
            return connection

    def _note(self, index: int, connection: Any) -> None:
        with self._lock:
            others = [each for each, at in self._open.items() if at != index]
            is_news, self._known = self._known != index, index
            self._open[connection] = index
        if is_news or others:
            server = self._servers[index]
            log.info("database_server", host=server.get("host"), port=server.get("port"), cut=len(others))
        for other in others:
            cut(other, "another server takes writes now")


class _Race:
    """Asks all servers at once for a connection that takes writes; the first one wins.

    As long as one keeps silent, those that refused are asked again: one of them may be promoted any moment.
    """

    def __init__(
        self, servers: Sequence[Mapping[str, str]], connect: Connect, given: Mapping[str, Any], timeout_s: float
    ) -> None:
        self._servers = servers
        self._connect = connect
        self._given = given
        self._timeout_s = timeout_s
        self._answers: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._is_over = False

    def run(self) -> tuple[int, Any]:
        """Returns a server's index and a connection to it. Raises one psycopg2.OperationalError with all causes."""
        due_s = time.monotonic() + self._timeout_s
        causes = {
            index: f'connection to server at "{server.get("host")}" failed: no answer within {self._timeout_s:.3g} s'
            for index, server in enumerate(self._servers)
        }
        silent = set(causes)
        for index in causes:
            self._start(index, 0)
        try:
            while silent:
                index, answer = self._answers.get(timeout=max(0.0, due_s - time.monotonic()))
                if not isinstance(answer, Exception):
                    return index, answer
                if not isinstance(answer, psycopg2.Error):
                    raise answer
                causes[index] = str(answer).strip()
                silent.discard(index)
                self._start(index, RETRY_S)
        except queue.Empty:
            pass
        finally:
            self._end()
        raise psycopg2.OperationalError("\n".join(causes.values()))

    def _start(self, index: int, wait_s: float) -> None:
        timer = threading.Timer(wait_s, self._ask, (index,))
        timer.daemon = True
        timer.start()

    def _ask(self, index: int) -> None:
        if self._is_over:
            return
        try:
            answer = self._connect({**self._given, **self._servers[index]}, self._timeout_s)
        except Exception as error:  # noqa: BLE001 - handed to the thread that waits
            answer = error
        with self._lock:
            if not self._is_over:
                self._answers.put((index, answer))
                return
        _close(answer)

    def _end(self) -> None:
        with self._lock:
            self._is_over = True
        # More than one may take writes.
        while not self._answers.empty():
            _close(self._answers.get()[1])


def _close(answer: Any) -> None:
    if not isinstance(answer, Exception):
        answer.close()


def divided(given: Mapping[str, Any]) -> list[dict[str, str]]:
    """The parameters that tell the servers of a URL apart, for each of them."""
    names = [name for name in ("host", "hostaddr", "port") if given.get(name)]
    lists = {name: str(given[name]).split(",") for name in names}
    count = max([1, *(len(lists[name]) for name in names if name != "port")])
    if count == 1:
        return [{}]
    # One port may be that of all.
    return [{name: values[index if len(values) > 1 else 0] for name, values in lists.items()} for index in range(count)]
