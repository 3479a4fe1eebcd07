"""Deadlines of calls to Postgres, which nobody would notice to be gone before a server freezes."""

import socket

import psycopg2
import pytest

from service.db import deadlines
from service.db.availability import DatabaseAwayError
from service.db.deadlines import Deadlines

FAILING_S = 10


def wait_for_the_cut(watching: Deadlines, thread_fails: bool) -> None:
    """A call that would wait for ever, and whose server cannot be looked after."""

    def look() -> None:
        if thread_fails:
            raise RuntimeError("can't start new thread")

    ours, theirs = socket.socketpair()
    ours.settimeout(FAILING_S)
    with theirs, ours, pytest.raises(DatabaseAwayError), watching.within(ours, 0, 0, look):
        # As libpq does when its connection ends.
        raise psycopg2.OperationalError(ours.recv(1))


def test_a_look_that_fails_costs_no_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    """When there is no thread left to look for another server, this call and all later ones still have a deadline."""
    monkeypatch.setattr(deadlines, "LOOK_INTERVAL_S", 0)
    watching = Deadlines()
    for thread_fails in (True, False):
        wait_for_the_cut(watching, thread_fails)


def test_deadlines_begin_once_there_is_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call for which no thread could be started fails, and the next one has its deadline."""

    def refuse(thread: object) -> None:
        raise RuntimeError("can't start new thread")

    watching = Deadlines()
    with monkeypatch.context() as scarce:
        scarce.setattr(deadlines.threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError):
            wait_for_the_cut(watching, False)
    wait_for_the_cut(watching, False)
