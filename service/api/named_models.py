"""The models that a new batch names, as far as they can be known without reading all of it. Pure."""

from collections.abc import Set
from dataclasses import dataclass

import msgspec

from vllm_batch.v1 import batch_service_pb2 as pb


class _Body(msgspec.Struct):
    model: str | None = ""


class _Line(msgspec.Struct):
    body: _Body


_decode_body = msgspec.json.Decoder(_Body).decode
_decode_line = msgspec.json.Decoder(_Line).decode


@dataclass(frozen=True)
class Named:
    """Models that requests of a batch name. `are_all`: each of its requests names one of them."""

    models: Set[str] = frozenset()
    are_all: bool = False


# Nothing is known of the batch.
ANY = Named()


def of_inline(request: pb.CreateBatchRequest) -> Named:
    """All models that inline requests name. An invalid body names none: the worker reports what is wrong with it."""
    names: set[str | None] = set()
    for item in request.requests:
        if item.HasField("body"):
            names.add(item.body.fields["model"].string_value if "model" in item.body.fields else "")
            continue
        try:
            names.add(_decode_body(item.body_json.encode()).model)
        except (msgspec.DecodeError, RecursionError):
            names.add(None)
    return Named(frozenset(name for name in names if name), all(names))


def of_line(line: bytes) -> str:
    """The model that one line of a file names; "" if it names none or is invalid."""
    try:
        return _decode_line(line).body.model or ""
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return ""
