"""Names, tokens and options at the border of the contract."""

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

from service import messages
from service.errors import ApiError
from vllm_batch.output import line
from vllm_batch.v1 import batch_service_pb2 as pb


def test_batch_names_go_round() -> None:
    """The number in a name is the number that made it."""
    assert messages.batch_id(messages.batch_name(17)) == 17


@pytest.mark.parametrize("name", ["17", "batch_", "batch_x", "batch_1 ", "batch_١", "batch_" + "9" * 30])
def test_names_of_no_batch(name: str) -> None:
    """What cannot be a name is a batch that does not exist, not an error of the database."""
    with pytest.raises(ApiError) as caught:
        messages.batch_id(name)
    assert caught.value.code is grpc.StatusCode.NOT_FOUND


def test_tokens_go_round_and_belong_to_their_call() -> None:
    """A token of one listing is refused by another, as is nonsense."""
    assert messages.position(messages.token("index", 12), "index", "f") == 12
    assert messages.position("", "index", "f") is None
    for wrong in (messages.token("sequence", 12), "x", "====", messages.token("index", -4)):
        with pytest.raises(ApiError):
            messages.position(wrong, "index", "resume_token")


def test_all_wrong_options_are_named() -> None:
    """Each wrong option is a violation of its own."""
    wrong = pb.BatchOptions(
        request_id="x" * 129,
        metadata={"": "v", "k": "v" * 513},
        priority=101,
        completion_window=Duration(seconds=-1),
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
    }


def test_output_line_keeps_the_body() -> None:
    """The line of the output holds the body as the endpoint wrote it, digit by digit."""
    body = '{"n":1.50,"big":123456789012345678901234567890}'
    result = pb.Result(custom_id='a"b', id="r", response=pb.Response(status_code=200, body_json=body))
    assert f'"body": {body}' in line(result)
    error = pb.Result(custom_id="a", id="r", error=pb.RequestError(code="REQUEST_CRASHED_ENGINE", message="m"))
    assert line(error) == (
        '{"id": "r", "custom_id": "a", "response": null, "error": {"code": "REQUEST_CRASHED_ENGINE", "message": "m"}}'
    )
