"""The error that every call of both clients raises."""

from __future__ import annotations

import contextlib
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2


class CallError(Exception):
    """A failed call, with the google.rpc details that the server sent.

    `violations` are the (field, description) pairs of an INVALID_ARGUMENT; `retry_delay_s` is how long the server asks
    callers to wait, None when retrying is pointless.
    """

    def __init__(self, error: grpc.RpcError) -> None:
        self.code: grpc.StatusCode = error.code()
        self.message: str = error.details() or self.code.name
        self.reason = ""
        self.metadata: dict[str, str] = {}
        self.retry_delay_s: float | None = None
        self.violations: list[tuple[str, str]] = []
        trailers: Any = error.trailing_metadata() or ()
        for key, value in trailers:
            if key == "grpc-status-details-bin":
                # What is no server of ours may send anything; its code and message are enough.
                with contextlib.suppress(DecodeError):
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
