"""What the observer makes of what it cannot see."""

import threading
from datetime import UTC, datetime
from typing import Any, cast
from uuid import uuid4

import peewee
import pytest

from service.db.connection import Database
from service.db.heartbeats import Beat, SeenBeat
from tests.waiting import until
from watchdog.awake import Awake
from watchdog.observe import Observer
from watchdog.policy import Health, State
from watchdog.supervisor import ProcessInfo, RefusedError, Supervisor, SupervisorAwayError


class FakeClock:
    """Stands still until told."""

    time_s = 1000.0

    def monotonic(self) -> float:
        return self.time_s

    def now(self) -> datetime:
        return datetime.fromtimestamp(self.time_s, UTC)


class FakeSupervisor:
    """Answers, or fails, with what it is given."""

    answer: ProcessInfo | Exception = ProcessInfo(State.STOPPED, 0)

    def info(self, _: str) -> ProcessInfo:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


class FakeDatabase:
    """Answers, or fails, with what it is given."""

    def __init__(self) -> None:
        beat = Beat("host:worker", uuid4(), "127.0.0.1:1", "ready", 7)
        self.answer: tuple[float, SeenBeat | None] | Exception = (5000.0, SeenBeat(beat, 90.0))

    def call(self, *_: object) -> Any:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.fixture
def parts() -> tuple[Observer, FakeSupervisor, FakeDatabase, FakeClock]:
    """An observer on fakes."""
    supervisor, database, clock = FakeSupervisor(), FakeDatabase(), FakeClock()
    observer = Observer(
        name="worker:worker",
        worker_id="host:worker",
        supervisor=cast(Supervisor, supervisor),
        database=cast(Database, database),
        address=None,
        probe_timeout_s=1,
        database_timeout_s=60,
        clock=clock,
        awake=Awake(clock),
        on_change=lambda: None,
    )
    return observer, supervisor, database, clock


Parts = tuple[Observer, FakeSupervisor, FakeDatabase, FakeClock]


def test_database_counts_as_up_since_it_came_back_for_us(parts: Parts) -> None:
    """After an outage that Postgres itself did not notice, its uptime begins anew: nobody could beat meanwhile."""
    observer, _, database, clock = parts
    assert observer.observe().database_up_s == 5000
    answer, database.answer = database.answer, peewee.OperationalError("no route")
    seen = observer.observe()
    assert (seen.database_up_s, seen.heartbeat) == (None, None)
    clock.time_s, database.answer = 1100, answer
    assert observer.observe().database_up_s == 0
    clock.time_s = 1130
    assert observer.observe().database_up_s == 30


def test_database_that_was_restarted_counts_from_its_start(parts: Parts) -> None:
    """An outage between two looks is known by the uptime of Postgres."""
    observer, _, database, clock = parts
    database.answer = peewee.OperationalError("down")
    observer.observe()
    clock.time_s, database.answer = 1100, (2.0, None)
    observer.observe()
    clock.time_s, database.answer = 1130, (3.0, None)
    assert observer.observe().database_up_s == 3


def test_frozen_database_does_not_hold_up_the_rest(parts: Parts) -> None:
    """A Postgres that does not answer is waited for once; then it is away at once, until it has answered that."""
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
    until(lambda: observer.observe().heartbeat, "an answer that is new")
    observer.close()


def test_schema_that_is_not_there_is_no_database(parts: Parts) -> None:
    """Before the first migration there is nothing to be missed."""
    observer, _, database, _ = parts
    database.answer = peewee.ProgrammingError('relation "heartbeats" does not exist')
    assert observer.observe().database_up_s is None


@pytest.mark.parametrize("failure", [SupervisorAwayError("no socket"), RefusedError("BAD_NAME")])
def test_supervisor_that_does_not_answer_is_evidence(parts: Parts, failure: Exception) -> None:
    """No answer from supervisord, or that it does not know the worker, is told as such and raises nothing."""
    observer, supervisor, _, _ = parts
    supervisor.answer = failure
    assert observer.observe().process is None


def test_without_a_process_nobody_is_asked_and_no_heartbeat_is_current(parts: Parts) -> None:
    """A process that is stopped has no health, and what its row says is of the past."""
    observer, _, _, _ = parts
    seen = observer.observe()
    assert seen.health is Health.NOT_PROBED
    assert seen.heartbeat is not None
    assert not seen.heartbeat.is_current
