"""What a worker's events amount to, and how long they matter."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from uuid import uuid4

import pytest

from service.db.recoveries import Event
from watchdog.policy import WRONG_SETTINGS
from watchdog.record.history import History, history_of, is_of_note

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def event(kind: str, age_s: float = 10, outcome: str = "", lasts_s: float = 0) -> Event:
    start = NOW - timedelta(seconds=age_s)
    end = start + timedelta(seconds=lasts_s)
    return Event(0, uuid4(), "w", kind, "", "because", {}, "", outcome, {}, start, end, None, None)


def test_nothing_follows_from_nothing() -> None:
    """A worker without events has its whole budget and no orders."""
    assert history_of([], NOW) == History()


def test_restarts_count_for_an_hour_or_until_a_reset() -> None:
    """A restart counts for an hour or until a reset; one dated in the future, after a clock change, counts as new."""
    restarts = [event("restart", age, "failed") for age in (3601, 3599, 100)]
    assert history_of([*restarts, event("restart", -50, "open")], NOW).restart_ages_s == (3599, 100, 0)
    reset = event("budget_reset")
    history = history_of([*restarts, reset, event("restart", 5)], NOW)
    assert (history.restart_ages_s, history.last_reset) == ((5,), reset.key)


def test_giving_up_lasts_until_the_reset() -> None:
    """Giving up lasts until a reset, however long ago it was."""
    given_up = event("gave_up", 100_000)
    assert history_of([given_up, event("resumed")], NOW).has_given_up
    assert not history_of([given_up, event("budget_reset")], NOW).has_given_up
    assert history_of([given_up, event("budget_reset"), event("gave_up")], NOW).has_given_up


def test_the_last_order_counts_while_it_lasts() -> None:
    """The last pause holds until it expires or is ended by an order to resume."""
    pause = event("paused", 10, lasts_s=60)
    history = history_of([pause], NOW)
    assert (history.pause_left_s, history.pause_end_time, history.pause_reason) == (50, pause.end_time, "because")
    assert history_of([event("paused", 61, lasts_s=60)], NOW).pause_end_time is None
    assert history_of([pause, event("resumed")], NOW).pause_left_s == 0
    assert history_of([pause, event("paused", 5, lasts_s=600)], NOW).pause_left_s == 595


def test_open_restart_is_the_intent() -> None:
    """A restart that is still open is the intent."""
    intent = event("restart", 9000, "open")
    assert history_of([event("restart", 9500, "failed"), intent, event("verdict")], NOW).intent is intent


def test_what_nothing_follows_from_is_not_kept() -> None:
    """Only events of note are kept, and the history that follows from them is the same."""
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
    assert history_of(kept, NOW) == history_of(events, NOW)


def failing(incarnation: str, key: str = "k", kind: str = "restart", age_s: float = 10) -> Event:
    told = {"incarnation": incarnation, "settings": "s", "cause": "c", "advice": "", "key": key}
    return replace(event(kind, age_s), evidence={"failed_start": told, "settings": "s"}, verdict="CRASHED")


def test_failed_starts_are_known_to_the_next_watchdog() -> None:
    """Consecutive starts that failed alike are counted, each life once, until one fails differently or is restarted."""
    alike = [failing("a"), failing("b"), replace(failing("c", kind="gave_up"), verdict="START_FAILED")]
    past = history_of([failing("z", "other"), *alike], NOW)
    assert [failed.incarnation for failed in past.failed_starts] == ["a", "b", "c"]
    assert (past.has_given_up, past.gave_up_settings) == (True, "s")
    assert history_of([*alike, event("restart")], NOW).failed_starts == ()
    assert [failed.incarnation for failed in history_of([*alike, failing("c")], NOW).failed_starts] == ["a", "b", "c"]


def test_what_a_later_version_tells_is_passed_over() -> None:
    """A watchdog that was taken back to an earlier version reads the failed starts of the later one."""
    later = failing("a")
    told = later.evidence["failed_start"] | {"recurs": True, "of_a_later_version": 1}
    [failed] = history_of([replace(later, evidence={"failed_start": told})], NOW).failed_starts
    assert (failed.incarnation, failed.recurs) == ("a", True)


def test_a_give_up_for_wrong_settings_ends_with_any_others() -> None:
    """Settings that could not be read have no fingerprint; the next watchdog knows all the same that others may do."""
    gave_up = replace(event("gave_up"), evidence={"settings": ""}, verdict="START_FAILED")
    assert history_of([gave_up], NOW).gave_up_settings == WRONG_SETTINGS


@pytest.mark.parametrize("kind", ["budget_reset", "give_up_ended"])
def test_a_give_up_ends(kind: str) -> None:
    """A give-up ends by a reset, or when the settings change or the worker serves; only a reset restores the budget."""
    gave_up = replace(failing("c", kind="gave_up"), verdict="START_FAILED")
    past = history_of([failing("a"), failing("b"), gave_up, event(kind)], NOW)
    assert (past.has_given_up, past.failed_starts) == (False, ())
    assert len(past.restart_ages_s) == (2 if kind == "give_up_ended" else 0)
