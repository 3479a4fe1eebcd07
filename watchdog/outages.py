"""When to alert that a dependency is away: once per outage, and not for a mere restart."""

import threading
from dataclasses import dataclass, field

# A restart of Postgres or supervisord takes less and should wake nobody.
TELL_AFTER_S = 30.0
# The dependency must be back this long before the outage counts as over.
OVER_AFTER_S = 300.0


@dataclass
class Outage:
    """Tracks one dependency for all guards of a host. Times are monotonic."""

    _is_told: bool = False
    _away_since_s: float | None = None
    _back_since_s: float | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, is_away: bool, time_s: float) -> bool:
        """Records an observation. Returns True when an alert is due."""
        with self._lock:
            if not is_away:
                self._back_since_s = time_s if self._back_since_s is None else self._back_since_s
                if time_s - self._back_since_s >= OVER_AFTER_S:
                    self._is_told, self._away_since_s = False, None
                return False
            self._back_since_s = None
            self._away_since_s = time_s if self._away_since_s is None else self._away_since_s
            if self._is_told or time_s - self._away_since_s < TELL_AFTER_S:
                return False
            self._is_told = True
            return True
