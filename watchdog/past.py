"""What follows from the events of a worker: its budget, its open restart, what persons have ordered. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from service.db.recoveries import OPEN, Event
from watchdog.policy import HOUR_S


@dataclass(frozen=True)
class Past:
    """What a decision must know of before. `restart_ages_s`: the restarts that count against the budget."""

    restart_ages_s: tuple[float, ...] = ()
    has_given_up: bool = False
    intent: Event | None = None
    pause_left_s: float = 0.0
    pause_end_time: datetime | None = None
    pause_reason: str = ""
    # The event by which a person gave the budget back last.
    last_reset: UUID | None = None


def past_of(events: Sequence[Event], now: datetime) -> Past:
    """Judges the events of one worker, oldest first."""
    reset = _last(events, "budget_reset")
    since_reset = events if reset is None else events[events.index(reset) + 1 :]
    ages = (age_s(event, now) for event in since_reset if event.kind == "restart")
    order = _last(events, "paused", "resumed")
    pause = order if order and order.kind == "paused" and order.end_time and order.end_time > now else None
    return Past(
        restart_ages_s=tuple(age for age in ages if age < HOUR_S),
        has_given_up=_last(since_reset, "gave_up") is not None,
        intent=next((event for event in reversed(events) if event.outcome == OPEN), None),
        pause_left_s=(pause.end_time - now).total_seconds() if pause and pause.end_time else 0.0,
        pause_end_time=pause.end_time if pause else None,
        pause_reason=pause.reason if pause else "",
        last_reset=reset.key if reset else None,
    )


def is_of_note(event: Event, events: Sequence[Event], now: datetime) -> bool:
    """True as long as something may follow from an event, beside what the audit log tells people."""
    if event.kind == "restart":
        return event.outcome == OPEN or age_s(event, now) < HOUR_S
    return event.kind != "verdict" and event is _last(events, event.kind)


def age_s(event: Event, now: datetime) -> float:
    """How long ago it began. What a clock that was set back puts into the future is of now."""
    return max(0.0, (now - event.start_time).total_seconds())


def _last(events: Sequence[Event], *kinds: str) -> Event | None:
    return next((event for event in reversed(events) if event.kind in kinds), None)
