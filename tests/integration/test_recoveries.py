"""The audit log in Postgres: each event is stored once, an outcome is final, and decisions get the events they need."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from uuid import uuid4

import pytest

from service.db import heartbeats, recoveries, watchdogs
from service.db.connection import Database
from service.db.heartbeats import Beat
from service.db.recoveries import Event, Pause
from service.machine import Place

WORKER = "host:worker"
NOW = datetime.now(UTC)


def event(kind: str = "restart", worker_id: str = WORKER, age_s: float = 0, outcome: str = "") -> Event:
    start = NOW - timedelta(seconds=age_s)
    step = "stopping" if kind == "restart" else ""
    return Event(0, uuid4(), worker_id, kind, "CRASHED", "gone", {"a": [1]}, step, outcome, {}, start, None, None, None)


def put(database: Database, one: Event) -> Event:
    """Stores an event, and returns it as it should be read."""
    return replace(one, id=database.call(recoveries.put, one))


def listed(database: Database, worker_id: str | None = None) -> list[Event]:
    return database.call(recoveries.list_page, worker_id, None, 100)


def test_an_event_that_is_put_again_is_there_once(database: Database) -> None:
    """Storing an event again, as after a broken connection, does not duplicate it."""
    first = put(database, event("gave_up"))
    assert put(database, replace(first, id=0)) == first
    assert listed(database) == [first]


def test_a_restart_goes_through_its_steps_and_ends_once(database: Database) -> None:
    """An open restart is updated through its steps and ends once; a final outcome does not change any more."""
    intent = put(database, event(outcome="open"))
    loading = replace(intent, step="loading", timings={"decide": 0.1, "stop": 2.0})
    assert put(database, loading) == loading
    timings = {"load": 3.0, "stop": 2.0, "decide": 0.1}
    end = NOW + timedelta(seconds=9)
    put(database, replace(loading, outcome="recovered", timings=timings, new_incarnation=uuid4(), end_time=end))
    put(database, replace(loading, outcome="failed", timings={}))
    put(database, loading)
    (ended,) = listed(database)
    assert (ended.outcome, ended.step, ended.end_time) == ("recovered", "loading", end)
    assert list(ended.timings.items()) == [("decide", 0.1), ("stop", 2.0), ("load", 3.0)]
    assert ended.new_incarnation is not None


def test_one_restart_is_open_per_worker(database: Database) -> None:
    """A new open restart supersedes the worker's earlier one and leaves those of other workers open."""
    old, other = put(database, event(outcome="open")), put(database, event(worker_id="host:other", outcome="open"))
    new = put(database, event(outcome="open"))
    assert [(each.key, each.outcome) for each in listed(database)] == [
        (new.key, "open"),
        (other.key, "open"),
        (old.key, "superseded"),
    ]


def test_what_is_of_note(database: Database) -> None:
    """A worker's events of note are recent restarts, the open one and the last of each order, oldest first."""
    wanted = [
        put(database, event(age_s=9000, outcome="open")),
        put(database, event("paused", age_s=4000)),
        put(database, event(age_s=100, outcome="failed")),
    ]
    for unwanted in (
        event(age_s=3700, outcome="failed"),
        event("budget_reset", age_s=10),
        event("verdict"),
        event(worker_id="host:other"),
    ):
        put(database, unwanted)
    wanted.append(put(database, event("budget_reset")))
    assert database.call(recoveries.of_note, WORKER, "", NOW - timedelta(hours=1)) == wanted


def test_who_was_given_up(database: Database) -> None:
    """A worker counts as given up until its budget is reset."""
    for kind, worker_id in (("gave_up", WORKER), ("gave_up", "host:other"), ("budget_reset", WORKER)):
        put(database, event(kind, worker_id))
    assert database.call(recoveries.given_up, [WORKER, "host:other", "host:new"]) == {"host:other"}


def test_whose_recovery_is_paused(database: Database) -> None:
    """A pause counts until it is resumed or its time is over; of several, the last."""
    end = NOW + timedelta(hours=1)
    for worker_id in (WORKER, "host:resumed"):
        put(database, replace(event("paused", worker_id), reason="first", end_time=NOW + timedelta(hours=9)))
        put(database, replace(event("paused", worker_id), reason="upgrade", end_time=end))
    put(database, event("resumed", "host:resumed"))
    put(database, replace(event("paused", "host:over"), end_time=NOW - timedelta(seconds=1)))
    asked = [WORKER, "host:resumed", "host:over", "host:new"]
    assert database.call(recoveries.paused, asked) == {WORKER: Pause("upgrade", end)}


@pytest.mark.parametrize("hours", [-3, 2])
def test_a_pause_ends_alike_for_clocks_that_differ(database: Database, hours: int) -> None:
    """A host whose clock differs from that of Postgres by hours is paused for as long as its watchdog pauses."""
    now, length = datetime.now(UTC) + timedelta(hours=hours), timedelta(minutes=10)
    database.call(watchdogs.write, "host", 1, "", {"time": now.isoformat()})
    put(database, replace(event("paused"), start_time=now, end_time=now + length))
    [pause] = database.call(recoveries.paused, [WORKER]).values()
    assert abs(pause.end_time - (datetime.now(UTC) + length)) < timedelta(minutes=1)
    put(database, replace(event("paused"), start_time=now - 2 * length, end_time=now - length))
    assert database.call(recoveries.paused, [WORKER]) == {}


def test_machines_of_one_name(database: Database) -> None:
    """Another machine under the same name has events, an open restart and a give-up of its own; events from before
    machines were known count for each."""
    old = put(database, event("paused", age_s=500))
    here = put(database, replace(event(outcome="open"), machine="here"))
    put(database, replace(event(outcome="open"), machine="there"))
    put(database, replace(event("gave_up"), machine="there"))
    assert database.call(recoveries.of_note, WORKER, "here", NOW - timedelta(hours=1)) == [old, here]
    assert database.call(recoveries.given_up, [WORKER]) == {WORKER}
    beat = Beat(WORKER, uuid4(), "127.0.0.1:1", "ready", 1, place=Place("here"))
    assert database.call(heartbeats.write, beat)
    assert database.call(recoveries.given_up, [WORKER]) == set()


def test_pages_go_from_the_newest_back(database: Database) -> None:
    """A page of events starts before the given event, newest first, for one worker or all."""
    for worker_id in (WORKER, "host:other", WORKER, WORKER):
        put(database, event("verdict", worker_id))
    every = [each.id for each in listed(database)]
    assert every == sorted(every, reverse=True)
    assert len(every) == 4
    mine = [each.id for each in listed(database, WORKER)]
    assert len(mine) == 3
    assert [each.id for each in database.call(recoveries.list_page, WORKER, mine[0], 1)] == [mine[1]]
