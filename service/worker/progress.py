"""The progress lease: whether the engine makes progress. Pure: times, steps and processor time are passed in.

A live thread proves nothing about the engine, and vLLM's own check_health reports OK for a frozen one.
"""

from collections.abc import Callable
from dataclasses import dataclass

# A busy engine that neither steps nor computes for this long has stalled.
LEASE_S = 8.0
# An engine that computes may take longer for a step (a long prefill on a slow machine, a compilation), but not for
# ever: a deadlock can spin.
COMPUTING_LEASE_S = 120.0
# A step may take this many times the longest recent step.
STEP_FACTOR = 4.0
MAX_LEASE_S = 600.0
# The longest step fades at each look: to half after 350 s at two looks a second.
FADING = 0.999
# Minimum share of one core's time for an engine to count as computing.
COMPUTING_SHARE = 0.2
# A look this late means that we were held up, most likely with the whole machine: it proves nothing about the engine.
LATE_S = 3.0


@dataclass
class ProgressLease:
    """A lease that the engine's steps renew. Call `look` about twice a second."""

    looked_s: float
    # When the engine last stepped or was idle, and when it was last seen computing.
    moved_s: float = 0.0
    computed_s: float = 0.0
    steps: int = 0
    longest_step_s: float = 0.0
    _processor_s: float | None = None

    def look(self, now_s: float, steps: int, is_busy: bool, processor_s: Callable[[], float | None]) -> bool:
        """Returns True while the engine makes progress or is idle.

        `steps` is its step count; `is_busy`: it has work. `processor_s` returns the processor time of all its
        processes, or None if one of them is stopped; it is called only when steps fail to appear.
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
