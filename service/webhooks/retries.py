"""When a failed delivery is tried again, and which targets rest meanwhile. Pure."""

from collections.abc import Iterable
from dataclasses import dataclass

# The first retry comes after about this long, each further one after twice as long, up to an hour.
FIRST_S = 5.0
LONGEST_S = 3600.0
# The part of a delay that is random, so that what failed together is not tried together.
JITTER = 0.5

# A target rests after so many failures in a row: a minute, then twice as long with each further failure.
FAILURES = 10
REST_S = 60.0
LONGEST_REST_S = 900.0
# Deliveries to one target that may be under way at once.
PER_TARGET = 4
# Targets whose failures are remembered. The oldest make way.
TARGETS = 10_000

# A tenant, and the scheme, host and port to which its events go: one tenant's failures do not rest another's.
Target = tuple[str, str]


def delay_s(tries: int, chance: float) -> float:
    """How long after `tries` failed tries the next one comes. `chance`: a random number from 0 to 1."""
    longest = min(LONGEST_S, FIRST_S * 2.0 ** min(tries - 1, 20))
    return longest * (1 - JITTER * chance)


@dataclass
class _Record:
    failures: int
    until_s: float = 0.0


class Breaker:
    """Failures in a row of each target, and until when it rests. One that has rested gets one delivery at first."""

    def __init__(self) -> None:
        self._failing: dict[Target, _Record] = {}

    def allowance(self, target: Target, now_s: float) -> int:
        """How many deliveries to a target may be under way at once."""
        record = self._failing.get(target)
        if record is None or record.failures < FAILURES:
            return PER_TARGET
        return 0 if now_s < record.until_s else 1

    def resting(self, now_s: float) -> list[Target]:
        """The targets that rest."""
        return [
            target
            for target, record in list(self._failing.items())
            if record.failures >= FAILURES and now_s < record.until_s
        ]

    def full(self, busy: Iterable[Target], now_s: float) -> list[Target]:
        """The targets that may not have another delivery now, of which `busy` has an item each under way."""
        counts: dict[Target, int] = {}
        for target in busy:
            counts[target] = counts.get(target, 0) + 1
        at_work = [target for target, count in counts.items() if count >= self.allowance(target, now_s)]
        return [*{*at_work, *self.resting(now_s)}]

    def succeeded(self, target: Target) -> bool:
        """Notes a success. True: the target had been resting."""
        record = self._failing.pop(target, None)
        return record is not None and record.failures >= FAILURES

    def failed(self, target: Target, now_s: float) -> float | None:
        """Notes a failure. Returns for how long the target rests from now on; None: it does not."""
        record = self._failing.setdefault(target, _Record(0))
        if record.failures >= FAILURES and now_s < record.until_s:
            # Was under way when the target began to rest.
            return None
        record.failures += 1
        if len(self._failing) > TARGETS:
            del self._failing[next(iter(self._failing))]
        if record.failures < FAILURES:
            return None
        rest_s = min(LONGEST_REST_S, REST_S * 2.0 ** min(record.failures - FAILURES, 20))
        record.until_s = now_s + rest_s
        return rest_s
