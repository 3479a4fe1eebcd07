"""How the observer treats sources that it cannot reach."""

import os
import threading
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, cast
from uuid import uuid4

import pytest

from service import processes
from service.db.availability import DatabaseAwayError
from service.db.connection import Database
from service.db.heartbeats import Beat, SeenBeat
from service.machine import Place
from tests.support.observers import observer_of
from tests.support.waiting import until
from watchdog.observe.observer import Observer
from watchdog.policy import ProbeAnswer, State
from watchdog.supervisor import ProcessInfo, RefusedError, Supervisor, SupervisorAwayError

HERE = Place("here", "boot/1", "boot/2")
THERE = Place("there", "boot/1", "boot/3")


class FakeClock:
    """Stands still until the test moves it."""

    time_s = 1000.0

    def monotonic(self) -> float:
        return self.time_s

    def now(self) -> datetime:
        return datetime.fromtimestamp(self.time_s, UTC)


class FakeSupervisor:
    """Returns or raises what the test sets."""

    answer: ProcessInfo | Exception = ProcessInfo(State.STOPPED, 0)

    def info(self, _: str) -> ProcessInfo:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


class FakeDatabase:
    """Returns or raises what the test sets."""

    def __init__(self) -> None:
        beat = Beat("host:worker", uuid4(), "127.0.0.1:1", "ready", 7)
        self.answer: tuple[float, SeenBeat | None] | Exception = (5000.0, SeenBeat(beat, 90.0))

    def check_new(self) -> None:
        """It takes new sessions."""

    def call(self, *_: object) -> Any:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.fixture
def parts() -> tuple[Observer, FakeSupervisor, FakeDatabase, FakeClock]:
    """An observer on fakes."""
    supervisor, database, clock = FakeSupervisor(), FakeDatabase(), FakeClock()
    observer = observer_of("host:worker", cast(Supervisor, supervisor), cast(Database, database), clock, HERE)
    return observer, supervisor, database, clock


Parts = tuple[Observer, FakeSupervisor, FakeDatabase, FakeClock]


def test_database_counts_as_up_since_it_came_back_for_us(parts: Parts) -> None:
    """After an outage that Postgres did not notice, uptime restarts at 0, because no worker could write meanwhile."""
    observer, _, database, clock = parts
    assert observer.observe().database_up_s == 5000
    answer, database.answer = database.answer, DatabaseAwayError("no route")
    seen = observer.observe()
    assert (seen.database_up_s, seen.heartbeat) == (None, None)
    clock.time_s, database.answer = 1100, answer
    assert observer.observe().database_up_s == 0
    clock.time_s = 1130
    assert observer.observe().database_up_s == 30


def test_database_that_was_restarted_counts_from_its_start(parts: Parts) -> None:
    """A Postgres that was restarted between two checks counts from its own start."""
    observer, _, database, clock = parts
    database.answer = DatabaseAwayError("down")
    observer.observe()
    clock.time_s, database.answer = 1100, (2.0, None)
    observer.observe()
    clock.time_s, database.answer = 1130, (3.0, None)
    assert observer.observe().database_up_s == 3


def test_frozen_database_does_not_hold_up_the_rest(parts: Parts) -> None:
    """A hanging Postgres is waited for once; until it answers, later checks report it away without waiting."""
    observer, _, database, _ = parts
    released, asked = threading.Event(), threading.Semaphore(0)

    class Frozen(FakeDatabase):
        def call(self, *arguments: object) -> Any:
            asked.release()
            assert released.wait(60)
            return super().call(*arguments)

    observer._database, observer._database_timeout_s = cast(Database, Frozen()), 0.05
    assert [observer.observe().database_up_s for _ in range(20)] == [None] * 20
    assert asked.acquire(timeout=60)
    assert not asked.acquire(blocking=False)
    released.set()
    observer._database, observer._database_timeout_s = cast(Database, database), 60
    until(lambda: observer.observe().heartbeat, "a heartbeat from a new answer")
    observer.close()


def test_schema_that_is_not_there_is_no_database(parts: Parts) -> None:
    """While the schema is missing, Postgres counts as away and no heartbeat is expected."""
    observer, _, database, _ = parts
    database.answer = DatabaseAwayError('relation "heartbeats" does not exist')
    assert observer.observe().database_up_s is None


@pytest.mark.parametrize("failure", [SupervisorAwayError("no socket"), RefusedError("BAD_NAME")])
def test_supervisor_that_does_not_answer_is_evidence(parts: Parts, failure: Exception) -> None:
    """A supervisord that does not answer or does not know the worker is reported as evidence and raises nothing."""
    observer, supervisor, _, _ = parts
    supervisor.answer = failure
    assert observer.observe().process is None


def test_without_a_process_nobody_is_asked_and_no_heartbeat_is_current(parts: Parts) -> None:
    """A stopped process is not probed, and its last heartbeat does not count as current."""
    observer, _, _, _ = parts
    seen = observer.observe()
    assert seen.health is ProbeAnswer.NOT_PROBED
    assert seen.heartbeat is not None
    assert not seen.heartbeat.is_current


@pytest.mark.parametrize(("place", "is_current"), [(HERE, True), (THERE, False)])
def test_a_heartbeat_of_another_machine_is_not_ours(parts: Parts, place: Place, is_current: bool) -> None:
    """With equal names and equal pids, as in containers, another machine's heartbeat says nothing of our process."""
    observer, supervisor, database, _ = parts
    supervisor.answer = ProcessInfo(State.RUNNING, 7)
    beat = Beat("host:worker", uuid4(), "10.0.0.9:1", "ready", 7, place=place)
    database.answer = (5000.0, SeenBeat(beat, 1.0, lease_left_s=59))
    seen = observer.observe()
    assert seen.heartbeat is not None
    assert seen.heartbeat.is_current is is_current
    assert bool(seen.name_taken_by) is not is_current
    assert ("10.0.0.9:1" in seen.name_taken_by) is not is_current
    observer.close()


def test_a_process_of_ours_is_ours_whatever_machine_it_names(parts: Parts) -> None:
    """If the file with the machine's id was replaced while this watchdog ran, the worker that supervisord has started
    since is still known by its process, and is no other machine's."""
    observer, supervisor, database, _ = parts
    mine = processes.leader(os.getpid())
    assert mine is not None
    supervisor.answer = ProcessInfo(State.RUNNING, mine.pid)
    given = {"place": replace(HERE, machine="new"), "start_ticks": mine.start_ticks}
    beat = Beat("host:worker", uuid4(), "10.0.0.9:1", "ready", mine.pid, **given)
    database.answer = (5000.0, SeenBeat(beat, 1.0, lease_left_s=59))
    seen = observer.observe()
    assert seen.heartbeat is not None
    assert seen.heartbeat.is_current
    assert seen.name_taken_by == ""
    # Another process of this machine, under another home, is not.
    supervisor.answer = ProcessInfo(State.RUNNING, 1)
    assert "another machine runs as host:worker" in observer.observe().name_taken_by
    observer.close()
