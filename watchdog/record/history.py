"""Derives from a worker's events its budget, its open restart and its operators' orders. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from datetime import datetime
from uuid import UUID

from service.db.recoveries import OPEN, Event
from watchdog.policy import HOUR_S, WRONG_SETTINGS, FailedStart, Verdict

# What an event of a later version may tell beside.
_TOLD = {each.name for each in fields(FailedStart)}


@dataclass(frozen=True)
class History:
    """What decisions need to know of the past. `restart_ages_s`: the restarts that count against the budget."""

    restart_ages_s: tuple[float, ...] = ()
    has_given_up: bool = False
    intent: Event | None = None
    pause_left_s: float = 0.0
    pause_end_time: datetime | None = None
    pause_reason: str = ""
    # The settings when the watchdog gave up because starts kept failing the same way.
    gave_up_settings: str = ""
    # The latest starts, as far back as they failed the same way, oldest first.
    failed_starts: tuple[FailedStart, ...] = ()
    # The event of the last budget reset.
    last_reset: UUID | None = None


def history_of(events: Sequence[Event], now: datetime) -> History:
    """Evaluates the events of one worker, oldest first."""
    reset = _last(events, "budget_reset")
    since_reset = _since(events, reset)
    gave_up = _last(since_reset, "gave_up", "give_up_ended")
    ages = (age_s(event, now) for event in since_reset if event.kind == "restart")
    order = _last(events, "paused", "resumed")
    pause = order if order and order.kind == "paused" and order.end_time and order.end_time > now else None
    return History(
        restart_ages_s=tuple(age for age in ages if age < HOUR_S),
        has_given_up=gave_up is not None and gave_up.kind == "gave_up",
        gave_up_settings=_settings_of(gave_up),
        failed_starts=_failed_alike(_since(since_reset, _last(since_reset, "give_up_ended"))),
        intent=next((event for event in reversed(events) if event.outcome == OPEN), None),
        pause_left_s=(pause.end_time - now).total_seconds() if pause and pause.end_time else 0.0,
        pause_end_time=pause.end_time if pause else None,
        pause_reason=pause.reason if pause else "",
        last_reset=reset.key if reset else None,
    )


def _since(events: Sequence[Event], last: Event | None) -> Sequence[Event]:
    return events if last is None else events[events.index(last) + 1 :]


def _settings_of(gave_up: Event | None) -> str:
    """Returns the settings with which starts kept failing; "" when the budget was exhausted instead."""
    if gave_up is None or gave_up.verdict != Verdict.START_FAILED:
        return ""
    return str(gave_up.evidence.get("settings") or WRONG_SETTINGS)


def _failed_alike(events: Sequence[Event]) -> tuple[FailedStart, ...]:
    """Returns the latest starts, as far back as they failed the same way, oldest first."""
    found: list[FailedStart] = []
    for event in reversed(events):
        if event.kind not in ("restart", "gave_up"):
            continue
        told = event.evidence.get("failed_start")
        failed = FailedStart(**{name: told[name] for name in told if name in _TOLD}) if told else None
        if failed is None or (found and not failed.is_like(found[0])):
            break
        if failed.incarnation not in {other.incarnation for other in found}:
            found.insert(0, failed)
    return tuple(found)


def is_of_note(event: Event, events: Sequence[Event], now: datetime) -> bool:
    """True while an event can still affect a decision."""
    if event.kind == "restart":
        return event.outcome == OPEN or age_s(event, now) < HOUR_S
    return event.kind != "verdict" and event is _last(events, event.kind)


def age_s(event: Event, now: datetime) -> float:
    """Returns the seconds since the event began. Timestamps in the future count as now."""
    return max(0.0, (now - event.start_time).total_seconds())


def _last(events: Sequence[Event], *kinds: str) -> Event | None:
    return next((event for event in reversed(events) if event.kind in kinds), None)
