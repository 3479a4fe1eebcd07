"""Since when this process has run without being held up: a suspicion from before, when all may have stood still with
it, says nothing of what is now."""

import threading
import time

from service.clock import Clock

TICK_INTERVAL_S = 0.5
# A tick as late as this was held up.
LATE_S = 3.0


class Awake:
    """Ticks twice a second, in a thread that does nothing else. May be asked from any."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._ticked_s = self._since_s = clock.monotonic()

    def start(self) -> None:
        """Begins to tick."""
        threading.Thread(target=self._live, name="awake", daemon=True).start()

    def _live(self) -> None:
        while True:
            self.tick()
            time.sleep(TICK_INTERVAL_S)

    def tick(self) -> None:
        """Notes that the process runs."""
        with self._lock:
            now_s = self._clock.monotonic()
            if now_s - self._ticked_s > LATE_S:
                self._since_s = now_s
            self._ticked_s = now_s

    def since_s(self) -> float:
        """When it was held up last, until when; else when it began. Monotonic."""
        self.tick()
        return self._since_s
