"""Errors as they are sent: whatever is in them, they fit into the headers that clients accept."""

import base64
from urllib.parse import quote

import grpc
from google.rpc import error_details_pb2, status_pb2
from hypothesis import given
from hypothesis import strategies as st

from service.errors import ApiError, Violation, cut, invalid

# What gRPC's clients always accept, and what each header takes beside its name and value.
ACCEPTED_BYTES = 8 << 10
HEADER_BYTES = 32
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=40).flatmap(
    lambda text: st.sampled_from([1, 20, 500]).map(lambda times: text * times)
)


def sent_bytes(error: ApiError) -> int:
    """The size of the headers with which a call ends."""
    sizes = [len("grpc-message" + quote(error.message, safe=" ")) + HEADER_BYTES]
    for name, value in (("content-type", "application/grpc"), ("grpc-status", "16"), *error.trailing_metadata):
        text = base64.b64encode(value).decode() if isinstance(value, bytes) else value
        sizes.append(len(name + text) + HEADER_BYTES)
    return sum(sizes)


def violations_of(error: ApiError) -> list[tuple[str, str]]:
    """Those that are sent."""
    bad = error_details_pb2.BadRequest()
    [detail] = status_pb2.Status.FromString(error.status().SerializeToString()).details
    assert detail.Unpack(bad)
    return [(violation.field, violation.description) for violation in bad.field_violations]


@given(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=20))
def test_any_violations_fit(given: list[tuple[str, str]]) -> None:
    """However many and long they are, the client gets the first ones instead of an error of gRPC's."""
    error = invalid([Violation(*each) for each in given])
    assert sent_bytes(error) <= ACCEPTED_BYTES
    sent = violations_of(error)
    assert sent == [(cut(field, 500), cut(text, 500)) for field, text in given[: len(sent)]]
    assert sent


@given(TEXTS, TEXTS)
def test_any_message_fits(message: str, models: str) -> None:
    """An error that names all models of a large fleet reaches the client."""
    error = ApiError(grpc.StatusCode.UNAVAILABLE, message, "WORKER_OFFLINE", {"models": models}, retry_delay_s=5)
    assert sent_bytes(error) <= ACCEPTED_BYTES


def test_usual_violations_are_all_sent() -> None:
    """Twenty wrong lines with names of a usual length are all told."""
    name = "summarise-03-7f9c2ba4-e88f-4d5b-b1c2-9a0f5d3e8c11"
    wrong = [
        Violation(f"line {each}: custom_id", f"{name!r} is already used by an earlier request") for each in range(20)
    ]
    assert len(violations_of(invalid(wrong))) == 20
