"""Errors that end a call: a gRPC code that the client can act on, with google.rpc details."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import grpc
from google.protobuf import any_pb2
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2

DOMAIN = "vllm_batch"

# Clients take 8 KiB of metadata at the end of a call unless they ask for more, and get an error of gRPC instead of ours
# for more than that. What is not counted here is for what is always there.
MAX_SENT_BYTES = 7 << 10
MAX_MESSAGE_BYTES = 1000
# Of each violation that the message shows.
MAX_SHOWN_BYTES = 300
MAX_METADATA_BYTES = 500
# More would tell the client nothing new.
MAX_VIOLATIONS = 20
# What says where each begins, and how long its texts are.
VIOLATION_BYTES = 12

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

    @property
    def details(self) -> str:
        """The message as a call ends with it."""
        return shortened(self.message, MAX_MESSAGE_BYTES)

    def status(self) -> status_pb2.Status:
        """The error as google.rpc.Status, its texts as long as the end of a call can have them."""
        details = []
        if self.reason:
            metadata = {name: shortened(value, MAX_METADATA_BYTES) for name, value in self.metadata.items()}
            details.append(error_details_pb2.ErrorInfo(reason=self.reason, domain=DOMAIN, metadata=metadata))
        if self.retry_delay_s is not None:
            delay = Duration()
            delay.FromMilliseconds(round(self.retry_delay_s * 1000))
            details.append(error_details_pb2.RetryInfo(retry_delay=delay))
        if self.violations:
            details.append(_bad_request(self.violations[:MAX_VIOLATIONS], _left_beside(self.details)))
        packed = []
        for detail in details:
            packed.append(any_pb2.Any())
            packed[-1].Pack(detail)
        return status_pb2.Status(code=self.code.value[0], message=self.details, details=packed)

    @cached_property
    def trailing_metadata(self) -> tuple[tuple[str, str | bytes], ...]:
        """The status, and the delay again under the key that gRPC's own retry policy reads (gRFC A6)."""
        metadata: list[tuple[str, str | bytes]] = [("grpc-status-details-bin", self.status().SerializeToString())]
        if self.retry_delay_s is not None:
            metadata.append(("grpc-retry-pushback-ms", str(round(self.retry_delay_s * 1000))))
        return tuple(metadata)


def shortened(text: str, most: int) -> str:
    """The text, or as much of its begin as `most` bytes of UTF-8 hold, with an ellipsis."""
    data = text.encode(errors="replace")
    return text if len(data) <= most else data[: most - 3].decode(errors="ignore") + "…"


def _left_beside(message: str) -> int:
    """How many bytes of other texts an error with this message has room for.

    The message is sent twice: in a header, where a byte that is no printable ASCII takes three, and in the status. That
    is in base64, like all other texts.
    """
    data = message.encode(errors="replace")
    header = len(data) + 2 * sum(not 32 <= byte <= 126 or byte == ord("%") for byte in data)
    return (MAX_SENT_BYTES - header) * 3 // 4 - len(data)


def _bad_request(violations: Sequence[Violation], most: int) -> error_details_pb2.BadRequest:
    """Each violation gets an equal share of the `most` bytes if they need more."""
    sizes = [len(f"{violation.field}{violation.description}".encode(errors="replace")) for violation in violations]
    most -= VIOLATION_BYTES * len(violations)
    share = most // len(violations) if sum(sizes) > most else most
    bad = error_details_pb2.BadRequest()
    for violation in violations:
        field = shortened(violation.field, share // 2)
        left = share - len(field.encode(errors="replace"))
        bad.field_violations.add(field=field, description=shortened(violation.description, left))
    return bad


def invalid(violations: Sequence[Violation]) -> ApiError:
    """INVALID_ARGUMENT with all violations; the message shows the first three."""
    shown = "; ".join(shortened(f"{v.field}: {v.description}", MAX_SHOWN_BYTES) for v in violations[:3])
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
