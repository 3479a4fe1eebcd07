"""The estimated end of a batch, for courses that are known."""

import bisect
import random

import pytest

from service.db.standings import NEAREST_MARK, Mark
from service.insight import estimate


def marks(times_s: list[float], now_s: float) -> list[Mark]:
    """What the database has of a batch whose results came at these times, as of now."""
    done = bisect.bisect_right(times_s, now_s)
    backs = [0, *(NEAREST_MARK << n for n in range(33))]
    return [Mark(back, now_s - times_s[done - 1 - back]) for back in backs if back < done]


def left_s(times_s: list[float], now_s: float, held: int) -> float | None:
    done = bisect.bisect_right(times_s, now_s)
    return estimate.left_s(marks(times_s, now_s), len(times_s), done, now_s, held)


def course(kind: str, total: int, held: int, request_s: float) -> list[float]:
    """When the results of a batch come, with so many requests at once that take `request_s` on average."""
    chance = random.Random(total)
    took = {
        "equal": lambda: request_s,
        "spread": lambda: chance.uniform(0.5, 1.5) * request_s,
        "skewed": lambda: chance.expovariate(1 / request_s),
    }[kind]
    free_s = [0.0] * held
    times_s = []
    for _ in range(total):
        first = min(range(held), key=free_s.__getitem__)
        free_s[first] += took()
        times_s.append(free_s[first])
    return sorted(times_s)


@pytest.mark.parametrize("kind", ["equal", "spread", "skewed"])
@pytest.mark.parametrize(("total", "held", "request_s"), [(4_000, 32, 1.0), (4_000, 32, 20.0), (20_000, 64, 3.0)])
def test_steady_load_is_estimated_within_a_fifth(kind: str, total: int, held: int, request_s: float) -> None:
    """From 5 % on, whatever the requests' durations: also when they all finish together."""
    times_s = course(kind, total, held, request_s)
    for part in [0.05, 0.06, 0.08, *(tenth / 10 for tenth in range(1, 10))]:
        # Between two results, and right after one.
        for now_s in (times_s[int(part * total)], times_s[int(part * total)] + request_s / 2):
            left = left_s(times_s, now_s, held)
            assert left is not None
            assert now_s + left == pytest.approx(times_s[-1], rel=0.2)


def test_nothing_is_said_before_two_percent() -> None:
    """A few results say too little, and none say nothing."""
    times_s = [number / 10 for number in range(1, 10_001)]
    assert left_s(times_s, times_s[189], 10) is None
    assert left_s(times_s, times_s[199], 10) is not None
    assert estimate.left_s([], 10, 0, 5.0, 1) is None


def test_the_last_minutes_count() -> None:
    """Twice as fast after ten minutes, twice as early a few minutes later; half as fast, twice as late."""
    for factor in (2.0, 0.5):
        slow = [number / 10 for number in range(1, 6_001)]
        then = [600 + number / (10 * factor) for number in range(1, 20_001)]
        now_s = 600 + 300.0
        left = left_s(slow + then, now_s, 10)
        assert left == pytest.approx(then[-1] - now_s, rel=0.05)


def test_silence_makes_the_end_later() -> None:
    """While nothing comes the end moves away instead of staying near."""
    times_s = [number / 10 for number in range(1, 10_001)]
    done, last_s = 600, times_s[599]
    found = [
        estimate.left_s(
            [replaced(mark, silent_s) for mark in marks(times_s, last_s)], 10_000, done, last_s + silent_s, 10
        )
        for silent_s in (0.0, 10.0, 60.0, 600.0)
    ]
    assert None not in found
    ends = [silent_s + (left or 0) for silent_s, left in zip((0.0, 10.0, 60.0, 600.0), found, strict=True)]
    assert ends[0] == pytest.approx(ends[1])
    assert ends[1] < ends[2] < ends[3]


def replaced(mark: Mark, silent_s: float) -> Mark:
    return Mark(mark.count, mark.age_s + silent_s)


def test_what_waits_for_its_turn_ends_after_those_before_it() -> None:
    """The time of what is before it, at the speed of that, and then its own; nothing is said without either speed."""
    times_s = [float(number) for number in range(1, 101)]
    own = marks(times_s, 100.0)
    assert estimate.left_after_s(own, 1_000, 100, 100.0, before=500, before_per_s=5.0) == pytest.approx(100 + 900)
    assert estimate.left_after_s(own, 1_000, 100, 100.0, before=500, before_per_s=0.0) is None
    assert estimate.left_after_s(own, 10_000, 100, 100.0, before=500, before_per_s=5.0) is None
    assert estimate.left_after_s([], 10_000, 0, 0.0, before=500, before_per_s=5.0) is None
