"""Errors that end a call: a gRPC code that the client can act on, with google.rpc details."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import grpc
from google.protobuf import any_pb2
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2

DOMAIN = "vllm_batch"

WORKER_OFFLINE = "WORKER_OFFLINE"
WORKER_LOADING = "WORKER_LOADING"
WORKER_STALLED = "WORKER_STALLED"
RECOVERY_GAVE_UP = "RECOVERY_GAVE_UP"
DATABASE_UNAVAILABLE = "DATABASE_UNAVAILABLE"
SHUTTING_DOWN = "SHUTTING_DOWN"


@dataclass(frozen=True)
class Violation:
    """One invalid field of a request. `field` is a path such as `line 3: custom_id`."""

    field: str
    description: str


@dataclass
class ApiError(Exception):
    """Ends an RPC with this code and these details.

    `retry_delay_s` estimates when a retry may succeed; None: retrying does not help.
    """

    code: grpc.StatusCode
    message: str
    reason: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)
    retry_delay_s: float | None = None
    violations: Sequence[Violation] = ()

    def __str__(self) -> str:
        return self.message

    def status(self) -> status_pb2.Status:
        """The error as google.rpc.Status."""
        details = []
        if self.reason:
            info = error_details_pb2.ErrorInfo(reason=self.reason, domain=DOMAIN, metadata=dict(self.metadata))
            details.append(info)
        if self.retry_delay_s is not None:
            delay = Duration()
            delay.FromMilliseconds(round(self.retry_delay_s * 1000))
            details.append(error_details_pb2.RetryInfo(retry_delay=delay))
        if self.violations:
            bad = error_details_pb2.BadRequest()
            for violation in self.violations:
                bad.field_violations.add(field=violation.field, description=violation.description)
            details.append(bad)
        packed = []
        for detail in details:
            packed.append(any_pb2.Any())
            packed[-1].Pack(detail)
        return status_pb2.Status(code=self.code.value[0], message=self.message, details=packed)

    @cached_property
    def trailing_metadata(self) -> tuple[tuple[str, str | bytes], ...]:
        """The status, and the delay again under the key that gRPC's own retry policy reads (gRFC A6)."""
        metadata: list[tuple[str, str | bytes]] = [("grpc-status-details-bin", self.status().SerializeToString())]
        if self.retry_delay_s is not None:
            metadata.append(("grpc-retry-pushback-ms", str(round(self.retry_delay_s * 1000))))
        return tuple(metadata)


def invalid(violations: Sequence[Violation]) -> ApiError:
    """INVALID_ARGUMENT with all violations; the message shows the first three."""
    shown = "; ".join(f"{v.field}: {v.description}" for v in violations[:3])
    more = f"; and {len(violations) - 3} more" if len(violations) > 3 else ""
    return ApiError(grpc.StatusCode.INVALID_ARGUMENT, shown + more, violations=tuple(violations))


def not_found(what: str) -> ApiError:
    """NOT_FOUND: `what` does not exist."""
    return ApiError(grpc.StatusCode.NOT_FOUND, f"{what} does not exist")


def database_unavailable(cause: str) -> ApiError:
    """UNAVAILABLE: Postgres does not answer."""
    return ApiError(
        grpc.StatusCode.UNAVAILABLE, f"database unavailable: {cause}", DATABASE_UNAVAILABLE, retry_delay_s=5
    )


def ending() -> ApiError:
    """UNAVAILABLE for a stream whose server is shutting down; the client can reopen it elsewhere, or soon."""
    message = "the server is shutting down; call again"
    return ApiError(grpc.StatusCode.UNAVAILABLE, message, SHUTTING_DOWN, retry_delay_s=1)
