"""Results and batches in the formats of OpenAI's Batch API, and messages as JSON."""

from __future__ import annotations

import json

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message

from vllm_batch.v1 import batch_service_pb2 as pb


def line(result: pb.Result) -> str:
    """A result as a line of OpenAI's batch output, without its newline.

    The body is the endpoint's own text: parsing and serialising it again could change numbers. Raises ValueError for a
    result whose body was left out of its message; `result_line` of the clients reads that.
    """
    if result.response.omitted_body_bytes:
        raise ValueError(f"a body of {result.response.omitted_body_bytes} bytes was left out of its message")
    head = f'{{"id": {json.dumps(result.id)}, "custom_id": {json.dumps(result.custom_id)}, '
    if result.HasField("response"):
        response = f'{{"status_code": {result.response.status_code}, "request_id": {json.dumps(result.id)}, '
        return f'{head}"response": {response}"body": {result.response.body_json}}}, "error": null}}'
    error = json.dumps({"code": result.error.code, "message": result.error.message})
    return f'{head}"response": null, "error": {error}}}'


def json_line(message: Message) -> str:
    """A message as one line of JSON, with the field names of the proto."""
    return json.dumps(MessageToDict(message, preserving_proto_field_name=True))


def state_name(batch: pb.Batch) -> str:
    """The state as OpenAI spells it, such as `in_progress`."""
    return pb.BatchState.Name(batch.state).removeprefix("BATCH_STATE_").lower()
