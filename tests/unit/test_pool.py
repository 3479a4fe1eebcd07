"""The pool of connections: few stay open, and a thread that connects holds up no other."""

import socket
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
from psycopg2.extensions import TRANSACTION_STATUS_IDLE, TRANSACTION_STATUS_INTRANS

from service.db import pool, sessions
from service.db.availability import DatabaseAwayError
from service.db.pool import Pool, Turns
from tests.support.waiting import until


class Connection:
    """A connection over a real socket, of which the pool asks what it asks psycopg2's."""

    def __init__(self) -> None:
        self._own, self.peer = socket.socketpair()
        self.server_version = 180000
        self.closed = 0
        self.info = SimpleNamespace(transaction_status=TRANSACTION_STATUS_IDLE)

    def fileno(self) -> int:
        return self._own.fileno()

    def close(self) -> None:
        self.closed = 1
        self._own.close()
        self.peer.close()


class Server:
    """Opens connections; the first waits until `may_open`."""

    def __init__(self) -> None:
        self.opened: list[Connection] = []
        self.may_open = threading.Event()
        self.may_open.set()
        self.asked = 0

    def open(self, *_: object, **__: object) -> Connection:
        self.asked += 1
        self.may_open.wait(30)
        self.opened.append(Connection())
        return self.opened[-1]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """The server that sessions are opened at."""
    made = Server()
    monkeypatch.setattr(sessions, "open_session", made.open)
    yield made
    made.may_open.set()
    for connection in made.opened:
        connection.close()


@pytest.fixture
def given(server: Server) -> Pool:
    """A pool of that server."""
    made = Pool("batch")
    made.session_timeout_s, made.synchronous_commit = 1.0, ""
    return made


def used(given: Pool) -> Any:
    with given.connection_context():
        return given.connection()


def test_a_connection_is_used_again(given: Pool, server: Server) -> None:
    """One thread after the other uses the same connection."""
    assert used(given) is used(given)
    assert len(server.opened) == 1


def test_what_broke_is_not_used_again(given: Pool, server: Server) -> None:
    """A connection that the server closed, or that is within a transaction, is closed and another is opened."""
    first = used(given)
    first.peer.close()
    with given.connection_context():
        second: Any = given.connection()
        assert second is not first
        assert first.closed
        second.info.transaction_status = TRANSACTION_STATUS_INTRANS
    assert second.closed
    assert used(given) is not second


def test_all_connections_are_renewed(given: Pool, server: Server) -> None:
    """Neither a connection that is idle then is used again, nor one that is lent or being opened."""

    def use() -> None:
        with given.connection_context():
            given.renew()

    idle, other = used(given), threading.Thread(target=use)
    with given.connection_context():
        lent: Any = given.connection()
        assert lent is idle
        other.start()
        other.join(30)
        assert len(server.opened) == 2
        assert server.opened[1].closed
        assert not lent.closed
    assert lent.closed
    assert used(given) is server.opened[2]


def test_unused_connections_are_closed(given: Pool, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that nobody uses for long is closed, and another is opened when one is needed."""
    monkeypatch.setattr(pool, "IDLE_S", 0.01)
    first = used(given)
    until(lambda: first.closed, "the connection to be closed")
    assert used(given) is not first


def test_no_thread_can_be_had(given: Pool, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no thread can be started, what a connection was used for does not fail; unused ones are closed later."""
    monkeypatch.setattr(pool, "IDLE_S", 0.01)
    with monkeypatch.context() as limited:
        limited.setattr(threading.Thread, "start", Mock(side_effect=RuntimeError("can't start new thread")))
        first = used(given)
    assert used(given) is first
    until(lambda: first.closed, "the connection to be closed")


def test_a_thread_that_connects_holds_up_no_other(given: Pool, server: Server) -> None:
    """While one thread waits for a server that does not answer, another gives its connection back and takes it."""
    with given.connection_context():
        server.may_open.clear()
        waiting = threading.Thread(target=used, args=(given,))
        waiting.start()
        until(lambda: server.asked == 2, "the other thread to connect")
    assert used(given) is server.opened[0]
    assert waiting.is_alive()
    server.may_open.set()
    waiting.join(30)


def test_calls_take_turns() -> None:
    """Who gets no turn within its time is told so, and one that is over can be had."""
    turns = Turns(1)
    with turns.one(1), pytest.raises(DatabaseAwayError, match=r"^all 1 connections were in use for 0\.01 s$"):
        turns.one(0.01).__enter__()
    with turns.one(0.01):
        pass
