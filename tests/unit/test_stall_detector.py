"""Whether the watchdog notices that it was held up itself."""

from datetime import UTC, datetime

from watchdog.observe.stall_detector import LATE_S, TICK_INTERVAL_S, StallDetector


class FakeClock:
    def __init__(self) -> None:
        self.time_s = 100.0

    def monotonic(self) -> float:
        return self.time_s

    def now(self) -> datetime:
        return datetime.fromtimestamp(self.time_s, UTC)


def test_being_held_up_is_noticed_by_whoever_asks_first() -> None:
    """A pause is detected at the first query after it, before the next tick; ticks in time detect nothing."""
    clock = FakeClock()
    stalls = StallDetector(clock)
    for _ in range(100):
        clock.time_s += TICK_INTERVAL_S
        stalls.tick()
    assert stalls.since_s() == 100.0
    clock.time_s += LATE_S + 0.1
    held_up_until_s = clock.time_s
    assert stalls.since_s() == held_up_until_s
    clock.time_s += TICK_INTERVAL_S
    assert stalls.since_s() == held_up_until_s
