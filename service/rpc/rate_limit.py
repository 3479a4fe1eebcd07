"""Rate limits: a token bucket per client. Pure: the time is passed in."""

from collections import OrderedDict

# Beyond these the one that called longest ago is forgotten; it starts again with a full bucket.
MAX_CLIENTS = 10_000
# A bucket holds what it gains in this time.
BURST_S = 2.0


class RateLimit:
    """Allows each client so many calls a second, and after a pause a burst of BURST_S seconds' worth."""

    def __init__(self) -> None:
        # Calls left for each client, and at which time; the client that called most recently is last.
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, client: str, rate_per_s: float, now_s: float) -> float:
        """Counts a call and returns 0 if it is allowed; otherwise returns the seconds until one will be."""
        burst = max(1.0, BURST_S * rate_per_s)
        left, at_s = self._left.pop(client, (burst, now_s))
        left = min(burst, left + rate_per_s * max(0.0, now_s - at_s))
        is_allowed = left >= 1
        self._left[client] = (left - is_allowed, now_s)
        if len(self._left) > MAX_CLIENTS:
            self._left.popitem(last=False)
        return 0.0 if is_allowed else (1 - left) / rate_per_s
