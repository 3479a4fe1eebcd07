"""The audit log of recovery: intents once, budgets by the database's clock, pauses that end by themselves."""

from uuid import uuid4

from service.db import recoveries
from service.db.connection import Database
from service.db.recoveries import Event

WORKER = "host:worker"


def begin(database: Database, worker_id: str = WORKER) -> Event:
    return database.call(recoveries.begin, worker_id, "CRASHED", "gone", {"a": [1]}, {"decide": 0.1}, None)


def add(database: Database, kind: str, lasts_s: float = 0, worker_id: str = WORKER) -> None:
    database.call(recoveries.add, worker_id, kind, "", "because", {}, lasts_s)


def backdate(database: Database, seconds: float) -> None:
    """Makes everything written so far this much older."""
    database.call(
        lambda db: db.execute_sql(
            "UPDATE recovery_events SET start_time = start_time - make_interval(secs => %(s)s),"
            " end_time = end_time - make_interval(secs => %(s)s)",
            {"s": seconds},
        )
    )


def test_an_intent_is_open_once_per_worker(database: Database) -> None:
    """Beginning again, as after a broken connection, gives the same intent; another worker has its own."""
    first = begin(database)
    assert (first.outcome, first.step, first.evidence, first.timings) == (
        "open",
        "stopping",
        {"a": [1]},
        {"decide": 0.1},
    )
    assert begin(database) == first
    assert begin(database, "host:other").id != first.id
    assert database.call(recoveries.open_intent, WORKER) == first
    assert len(database.call(recoveries.restart_ages, WORKER, 3600)) == 1


def test_an_intent_goes_through_its_steps_and_is_closed_once(database: Database) -> None:
    """Steps and timings are kept; what is closed does not change any more, and makes room for the next."""
    intent, new = begin(database), uuid4()
    database.call(recoveries.advance, intent.id, "loading", {"decide": 0.1, "stop": 2.0})
    advanced = database.call(recoveries.open_intent, WORKER)
    assert advanced is not None
    assert advanced.step == "loading"
    database.call(recoveries.close, intent.id, "recovered", {"load": 3.0, "stop": 2.0, "decide": 0.1}, new)
    database.call(recoveries.close, intent.id, "failed", {}, None)
    database.call(recoveries.advance, intent.id, "starting", {})
    (closed,) = database.call(recoveries.list_page, WORKER, None, 10)
    assert (closed.outcome, closed.step, closed.new_incarnation) == ("recovered", "loading", new)
    assert list(closed.timings.items()) == [("decide", 0.1), ("stop", 2.0), ("load", 3.0)]
    assert closed.end_time is not None
    assert database.call(recoveries.open_intent, WORKER) is None
    assert begin(database).id != intent.id


def test_restarts_count_for_an_hour_or_until_a_reset(database: Database) -> None:
    """A restart leaves the budget by its age, by the database's clock, or by a reset; open ones count too."""
    for _ in range(3):
        intent = begin(database)
        database.call(recoveries.close, intent.id, "failed", {}, None)
        backdate(database, 1000)
    begin(database, "host:other")
    assert [round(age, -2) for age in database.call(recoveries.restart_ages, WORKER, 3600)] == [3000, 2000, 1000]
    backdate(database, 1000)
    assert len(database.call(recoveries.restart_ages, WORKER, 3600)) == 2
    add(database, "budget_reset")
    assert database.call(recoveries.restart_ages, WORKER, 3600) == []
    begin(database)
    assert len(database.call(recoveries.restart_ages, WORKER, 3600)) == 1
    assert len(database.call(recoveries.restart_ages, "host:other", 3600)) == 1


def test_giving_up_lasts_until_the_reset(database: Database) -> None:
    """Whether a worker was given up is known by whoever comes next, and time does not change it."""
    assert not database.call(recoveries.has_given_up, WORKER)
    add(database, "gave_up")
    backdate(database, 100_000)
    assert database.call(recoveries.has_given_up, WORKER)
    assert not database.call(recoveries.has_given_up, "host:other")
    add(database, "budget_reset", worker_id="host:other")
    assert database.call(recoveries.has_given_up, WORKER)
    add(database, "budget_reset")
    assert not database.call(recoveries.has_given_up, WORKER)


def test_a_pause_ends_by_itself_or_by_resuming(database: Database) -> None:
    """The last order counts: a pause while it lasts, nothing after its end or after a resume."""
    assert database.call(recoveries.standing, WORKER) == recoveries.Standing(0.0, None, "", 0)
    add(database, "paused", 600)
    standing = database.call(recoveries.standing, WORKER)
    assert 590 < standing.pause_left_s <= 600
    assert standing.pause_reason == "because"
    assert database.call(recoveries.standing, "host:other").pause_left_s == 0
    backdate(database, 601)
    assert database.call(recoveries.standing, WORKER).pause_left_s == 0
    add(database, "paused", 600)
    add(database, "resumed")
    assert database.call(recoveries.standing, WORKER).pause_left_s == 0
    add(database, "budget_reset")
    assert database.call(recoveries.standing, WORKER).last_reset > 0


def test_pages_go_from_the_newest_back(database: Database) -> None:
    """A page begins before the event it is given, for one worker or for all."""
    for worker_id in (WORKER, "host:other", WORKER, WORKER):
        add(database, "verdict", worker_id=worker_id)
    every = [event.id for event in database.call(recoveries.list_page, None, None, 10)]
    assert every == sorted(every, reverse=True)
    assert len(every) == 4
    mine = [event.id for event in database.call(recoveries.list_page, WORKER, None, 10)]
    assert len(mine) == 3
    assert [event.id for event in database.call(recoveries.list_page, WORKER, mine[0], 1)] == [mine[1]]
