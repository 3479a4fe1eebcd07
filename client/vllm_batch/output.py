"""Results as lines of OpenAI's batch output format."""

import json

from vllm_batch.v1 import batch_service_pb2 as pb


def line(result: pb.Result) -> str:
    """One line, without its end. The body is the endpoint's own text: no number is read and written anew."""
    head = f'{{"id": {json.dumps(result.id)}, "custom_id": {json.dumps(result.custom_id)}, '
    if result.HasField("response"):
        response = f'{{"status_code": {result.response.status_code}, "request_id": {json.dumps(result.id)}, '
        # A body is one line of JSON, or it would end the line of the output.
        body = result.response.body_json.replace("\n", " ").replace("\r", " ")
        return f'{head}"response": {response}"body": {body}}}, "error": null}}'
    error = json.dumps({"code": result.error.code, "message": result.error.message})
    return f'{head}"response": null, "error": {error}}}'
