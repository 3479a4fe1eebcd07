"""When leases that have run out show that their holders are gone."""

from service.db.database_clock import DatabaseClock


def steady() -> DatabaseClock:
    """A clock that was looked at every 5 s for a lease, until second 60."""
    clock = DatabaseClock(60, 15)
    seen = [clock.is_steady(1e9 + second, second) for second in range(0, 65, 5)]
    assert seen == [False] * 12 + [True]
    return clock


def test_a_clock_that_jumps_is_not_trusted_for_a_lease() -> None:
    """After a jump forward or back the clock is not steady for the length of a lease, and then again."""
    for jump_s in (3600, -3600, 16):
        clock = steady()
        seen = {second: clock.is_steady(1e9 + jump_s + second, second) for second in range(65, 140, 5)}
        assert seen == {second: second >= 125 for second in seen}


def test_slow_answers_are_no_jump() -> None:
    """A slow statement returns a time that is some seconds old, which is not a jump."""
    clock = steady()
    assert all(clock.is_steady(1e9 + second - late, second) for second, late in ((65, 9), (70, 0), (75, 14)))


def test_another_jump_begins_anew() -> None:
    """A second jump starts the wait again."""
    clock = steady()
    assert not clock.is_steady(1e9 + 3600, 61)
    assert not clock.is_steady(1e9 + 70, 70)
    seen = {second: clock.is_steady(1e9 + second, second) for second in range(75, 140, 5)}
    assert seen == {second: second >= 130 for second in seen}


def test_nobody_is_judged_for_a_lease_after_an_outage() -> None:
    """A worker that lost Postgres, or was itself held up, waits a lease: the others may need longer to come back."""
    lost, held_up = steady(), steady()
    lost.lost()
    for clock, back_s in ((lost, 65), (held_up, 80)):
        seen = {second: clock.is_steady(1e9 + second, second) for second in range(back_s, back_s + 75, 5)}
        assert seen == {second: second >= back_s + 60 for second in seen}
