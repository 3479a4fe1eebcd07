"""The progress lease: whether the engine moves. Pure: times, steps and processor time are given.

A thread that is alive proves nothing about the engine, and vLLM's own check_health says ok of one that is frozen.
"""

from collections.abc import Callable
from dataclasses import dataclass

# An engine with work that neither steps nor computes for so long does not move.
LEASE_S = 8.0
# One that computes may take longer for a step: a long prefill on a slow machine, a compilation. But not for ever:
# a deadlock may spin.
COMPUTING_LEASE_S = 120.0
# Whatever the steps have been seen to take, this many times as long is no hang.
STEP_FACTOR = 4.0
MAX_LEASE_S = 600.0
# The longest step seen counts for a few minutes: half of it after 350 s of looks, twice a second.
FADING = 0.999
# Processor time, as a share of the time passed, from which on an engine computes.
COMPUTING_SHARE = 0.2
# Whoever looks as late as this was held up itself, most likely with all the machine: it can say nothing of the engine.
LATE_S = 3.0


@dataclass
class ProgressLease:
    """Renewed by steps of the engine. Look at it about twice a second."""

    looked_s: float
    # When it moved last, by its steps or for want of work; and when it was seen to compute.
    moved_s: float = 0.0
    computed_s: float = 0.0
    steps: int = 0
    longest_step_s: float = 0.0
    _processor_s: float | None = None

    def look(self, now_s: float, steps: int, is_busy: bool, processor_s: Callable[[], float | None]) -> bool:
        """True while the engine moves, or has nothing to do.

        `steps` has grown when it moved; `is_busy` when there is work in it. `processor_s` gives the processor time
        used by all its processes, None when one of them is stopped; it is asked only when nothing else is known.
        """
        passed_s, self.looked_s = now_s - self.looked_s, now_s
        if passed_s > LATE_S:
            self.moved_s += passed_s
            self.computed_s += passed_s
        if steps != self.steps or not is_busy:
            if is_busy:
                self.longest_step_s = max(now_s - self.moved_s, self.longest_step_s * FADING)
            self.moved_s, self.steps, self._processor_s = now_s, steps, None
            return True
        silent_s = now_s - self.moved_s
        if silent_s > LEASE_S / 4:
            used_s, before_s = processor_s(), self._processor_s
            self._processor_s = used_s
            if used_s is not None and before_s is not None and used_s - before_s > COMPUTING_SHARE * passed_s:
                self.computed_s = now_s
        lease_s = max(LEASE_S, STEP_FACTOR * self.longest_step_s)
        if now_s - self.computed_s < LEASE_S:
            lease_s = max(lease_s, COMPUTING_LEASE_S)
        return silent_s < min(lease_s, MAX_LEASE_S)
