"""Which models a new batch names, as far as can be seen without reading all of it. Pure."""

import msgspec

from vllm_batch.v1 import batch_service_pb2 as pb


class _Body(msgspec.Struct):
    model: str = ""


class _Line(msgspec.Struct):
    body: _Body


_decode_body = msgspec.json.Decoder(_Body).decode
_decode_line = msgspec.json.Decoder(_Line).decode


def of_inline(request: pb.CreateBatchRequest) -> frozenset[str]:
    """All models of inline requests. A body that is wrong names none: the worker says what is wrong with it."""
    names = set()
    for item in request.requests:
        if item.HasField("body"):
            names.add(item.body.fields["model"].string_value if "model" in item.body.fields else "")
            continue
        try:
            names.add(_decode_body(item.body_json.encode()).model)
        except (msgspec.DecodeError, RecursionError):
            continue
    return frozenset(names - {""})


def of_line(line: bytes) -> frozenset[str]:
    """The model of one line of a file; none of a line that is wrong."""
    try:
        return frozenset({_decode_line(line).body.model} - {""})
    except (msgspec.DecodeError, RecursionError):
        return frozenset()
