"""The models that a new batch names, as far as they can be known without reading all of it. Pure."""

import msgspec

from vllm_batch.v1 import batch_service_pb2 as pb


class _Body(msgspec.Struct):
    model: str | None = ""


class _Line(msgspec.Struct):
    body: _Body


_decode_body = msgspec.json.Decoder(_Body).decode
_decode_line = msgspec.json.Decoder(_Line).decode


def of_inline(request: pb.CreateBatchRequest) -> frozenset[str]:
    """All models that inline requests name. An invalid body names none: the worker reports what is wrong with it."""
    names: set[str | None] = set()
    for item in request.requests:
        if item.HasField("body"):
            names.add(item.body.fields["model"].string_value if "model" in item.body.fields else "")
            continue
        try:
            names.add(_decode_body(item.body_json.encode()).model)
        except (msgspec.DecodeError, RecursionError):
            continue
    return frozenset(name for name in names if name)


def of_line(line: bytes) -> frozenset[str]:
    """The model that one line of a file names; none if the line is invalid."""
    try:
        model = _decode_line(line).body.model
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return frozenset()
    return frozenset({model} if model else ())
