"""A standby takes over: new work is accepted soon, health tells the truth meanwhile, and what has to survive does."""

import random
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import psycopg2
import pytest

from service.db import endings, heartbeats, standby
from service.db.availability import DatabaseAwayError, DatabaseUnfitError
from service.db.connection import Database, check_schema, migrate
from tests.support.batches import finished, lines
from tests.support.ports import free_port
from tests.support.servers import Stack
from tests.support.standbys import Pair, pair
from tests.support.store import stored
from tests.support.waiting import until
from vllm_batch import Client

CLIENTS = 4
# So many are acknowledged before the primary dies.
ACKNOWLEDGED = 40
# From the promotion of a standby until new work is accepted, at most.
TAKEOVER_S = 15.0
TIMEOUT_S = 0.5


@pytest.fixture
def both() -> Iterator[Pair]:
    """A primary and its standby, with our schema."""
    with pair() as made:
        database = Database(made.url, "test")
        database.call(migrate)
        database.close()
        yield made


def ids(both: Pair) -> set[int]:
    return {row[0] for row in both.sql(both.second, "SELECT id FROM batches")}


def test_a_standby_takes_over(both: Pair, tmp_path: Path) -> None:
    """The primary freezes and the standby is promoted: health says so, and new work is accepted and runs again."""
    stack = Stack(both.url, tmp_path, free_port(), [])
    try:
        stack.gateway()
        stack.worker()
        stack.wait_until_accepting()
        with Client(stack.target, patience_s=0) as client:
            before = client.submit_lines(lines(20))
            assert finished(client, before.id).counts.completed == 20
            until(both.is_replayed, "the standby to have everything")
            both.signal_first(signal.SIGSTOP)
            until(client.accepting, "the gateway to say that nothing is accepted")
            both.promote()
            until(lambda: not client.accepting(), "new work to be accepted", TAKEOVER_S)
            # Health was right: the first call is acknowledged.
            after = client.submit_lines(lines(20))
            assert finished(client, after.id).counts.completed == 20
            assert client.get(before.id).counts.completed == 20
    finally:
        stack.end()


def test_a_server_without_a_standby_is_refused_at_start(database_url: str, tmp_path: Path) -> None:
    """With BATCH_SYNCHRONOUS_COMMIT, gateway and worker end at start if Postgres waits for no standby, and say so."""
    stack = Stack(database_url, tmp_path, free_port(), [])
    try:
        servers = [stack.gateway(synchronous_commit="on"), stack.worker(synchronous_commit="remote_apply")]
        for server in servers:
            until(lambda server=server: server.process.poll() is not None, "the process to end")  # type: ignore[misc]
            assert server.process.returncode == 1
            assert "Postgres waits for no standby" in str(server.events("start_failed")[0]["cause"])
    finally:
        stack.end()


class Storing:
    """Threads that store one batch after the other until their server dies."""

    def __init__(self, url: str) -> None:
        self.acknowledged: list[int] = []
        self._url = url
        self._is_over = threading.Event()
        self._threads = [threading.Thread(target=self._store, args=(number,)) for number in range(CLIENTS)]
        for thread in self._threads:
            thread.start()

    def _store(self, number: int) -> None:
        database = Database(self._url, f"storing-{number}", synchronous_commit="on")
        try:
            while not self._is_over.is_set():
                self.acknowledged.append(stored(database, 1).id)
        except (DatabaseAwayError, psycopg2.Error):
            pass
        finally:
            database.close()

    def has_ended(self, both: Pair) -> bool:
        """Ends their waits for the standby, as an operator may. True once they have given up."""
        both.sql(both.first, "SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE wait_event = 'SyncRep'")
        return not any(thread.is_alive() for thread in self._threads)

    def end(self) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join()


@pytest.mark.parametrize("lags", [True, *(pytest.param(False, marks=pytest.mark.thorough) for _ in range(20))])
def test_what_a_standby_confirmed_survives(both: Pair, lags: bool) -> None:
    """With BATCH_SYNCHRONOUS_COMMIT all acknowledged batches outlive the primary; the ids of lost ones stay unused."""
    own = Database(both.url, "own", TIMEOUT_S, synchronous_commit="on")
    with pytest.raises(DatabaseUnfitError, match="Postgres waits for no standby"):
        own.call(check_schema)
    both.wait_for_standby()
    own.call(check_schema)
    # Storing only on the first: it must not go on storing on the second.
    storing = Storing(both.first.url % "batch")
    lost: list[int] = []
    try:
        until(lambda: len(storing.acknowledged) > random.randint(1, ACKNOWLEDGED), "acknowledgements")
        if lags:
            for process in both.processes():
                if "walsender" in process.cmdline()[0]:
                    process.send_signal(signal.SIGSTOP)
            # What does not ask for a standby is stored without it, and lost.
            plain = Database(both.first.url % "batch", "plain")
            plain.call(lambda db: db.execute_sql("SET synchronous_commit = local"))
            lost = [stored(plain, 1).id for _ in range(3)]
            plain.close()
            with pytest.raises(DatabaseAwayError):
                own.call(endings.cancel, lost[0])
            until(lambda: _is_told(own), "health to tell it")
            # Whoever ends their waits gets no acknowledgement from them.
            until(lambda: storing.has_ended(both), "the threads to find that no standby has confirmed")
        both.signal_first(signal.SIGKILL)
    finally:
        storing.end()
    both.promote()
    survived = ids(both)
    assert set(storing.acknowledged) <= survived
    assert not set(lost) & survived
    # A server without a standby of its own acknowledges nothing that has to survive, and everything else goes on.
    with pytest.raises(DatabaseUnfitError, match="Postgres waits for no standby"):
        stored(own, 1)
    assert own.call(heartbeats.read) == []
    again = Database(both.url, "again")
    new = {stored(again, 1).id for _ in range(50)}
    assert not new & {*storing.acknowledged, *lost}
    again.close()
    own.close()


def _is_told(database: Database) -> bool:
    try:
        database.call(standby.check)
    except DatabaseUnfitError:
        raise
    except DatabaseAwayError as error:
        return "standby" in str(error)
    return False
