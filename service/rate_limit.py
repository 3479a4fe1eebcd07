"""How many calls a client may make: a token bucket for each. Pure: the time is passed in."""

from collections import OrderedDict

# A client that was forgotten begins with a full bucket again.
MAX_CLIENTS = 10_000
# A bucket holds what flows into it in this time.
BURST_S = 2.0


class RateLimit:
    """`rate_per_s` calls a second for each client, and a burst of two seconds' worth after a pause."""

    def __init__(self, rate_per_s: float) -> None:
        self._rate_per_s = rate_per_s
        self._burst = max(1.0, BURST_S * rate_per_s)
        # What is left for a client, and when that was so; the one that has called last is last.
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, client: str, now_s: float) -> float:
        """Counts a call. 0: it may be made; else it is not counted, and in so many seconds there is room for one."""
        left, at_s = self._left.pop(client, (self._burst, now_s))
        left = min(self._burst, left + self._rate_per_s * max(0.0, now_s - at_s))
        is_allowed = left >= 1
        self._left[client] = (left - is_allowed, now_s)
        if len(self._left) > MAX_CLIENTS:
            self._left.popitem(last=False)
        return 0.0 if is_allowed else (1 - left) / self._rate_per_s
