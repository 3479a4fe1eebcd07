"""Converting names, tokens and options between the API and the code."""

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

from service.api import messages
from service.api.servicer import asked_tenant
from service.errors import ApiError
from service.rpc import pages
from vllm_batch.output import line
from vllm_batch.v1 import batch_service_pb2 as pb


def test_batch_names_go_round() -> None:
    """A batch's name converts back to its number."""
    for number in (17, (1 << 63) - 1):
        assert messages.batch_id(messages.batch_name(number)) == number


@pytest.mark.parametrize(
    "name", ["17", "batch_", "batch_x", "batch_1 ", "batch_١", f"batch_{1 << 63}", "batch_" + "9" * 30]
)
def test_names_of_no_batch(name: str) -> None:
    """A string that cannot be a batch name gives NOT_FOUND, not a database error."""
    with pytest.raises(ApiError) as caught:
        messages.batch_id(name)
    assert caught.value.code is grpc.StatusCode.NOT_FOUND


def test_tokens_go_round_and_belong_to_their_call() -> None:
    """A page token converts back to its position; a token of another method, or nonsense, is rejected."""
    assert pages.position(pages.token("index", 12), "index", "f") == 12
    assert pages.position("", "index", "f") is None
    for wrong in (pages.token("sequence", 12), "x", "====", pages.token("index", -4)):
        with pytest.raises(ApiError):
            pages.position(wrong, "index", "resume_token")


def test_pages_are_as_large_as_asked_for() -> None:
    """A page size of 0 means the default, and an invalid size is rejected with the allowed range."""
    assert [pages.size(asked) for asked in (0, 1, 1000)] == [50, 1, 1000]
    for wrong in (-1, 1001):
        with pytest.raises(ApiError, match=f"page_size: is {wrong}, must be from 0 to 1000"):
            pages.size(wrong)


def test_all_wrong_options_are_named() -> None:
    """Every invalid option is reported, each as its own violation."""
    wrong = pb.BatchOptions(
        request_id="x" * 129,
        metadata={"": "v", "k": "v" * 513},
        priority=101,
        completion_window=Duration(seconds=-1),
        order=7,  # type: ignore[arg-type]
    )
    with pytest.raises(ApiError) as caught:
        messages.options(wrong)
    fields = {violation.field for violation in caught.value.violations}
    assert fields == {
        "options.request_id",
        "options.metadata['']",
        "options.metadata['k']",
        "options.priority",
        "options.completion_window",
        "options.order",
    }


@pytest.mark.parametrize(
    ("given", "stored"),
    [(pb.RUN_ORDER_UNSPECIFIED, "prefix"), (pb.RUN_ORDER_PREFIX, "prefix"), (pb.RUN_ORDER_INPUT, "input")],
)
def test_order_of_a_new_batch(given: pb.RunOrder, stored: str) -> None:
    """By shared prefixes unless the client asks for the order of its file."""
    assert messages.options(pb.BatchOptions(order=given)).run_order == stored


def test_output_line_keeps_the_body() -> None:
    """An output line holds the response body exactly as the endpoint wrote it, digit by digit."""
    body = '{"n":1.50,"big":123456789012345678901234567890}'
    result = pb.Result(custom_id='a"b', id="r", response=pb.Response(status_code=200, body_json=body))
    assert f'"body": {body}' in line(result)
    error = pb.Result(custom_id="a", id="r", error=pb.RequestError(code="REQUEST_CRASHED_ENGINE", message="m"))
    assert line(error) == (
        '{"id": "r", "custom_id": "a", "response": null, "error": {"code": "REQUEST_CRASHED_ENGINE", "message": "m"}}'
    )


def test_a_tenant_that_cannot_be() -> None:
    """Postgres takes no NUL: it is the caller's fault, not an internal error."""
    with pytest.raises(ApiError, match="tenant: must not contain NUL") as raised:
        asked_tenant("a\0", "Listing")
    assert raised.value.code is grpc.StatusCode.INVALID_ARGUMENT
