"""When an outage raises an alert."""

from watchdog.outages import OVER_AFTER_S, TELL_AFTER_S, Outage


def told(outage: Outage, *seen: tuple[float, bool]) -> list[float]:
    return [time_s for time_s, is_away in seen if outage.note(is_away, time_s)]


def test_a_restart_wakes_nobody() -> None:
    """An interruption shorter than TELL_AFTER_S raises no alert."""
    later = TELL_AFTER_S + OVER_AFTER_S
    assert told(Outage(), (0, True), (TELL_AFTER_S - 1, True), (29, False), (later, False), (later + 1, True)) == []


def test_an_outage_is_told_once_however_it_flaps() -> None:
    """An outage that flaps raises one alert, because short recoveries in between belong to it."""
    seen: list[tuple[float, bool]] = [(float(time_s), time_s % 7 != 0) for time_s in range(1, 1000)]
    assert told(Outage(), *seen) == [TELL_AFTER_S + 1]


def test_the_next_outage_is_told_again() -> None:
    """After a recovery that lasted OVER_AFTER_S, the next outage raises an alert of its own."""
    outage = Outage()
    assert told(outage, (0, True), (40, True), (50, False), (50 + OVER_AFTER_S, False)) == [40]
    assert told(outage, (1000, True), (1040, True)) == [1040]
