"""Errors as a call ends with them: always in few enough bytes for any client."""

import asyncio
from typing import Any
from urllib.parse import quote

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from hypothesis import given
from hypothesis import strategies as st

from service.clock import SystemClock
from service.errors import MAX_VIOLATIONS, ApiError, Violation, invalid, shortened
from service.rpc import ports
from service.rpc.access import Access
from service.rpc.server import Interceptor
from vllm_batch import CallError
from vllm_batch.v1 import batch_service_pb2 as pb
from vllm_batch.v1 import batch_service_pb2_grpc

# What gRPC takes by default, less what it puts there itself.
MOST_BYTES = (8 << 10) - 500
TEXTS = st.text(max_size=200) | st.builds(
    lambda text, times: text * times, st.sampled_from("x%é漢😀"), st.integers(0, 9999)
)
VIOLATIONS = st.lists(st.builds(Violation, TEXTS, TEXTS), max_size=40)


def at_the_end(error: ApiError) -> int:
    """The bytes of metadata at the end of a call, counted as HTTP/2 counts them, encoded as gRPC does."""
    trailers = [
        (name, len(value) * 4 / 3 if name.endswith("-bin") else len(value)) for name, value in error.trailing_metadata
    ]
    message = len(quote(error.details, safe="".join(map(chr, range(0x20, 0x7F))).replace("%", "")))
    return round(sum(len(name) + size + 32 for name, size in [*trailers, ("grpc-message", message)]))


@given(TEXTS, TEXTS, VIOLATIONS)
def test_any_error_fits(message: str, value: str, violations: list[Violation]) -> None:
    """Whatever an error quotes, it ends its call with its own code: what is too long for that is shortened."""
    error = ApiError(grpc.StatusCode.NOT_FOUND, message, "REASON", {"models": value}, 5)
    assert at_the_end(error) < MOST_BYTES
    assert message.startswith(error.details.removesuffix("…"))
    error = invalid([*violations, Violation("a", "b")])
    assert at_the_end(error) < MOST_BYTES
    bad = error_details_pb2.BadRequest()
    assert error.status().details[0].Unpack(bad)
    assert len(bad.field_violations) == min(len(violations) + 1, MAX_VIOLATIONS)
    for told, violation in zip(bad.field_violations, violations, strict=False):
        assert violation.field.startswith(told.field.removesuffix("…"))
        assert violation.description.startswith(told.description.removesuffix("…"))


def test_what_fits_is_told_in_full() -> None:
    """Twenty invalid lines with a usual error are all told, word for word."""
    violations = [
        Violation(
            f"line {number}: custom_id", f"'summary-{number}-{'7f9c2ba4' * 8}' is already used by an earlier request"
        )
        for number in range(20)
    ]
    bad = error_details_pb2.BadRequest()
    status = status_pb2.Status.FromString(dict(invalid(violations).trailing_metadata)["grpc-status-details-bin"])  # type: ignore[arg-type]
    assert status.details[0].Unpack(bad)
    assert [(each.field, each.description) for each in bad.field_violations] == [
        (each.field, each.description) for each in violations
    ]


@pytest.mark.parametrize(("text", "most", "found"), [("abcde", 5, "abcde"), ("abcdef", 5, "ab…"), ("ééé", 5, "é…")])
def test_shortened(text: str, most: int, found: str) -> None:
    """A text that is too long ends with an ellipsis, between two characters."""
    assert shortened(text, most) == found


@pytest.mark.parametrize("letter", ["x", "é", "😀", "%"])
def test_any_client_gets_them(letter: str) -> None:
    """A client with gRPC's defaults gets the code and the fields of an error, and not one of gRPC about its size."""
    errors = {
        "many": invalid([Violation(f"line {number}: custom_id", letter * 512) for number in range(5000)]),
        "long": ApiError(grpc.StatusCode.NOT_FOUND, letter * 50_000, "REASON", {"models": letter * 50_000}, 5),
    }

    class Refusing(batch_service_pb2_grpc.BatchServiceServicer):
        async def GetBatch(self, request: pb.GetBatchRequest, context: Any) -> pb.GetBatchResponse:
            raise errors[request.batch_id]

    async def call() -> dict[str, CallError]:
        server = grpc.aio.server(interceptors=[Interceptor(Access(None, SystemClock()))], options=ports.OPTIONS)
        batch_service_pb2_grpc.add_BatchServiceServicer_to_server(Refusing(), server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        found = {}
        # Without the proxy that the environment may name.
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=[("grpc.enable_http_proxy", 0)]) as channel:
            stub = batch_service_pb2_grpc.BatchServiceStub(channel)
            for name in errors:
                try:
                    await stub.GetBatch(pb.GetBatchRequest(batch_id=name), timeout=20)
                except grpc.aio.AioRpcError as error:
                    found[name] = CallError(error)
        await server.stop(None)
        return found

    found = asyncio.run(call())
    assert found["many"].code is grpc.StatusCode.INVALID_ARGUMENT
    assert [field for field, _ in found["many"].violations] == [f"line {n}: custom_id" for n in range(MAX_VIOLATIONS)]
    assert (found["long"].code, found["long"].reason) == (grpc.StatusCode.NOT_FOUND, "REASON")
