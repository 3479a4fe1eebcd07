"""How long calls of both clients may take, and when they are retried."""

from __future__ import annotations

import time
from collections.abc import Callable
from numbers import Real
from typing import Any, TypeAlias

import grpc
import tenacity

from vllm_batch.errors import CallError

# Deadlines of one attempt, in seconds.
CALL_TIMEOUT_S = 30.0
UPLOAD_TIMEOUT_S = 3600.0
# A test of a target may have to wait for other deliveries.
WEBHOOK_TIMEOUT_S = 60.0
# Answered from memory: a slower answer counts as none.
STATUS_TIMEOUT_S = 5.0
# How long failed calls are retried: a model of moderate size loads in less.
PATIENCE_S = 600.0
# An attempt that lasted longer than this did not fail to connect.
CONNECTED_S = 30.0
FIRST_DELAY_S = 0.5
MAX_DELAY_S = 10.0

# Called with the error and the delay in seconds before each wait.
OnRetry: TypeAlias = Callable[[CallError, float], None]


# What gRPC says of calls on a channel that was closed under them, on either side of a gateway.
CHANNEL_CLOSED = "Channel closed!"


def retry_rules(
    patience_s: float,
    on_retry: OnRetry | None = None,
    is_closed: Callable[[], bool] = lambda: False,
    *,
    of_stream: bool = False,
) -> dict[str, Any]:
    """Arguments for tenacity's Retrying and AsyncRetrying: retry UNAVAILABLE and rate limits, and little else.

    Calls that ended with their channel are retried too, unless `is_closed`: the caller has closed it. Patience begins
    with the first failure, however long that attempt took. With `of_stream` it begins again whenever an attempt fails
    that lasted so long that it must have been connected. No wait is longer than what is left of it.
    """

    if not isinstance(patience_s, Real):
        raise TypeError(f"patience_s must be a number of seconds, not {patience_s!r}")
    # NaN compares with nothing: nobody's patience would end.
    if not patience_s >= 0:
        raise ValueError(f"patience_s must be 0 or more, not {patience_s!r}")

    def is_retryable(error: BaseException) -> bool:
        return isinstance(error, CallError) and _is_retryable(error) and not is_closed()

    def before(state: tenacity.RetryCallState) -> None:
        # The statistics belong to this call alone.
        state.retry_object.statistics["attempt_s"] = time.monotonic()

    def after(state: tenacity.RetryCallState) -> None:
        noted, failed_s = state.retry_object.statistics, state.outcome_timestamp or 0.0
        if state.attempt_number == 1 or (of_stream and failed_s - noted["attempt_s"] > CONNECTED_S):
            noted["failing_s"] = failed_s

    def left_s(state: tenacity.RetryCallState) -> float:
        """What was left of the patience when the last attempt failed."""
        failing_s: float = state.retry_object.statistics["failing_s"]
        return patience_s - ((state.outcome_timestamp or 0.0) - failing_s)

    def wait_s(state: tenacity.RetryCallState) -> float:
        return max(0.0, min(_wait_s(state), left_s(state)))

    def is_over(state: tenacity.RetryCallState) -> bool:
        return left_s(state) <= 0

    def before_sleep(state: tenacity.RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        if on_retry is not None and isinstance(error, CallError) and state.next_action is not None:
            on_retry(error, state.next_action.sleep)

    return {
        "retry": tenacity.retry_if_exception(is_retryable),
        "wait": wait_s,
        "stop": is_over,
        "before": before,
        "after": after,
        "before_sleep": before_sleep,
        "reraise": True,
    }


def _is_retryable(error: CallError) -> bool:
    if error.code is grpc.StatusCode.CANCELLED:
        return error.message == CHANNEL_CLOSED
    return error.code is grpc.StatusCode.UNAVAILABLE or error.reason == "RATE_LIMITED"


def _wait_s(state: tenacity.RetryCallState) -> float:
    """The delay that the server asks for; without one, a delay that doubles with each attempt."""
    error = state.outcome.exception() if state.outcome else None
    asked = error.retry_delay_s if isinstance(error, CallError) else None
    return asked if asked is not None else min(MAX_DELAY_S, FIRST_DELAY_S * 2 ** (state.attempt_number - 1))
