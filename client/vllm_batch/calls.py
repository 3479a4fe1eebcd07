"""What calls of both clients have in common: deadlines, errors with their details, and when a call is tried again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc
import tenacity
from google.rpc import error_details_pb2, status_pb2

DEFAULT_TARGET = "127.0.0.1:50051"
CALL_TIMEOUT_S = 30.0
UPLOAD_TIMEOUT_S = 3600.0
# For how long UNAVAILABLE is retried: a model of some size is loaded in less.
PATIENCE_S = 600.0


class CallError(Exception):
    """A call that failed for good, with what google.rpc details say of it."""

    def __init__(self, error: grpc.RpcError) -> None:
        self.code: grpc.StatusCode = error.code()
        self.message: str = error.details() or self.code.name
        self.reason = ""
        self.metadata: dict[str, str] = {}
        self.retry_delay_s: float | None = None
        # (field, description) of each wrong field of an INVALID_ARGUMENT.
        self.violations: list[tuple[str, str]] = []
        trailers: Any = error.trailing_metadata() or ()
        for key, value in trailers:
            if key == "grpc-status-details-bin":
                self._read(value)
        super().__init__(f"{self.code.name}: {self.message}")

    def _read(self, packed: bytes) -> None:
        info, retry, bad = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo(), error_details_pb2.BadRequest()
        for detail in status_pb2.Status.FromString(packed).details:
            if detail.Unpack(info):
                self.reason, self.metadata = info.reason, dict(info.metadata)
            elif detail.Unpack(retry):
                self.retry_delay_s = retry.retry_delay.ToMilliseconds() / 1000
            elif detail.Unpack(bad):
                self.violations = [(v.field, v.description) for v in bad.field_violations]


def tell_nobody(error: CallError, delay_s: float) -> None:
    """Stands for the `on_retry` that was not given."""


def retry_rules(patience_s: float, on_retry: Callable[[CallError, float], None]) -> dict[str, Any]:
    """What tenacity.Retrying and tenacity.AsyncRetrying are told: UNAVAILABLE and a rate limit are tried again."""

    def tell(state: tenacity.RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        if isinstance(error, CallError) and state.next_action is not None:
            on_retry(error, state.next_action.sleep)

    return {
        "retry": tenacity.retry_if_exception(_is_retryable),
        "wait": _wait_s,
        "stop": tenacity.stop_after_delay(patience_s),
        "before_sleep": tell,
        "reraise": True,
    }


def _is_retryable(error: BaseException) -> bool:
    if not isinstance(error, CallError):
        return False
    return error.code is grpc.StatusCode.UNAVAILABLE or error.reason == "RATE_LIMITED"


def _wait_s(state: tenacity.RetryCallState) -> float:
    """What the server asked for; else from half a second on, doubling up to 10 s."""
    error = state.outcome.exception() if state.outcome else None
    asked = error.retry_delay_s if isinstance(error, CallError) else None
    return asked if asked is not None else min(10.0, 0.5 * 2 ** (state.attempt_number - 1))
