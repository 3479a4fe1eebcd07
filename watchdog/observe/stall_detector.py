"""Detects when this process was held up: the worker may have been too, so earlier suspicions no longer count."""

import threading
import time

from service.clock import Clock

TICK_INTERVAL_S = 0.5
# A tick this late means that the process was held up.
LATE_S = 3.0


class StallDetector:
    """Ticks twice a second in its own thread. Thread-safe."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._ticked_s = self._since_s = clock.monotonic()

    def start(self) -> None:
        """Starts the thread."""
        threading.Thread(target=self._follow, name="stalls", daemon=True).start()

    def _follow(self) -> None:
        while True:
            self.tick()
            time.sleep(TICK_INTERVAL_S)

    def tick(self) -> None:
        """Records that the process runs."""
        with self._lock:
            now_s = self._clock.monotonic()
            if now_s - self._ticked_s > LATE_S:
                self._since_s = now_s
            self._ticked_s = now_s

    def since_s(self) -> float:
        """Returns the monotonic time at which the last hold-up ended, or this object was made."""
        self.tick()
        return self._since_s
