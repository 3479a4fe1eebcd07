"""Counts of what the watchdog did, for Prometheus."""

from collections.abc import Mapping

from prometheus_client import Counter, Histogram

OUTCOMES = ("recovered", "failed", "superseded")

_RESTARTS = Counter("vllm_batch_restarts", "Restarts that have ended, by outcome.", ["worker_id", "outcome"])
_PHASE_DURATION = Histogram(
    "vllm_batch_restart_phase_duration_seconds",
    "What restarts that recovered the worker spent their time on; the sum over all phases is the time to recovery.",
    ["phase"],
    buckets=(0.1, 0.25, 0.5, 1, 2.5, 5, 10, 15, 30, 60, 120, 300, 600, 1800),
)


def begin(worker_id: str) -> None:
    """Shows the counts of a worker as 0, so that its first restart is seen as an increase."""
    for outcome in OUTCOMES:
        _RESTARTS.labels(worker_id, outcome)


def restart_ended(worker_id: str, outcome: str, timings: Mapping[str, float]) -> None:
    """Counts a restart; `timings` in seconds by phase."""
    _RESTARTS.labels(worker_id, outcome).inc()
    if outcome == "recovered":
        for phase, time_s in timings.items():
            _PHASE_DURATION.labels(phase).observe(time_s)
