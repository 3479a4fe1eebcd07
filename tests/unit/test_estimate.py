"""The estimated end of a batch, for courses that are known."""

import bisect
import heapq
import random
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import pytest

from service.db.standings import NEAREST_MARK, Cost, Mark, Work
from service.insight import estimate


class Done(NamedTuple):
    """A result: when it came, the tokens of its request, and those that were estimated for it."""

    time_s: float
    tokens: float
    estimated: float


class Course:
    """A batch as the database has it at any time; `tokens` False: it does not have them."""

    def __init__(self, results: Sequence[Done], tokens: bool = True) -> None:
        self.results = sorted(results)
        self.end_s = self.results[-1].time_s
        self._used = list(accumulate(result.tokens if tokens else 0 for result in self.results))
        self._estimated = list(accumulate(result.estimated for result in self.results))

    def time_s(self, part: float) -> float:
        """When this part of the requests was done."""
        return self.results[int(part * len(self.results))].time_s

    def marks(self, now_s: float) -> list[Mark]:
        done = self._done(now_s)
        backs = [0, *(NEAREST_MARK << n for n in range(33))]
        return [self._mark(done, back, now_s) for back in backs if back < done]

    def seen(self, now_s: float) -> tuple[Sequence[Mark], Work]:
        """What estimates are made of."""
        done = self._done(now_s)
        course = estimate.course(self.marks(now_s), done, now_s)
        cost = Cost(self._estimated[done - 1] if done else 0.0, self._estimated[-1])
        return course, estimate.left(course, len(self.results), cost)

    def left_s(self, now_s: float, held: int) -> float | None:
        return estimate.left_s(*self.seen(now_s), held)

    def _done(self, now_s: float) -> int:
        return bisect.bisect_right(self.results, now_s, key=lambda result: result.time_s)

    def _mark(self, done: int, back: int, now_s: float) -> Mark:
        return Mark(back, now_s - self.results[done - 1 - back].time_s, round(self._used[done - 1 - back]))


def course(requests: Sequence[tuple[float, float]], held: int, tokens_per_s: float, tokens: bool = True) -> Course:
    """An engine that runs so many requests at once, each given as its tokens and their estimate, in this order."""
    free_s = [0.0] * held
    results = []
    for used, estimated in requests:
        time_s = heapq.heappop(free_s) + used / tokens_per_s
        heapq.heappush(free_s, time_s)
        results.append(Done(time_s, used, estimated))
    return Course(results, tokens)


def equal(times_s: Sequence[float]) -> Course:
    """Equal requests whose results came at these times."""
    return Course([Done(time_s, 100, 100) for time_s in times_s])


def lengths(kind: str, total: int) -> list[float]:
    chance = random.Random(total)
    make = {
        "equal": lambda: 400.0,
        "spread": lambda: chance.uniform(200, 600),
        "skewed": lambda: chance.expovariate(1 / 400),
        "chats": lambda: min(2_000, chance.lognormvariate(5.5, 1.0)),
        "few long": lambda: chance.uniform(3_500, 4_500) if chance.random() < 0.05 else chance.uniform(150, 250),
    }[kind]
    return [make() for _ in range(total)]


def is_estimated(found: Course, held: int, tolerance: float = 0.2) -> bool:
    """True if the end is within the tolerance from 5 % on, between two results and right after one."""
    for part in [0.05, 0.06, 0.08, *(tenth / 10 for tenth in range(1, 10))]:
        for now_s in (found.time_s(part), found.time_s(part) + found.end_s / 2_000):
            left_s = found.left_s(now_s, held)
            if left_s is None or abs(now_s + left_s - found.end_s) > tolerance * found.end_s:
                return False
    return True


SIZES = [(4_000, 32, 400.0), (4_000, 32, 20.0), (20_000, 64, 130.0)]


@pytest.mark.parametrize("tokens", [True, False])
@pytest.mark.parametrize("kind", ["equal", "spread", "skewed"])
@pytest.mark.parametrize(("total", "held", "tokens_per_s"), SIZES)
def test_steady_load_is_estimated_within_a_fifth(
    kind: str, total: int, held: int, tokens_per_s: float, tokens: bool
) -> None:
    """From 5 % on, however long the requests take, which nobody could estimate: by tokens, and by requests where tokens
    are not known; also when they all finish together."""
    requests = [(length, 1_000.0) for length in lengths(kind, total)]
    assert is_estimated(course(requests, held, tokens_per_s, tokens), held)


@pytest.mark.parametrize("worth", [1.0, 0.3])
@pytest.mark.parametrize("kind", ["skewed", "chats", "few long"])
@pytest.mark.parametrize(("total", "held", "tokens_per_s"), [(8_000, 32, 400.0), (8_000, 32, 60.0), SIZES[2]])
def test_the_longest_first(kind: str, total: int, held: int, tokens_per_s: float, worth: float) -> None:
    """When the longest run first, the end is estimated as well by tokens, whatever part of the estimates they use; a
    count of requests would say that it comes far too late."""
    requests = [(length, length / worth) for length in sorted(lengths(kind, total), reverse=True)]
    assert is_estimated(course(requests, held, tokens_per_s), held)
    assert not is_estimated(course(requests, held, tokens_per_s, tokens=False), held, 1.0)


@pytest.mark.parametrize("size", [1, 50])
@pytest.mark.parametrize(("total", "held", "tokens_per_s"), [(20_000, 32, 400.0), SIZES[2]])
def test_the_longest_first_in_each_group(total: int, held: int, tokens_per_s: float, size: int) -> None:
    """Groups that share a prefix, in each of which the longest run first; and different lengths in the file's order."""
    chats = lengths("chats", total)
    groups = (sorted(chats[first : first + size], reverse=True) for first in range(0, total, size))
    assert is_estimated(course([(length, length) for group in groups for length in group], held, tokens_per_s), held)


def test_what_an_earlier_version_stored_counts_by_requests() -> None:
    """Without the tokens of all marks there is an estimate all the same."""
    known, left = equal([number / 10 for number in range(1, 1_001)]).seen(10.0)
    old = [Mark(mark.count, mark.age_s, None) for mark in known]
    assert estimate.per_s(old).tokens == 0
    assert estimate.left_s(old, left, 10) == pytest.approx(90)
    assert estimate.left(old, 1_000, Cost(1.0, 10.0)) == Work(900)


def test_a_batch_without_an_estimate_of_its_tokens_counts_by_requests() -> None:
    """As one that is not in the queue yet."""
    known, _ = equal([number / 10 for number in range(1, 1_001)]).seen(10.0)
    assert estimate.left_s(known, estimate.left(known, 1_000, Cost()), 10) == pytest.approx(90)


def test_nothing_is_said_before_two_percent() -> None:
    """A few results say too little, and none say nothing."""
    found = equal([number / 10 for number in range(1, 10_001)])
    assert found.left_s(19.91, 10) is None
    assert found.left_s(20.01, 10) is not None
    assert found.left_s(0.01, 10) is None


def test_the_last_minutes_count() -> None:
    """Twice as fast after ten minutes, twice as early a few minutes later; half as fast, twice as late."""
    for factor in (2.0, 0.5):
        slow = [number / 10 for number in range(1, 6_001)]
        then = [600 + number / (10 * factor) for number in range(1, 20_001)]
        now_s = 600 + 300.0
        assert equal(slow + then).left_s(now_s, 10) == pytest.approx(then[-1] - now_s, rel=0.05)


def test_silence_makes_the_end_later() -> None:
    """While nothing comes the end moves away instead of staying near."""
    marks, left = equal([number / 10 for number in range(1, 10_001)]).seen(60.01)
    ends = []
    for silent_s in (0.0, 10.0, 60.0, 600.0):
        found = estimate.left_s([Mark(mark.count, mark.age_s + silent_s, mark.tokens) for mark in marks], left, 10)
        assert found is not None
        ends.append(silent_s + found)
    assert ends[0] == pytest.approx(ends[1])
    assert ends[1] < ends[2] < ends[3]


def test_what_waits_for_its_turn_ends_after_those_before_it() -> None:
    """The time of what is before it, at the speed of that, and then its own; nothing is said without either speed."""
    seen = equal([float(number) for number in range(1, 1_001)]).seen(100.0)
    before, speed = Work(500, 20_000), Work(5, 100)
    assert estimate.left_after_s(*seen, before, speed) == pytest.approx(200 + 900)
    assert estimate.left_after_s(*seen, Work(500), speed) == pytest.approx(100 + 900)
    assert estimate.left_after_s(*seen, before, Work()) is None
    little = equal([float(number) for number in range(1, 10_001)])
    assert estimate.left_after_s(*little.seen(100.0), before, speed) is None
    assert estimate.left_after_s(*little.seen(0.0), before, speed) is None
