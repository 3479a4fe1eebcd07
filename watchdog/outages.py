"""When a person is to be told that something we depend on is away: once for each outage, and not of a mere restart."""

import threading
from dataclasses import dataclass, field

# Restarts of Postgres and supervisord take less, and wake nobody.
TELL_AFTER_S = 30.0
# What comes and goes within this time is one outage.
OVER_AFTER_S = 300.0


@dataclass
class Outage:
    """One dependency, for all guards of a host. Times are monotonic."""

    _is_told: bool = False
    _away_since_s: float | None = None
    _back_since_s: float | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, is_away: bool, time_s: float) -> bool:
        """Takes note of what was seen. Returns True when a person is to be told now."""
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
