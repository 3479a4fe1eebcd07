"""Prometheus counters of restarts."""

from collections.abc import Mapping

from prometheus_client import Counter, Histogram

OUTCOMES = ("recovered", "failed", "superseded")

_RESTARTS = Counter("vllm_batch_restarts", "Finished restarts, by outcome.", ["worker_id", "outcome"])
_PHASE_DURATION = Histogram(
    "vllm_batch_restart_phase_duration_seconds",
    "Time spent in each phase of successful restarts; the sum over all phases is the time to recovery.",
    ["phase"],
    buckets=(0.1, 0.25, 0.5, 1, 2.5, 5, 10, 15, 30, 60, 120, 300, 600, 1800),
)


def begin(worker_id: str) -> None:
    """Exports the counters of a worker at 0, so that its first restart shows as an increase."""
    for outcome in OUTCOMES:
        _RESTARTS.labels(worker_id, outcome)


def restart_ended(worker_id: str, outcome: str, timings: Mapping[str, float]) -> None:
    """Counts a finished restart; `timings` are seconds by phase."""
    _RESTARTS.labels(worker_id, outcome).inc()
    if outcome == "recovered":
        for phase, time_s in timings.items():
            _PHASE_DURATION.labels(phase).observe(time_s)
