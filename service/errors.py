"""Errors that end a call: a gRPC code that the client can act on, with google.rpc details."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import grpc
from google.protobuf import any_pb2
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2

DOMAIN = "vllm_batch"
# An error travels in headers. Of more than 8 KiB gRPC's clients reject some, and of more than 16 KiB all, with an error
# of their own instead of this one. The rest is for headers that are always there.
MAX_SENT_BYTES = 7 << 10
# Of a message, which is sent twice; of each part of one; of a description or a value of the metadata.
MAX_MESSAGE_BYTES = 1 << 10
MAX_PART_BYTES = 300
MAX_TEXT_BYTES = 500

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

    def __post_init__(self) -> None:
        self.message = cut(self.message, MAX_MESSAGE_BYTES)

    def __str__(self) -> str:
        return self.message

    def status(self) -> status_pb2.Status:
        """The error as google.rpc.Status, with as many violations as can be sent."""
        details = []
        if self.reason:
            metadata = {name: cut(value, MAX_TEXT_BYTES) for name, value in self.metadata.items()}
            details.append(error_details_pb2.ErrorInfo(reason=self.reason, domain=DOMAIN, metadata=metadata))
        if self.retry_delay_s is not None:
            delay = Duration()
            delay.FromMilliseconds(round(self.retry_delay_s * 1000))
            details.append(error_details_pb2.RetryInfo(retry_delay=delay))
        if self.violations:
            details.append(self._sendable())
        packed = []
        for detail in details:
            packed.append(any_pb2.Any())
            packed[-1].Pack(detail)
        return status_pb2.Status(code=self.code.value[0], message=self.message, details=packed)

    def _sendable(self) -> error_details_pb2.BadRequest:
        bad = error_details_pb2.BadRequest()
        message = self.message.encode(errors="replace")
        # In its own header each byte that is no printable ASCII takes three; the details are sent in base64.
        sent = len(message) + 2 * sum(not 32 <= byte <= 126 or byte == ord("%") for byte in message)
        sent += 4 * len(message) // 3
        for violation in self.violations:
            one = error_details_pb2.BadRequest.FieldViolation(
                field=cut(violation.field, MAX_TEXT_BYTES), description=cut(violation.description, MAX_TEXT_BYTES)
            )
            # With the bytes that say what it is and how long.
            sent += 4 * (one.ByteSize() + 4) // 3
            if sent > MAX_SENT_BYTES:
                break
            bad.field_violations.append(one)
        return bad

    @cached_property
    def trailing_metadata(self) -> tuple[tuple[str, str | bytes], ...]:
        """The status, and the delay again under the key that gRPC's own retry policy reads (gRFC A6)."""
        metadata: list[tuple[str, str | bytes]] = [("grpc-status-details-bin", self.status().SerializeToString())]
        if self.retry_delay_s is not None:
            metadata.append(("grpc-retry-pushback-ms", str(round(self.retry_delay_s * 1000))))
        return tuple(metadata)


def cut(text: str, most: int) -> str:
    """The text, or its beginning if it has more than so many bytes in UTF-8."""
    data = text.encode(errors="replace")
    return text if len(data) <= most else data[: most - 3].decode(errors="ignore") + "..."


def invalid(violations: Sequence[Violation]) -> ApiError:
    """INVALID_ARGUMENT with all violations; the message shows the first three."""
    shown = "; ".join(cut(f"{v.field}: {v.description}", MAX_PART_BYTES) for v in violations[:3])
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
