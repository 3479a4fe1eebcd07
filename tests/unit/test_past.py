"""What follows from the events of a worker, for as long as something does."""

from datetime import UTC, datetime, timedelta
from uuid import uuid4

from service.db.recoveries import Event
from watchdog.past import Past, is_of_note, past_of

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def event(kind: str, age_s: float = 10, outcome: str = "", lasts_s: float = 0) -> Event:
    start = NOW - timedelta(seconds=age_s)
    end = start + timedelta(seconds=lasts_s)
    return Event(0, uuid4(), "w", kind, "", "because", {}, "", outcome, {}, start, end, None, None)


def test_nothing_follows_from_nothing() -> None:
    """A worker of which nothing was ever written has its whole budget, and no orders."""
    assert past_of([], NOW) == Past()


def test_restarts_count_for_an_hour_or_until_a_reset() -> None:
    """Open, failed or recovered, a restart counts; one of the future, by a clock that was set back, counts as new."""
    restarts = [event("restart", age, "failed") for age in (3601, 3599, 100)]
    assert past_of([*restarts, event("restart", -50, "open")], NOW).restart_ages_s == (3599, 100, 0)
    reset = event("budget_reset")
    past = past_of([*restarts, reset, event("restart", 5)], NOW)
    assert (past.restart_ages_s, past.last_reset) == ((5,), reset.key)


def test_giving_up_lasts_until_the_reset() -> None:
    """Time does not change it, a person does."""
    given_up = event("gave_up", 100_000)
    assert past_of([given_up, event("resumed")], NOW).has_given_up
    assert not past_of([given_up, event("budget_reset")], NOW).has_given_up
    assert past_of([given_up, event("budget_reset"), event("gave_up")], NOW).has_given_up


def test_the_last_order_counts_while_it_lasts() -> None:
    """A pause ends by itself, or by the order to resume."""
    pause = event("paused", 10, lasts_s=60)
    past = past_of([pause], NOW)
    assert (past.pause_left_s, past.pause_end_time, past.pause_reason) == (50, pause.end_time, "because")
    assert past_of([event("paused", 61, lasts_s=60)], NOW).pause_end_time is None
    assert past_of([pause, event("resumed")], NOW).pause_left_s == 0
    assert past_of([pause, event("paused", 5, lasts_s=600)], NOW).pause_left_s == 595


def test_open_restart_is_the_intent() -> None:
    """What is open has to be finished."""
    intent = event("restart", 9000, "open")
    assert past_of([event("restart", 9500, "failed"), intent, event("verdict")], NOW).intent is intent


def test_what_nothing_follows_from_is_not_kept() -> None:
    """The same past follows from the events of note alone; changes of verdict and old restarts are none."""
    events = [
        event("restart", 4000, "failed"),
        event("paused", 3900, lasts_s=10_000),
        event("budget_reset", 3800),
        event("gave_up", 3700),
        event("budget_reset", 3000),
        event("restart", 2000, "failed"),
        event("verdict", 1000),
        event("restart", 500, "open"),
    ]
    kept = [each for each in events if is_of_note(each, events, NOW)]
    assert [events.index(each) for each in kept] == [1, 3, 4, 5, 7]
    assert past_of(kept, NOW) == past_of(events, NOW)
