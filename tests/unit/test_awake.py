"""Whether the watchdog notices that it was held up."""

from datetime import UTC, datetime

from watchdog.awake import LATE_S, TICK_INTERVAL_S, Awake


class FakeClock:
    def __init__(self) -> None:
        self.time_s = 100.0

    def monotonic(self) -> float:
        return self.time_s

    def now(self) -> datetime:
        return datetime.fromtimestamp(self.time_s, UTC)


def test_being_held_up_is_noticed_by_whoever_asks_first() -> None:
    """Right after a pause, before the next tick, it is known already; ticks in time change nothing."""
    clock = FakeClock()
    awake = Awake(clock)
    for _ in range(100):
        clock.time_s += TICK_INTERVAL_S
        awake.tick()
    assert awake.since_s() == 100.0
    clock.time_s += LATE_S + 0.1
    held_up_until_s = clock.time_s
    assert awake.since_s() == held_up_until_s
    clock.time_s += TICK_INTERVAL_S
    assert awake.since_s() == held_up_until_s
