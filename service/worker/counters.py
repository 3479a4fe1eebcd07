"""Prometheus counters of the worker's results, tokens and request durations."""

from collections.abc import Sequence
from functools import cache

from prometheus_client import Counter, Histogram

from service.db.results import Result

_DURATION = Histogram(
    "vllm_batch_request_duration_seconds",
    "Time that requests spent in the engine, by endpoint.",
    ["url"],
    buckets=(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800),
)
_RESULTS = Counter("vllm_batch_results", "Results stored, by outcome: completed (a 2xx answer) or failed.", ["outcome"])
_TOKENS = Counter("vllm_batch_tokens", "Tokens of stored results: prompt or completion.", ["kind"])
# Created now, so that they begin at 0 and the first result shows as an increase.
_COMPLETED, _FAILED = (_RESULTS.labels(outcome) for outcome in ("completed", "failed"))
_PROMPT, _COMPLETION = (_TOKENS.labels(kind) for kind in ("prompt", "completion"))


# Looking up a label costs as much as counting.
_duration_of = cache(_DURATION.labels)


def request_answered(url: str, duration_s: float) -> None:
    """Counts a request that the engine has answered."""
    _duration_of(url).observe(duration_s)


def results_stored(results: Sequence[Result]) -> None:
    """Counts results that have reached Postgres."""
    completed = sum(result.is_completed for result in results)
    _COMPLETED.inc(completed)
    _FAILED.inc(len(results) - completed)
    _PROMPT.inc(sum(result.prompt_tokens for result in results))
    _COMPLETION.inc(sum(result.completion_tokens for result in results))
