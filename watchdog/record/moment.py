"""When an event began by the monotonic clock, so that setting the system clock does not change its age."""

from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from service.db.recoveries import Event

# The two clocks may drift apart by this much within an hour.
DRIFT = timedelta(seconds=2)


@dataclass(frozen=True)
class Moment:
    """A monotonic time; only comparable with others of the same boot."""

    boot: str
    time_s: float


def dated(event: Event, began: Moment | None, now: datetime, present: Moment) -> Event:
    """Returns the event with its times on the present clock, which shows `now`, if that was set since `began`."""
    if began is None or not present.boot or began.boot != present.boot:
        return event
    shift = now - timedelta(seconds=present.time_s - began.time_s) - event.start_time
    if abs(shift) < DRIFT:
        return event
    end_time = None if event.end_time is None else event.end_time + shift
    return replace(event, start_time=event.start_time + shift, end_time=end_time)
