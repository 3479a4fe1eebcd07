"""Protobuf messages made up from their descriptors: each field left out, plausible, at its limits or hostile."""

from collections.abc import Mapping, Sequence
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from hypothesis import strategies as st

# Values with which a message gets past the first check of its fields.
PLAUSIBLE = {
    "body_json": ["{}", '{"model": "tiny"}', '{"n": 1e999}'],
    "custom_id": ["a", "b", "c"],
    "data": [b'{"custom_id": "a", "url": "/v1/chat/completions", "body": {}}\n', b"{", b"\n"],
    "method": ["POST"],
    "url": ["/v1/chat/completions", "https://example.com/", "https://[fe80::1%25a]/"],
}
TEXTS = st.text(max_size=20) | st.sampled_from(["", "\0", "a\0b", "%", "😀", "x" * 1000, "x" * 50_000])
INTEGERS = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
    # Those of proto3 are open: any number is read.
    FieldDescriptor.CPPTYPE_ENUM: (-(2**31), 2**31 - 1),
}
# A Struct contains itself.
DEPTH = 4
NOTHING: Mapping[str, Sequence[str]] = {}


def methods(*files: Any) -> dict[str, MethodDescriptor]:
    """The methods of all services in these generated modules, by the path of their calls."""
    services = [service for file in files for service in file.DESCRIPTOR.services_by_name.values()]
    return {f"/{service.full_name}/{method.name}": method for service in services for method in service.methods}


def check_taken(args: Sequence[object]) -> None:
    """Fails for arguments that Postgres would refuse: text with NUL, and numbers beyond bigint."""
    for arg in args:
        assert not isinstance(arg, str) or "\0" not in arg
        assert not isinstance(arg, int) or -(2**63) <= arg < 2**63


def _one(field: FieldDescriptor, real: Mapping[str, Sequence[str]], depth: int) -> st.SearchStrategy[Any]:
    """Values of a field, of one element of a repeated one."""
    kind = field.cpp_type
    known: list[Any] = [*PLAUSIBLE.get(field.name, ()), *real.get(field.name, ())]
    if kind == FieldDescriptor.CPPTYPE_MESSAGE:
        return messages(field.message_type, real, depth - 1)
    if kind in INTEGERS:
        least, most = INTEGERS[kind]
        return st.integers(max(least, -1), 10) | st.sampled_from([least, most]) | st.integers(least, most)
    if kind == FieldDescriptor.CPPTYPE_STRING and field.type != FieldDescriptor.TYPE_BYTES:
        return st.sampled_from(known) | TEXTS if known else TEXTS
    if kind == FieldDescriptor.CPPTYPE_BOOL:
        return st.booleans()
    if kind in (FieldDescriptor.CPPTYPE_DOUBLE, FieldDescriptor.CPPTYPE_FLOAT):
        return st.floats(width=64 if kind == FieldDescriptor.CPPTYPE_DOUBLE else 32)
    return st.sampled_from(known) | st.binary(max_size=20) if known else st.binary(max_size=20)


@st.composite
def messages(
    draw: st.DrawFn, descriptor: Descriptor, real: Mapping[str, Sequence[str]] = NOTHING, depth: int = DEPTH
) -> Message:
    """Messages of this type. `real`: by the name of a field, values that mean something to the server."""
    made = GetMessageClass(descriptor)()
    chosen = {oneof.name: draw(st.sampled_from([*oneof.fields])).name for oneof in descriptor.oneofs}
    for field in descriptor.fields:
        if draw(st.integers(0, 3)) == 0 or (field.message_type and not depth):
            continue
        if field.containing_oneof and chosen[field.containing_oneof.name] != field.name:
            continue
        place = getattr(made, field.name)
        if field.message_type and field.message_type.GetOptions().map_entry:
            names, value = field.message_type.fields_by_name["key"], field.message_type.fields_by_name["value"]
            for key in draw(st.lists(_one(names, real, depth), max_size=3)):
                if value.message_type:
                    place[key].CopyFrom(draw(_one(value, real, depth)))
                else:
                    place[key] = draw(_one(value, real, depth))
        elif field.is_repeated:
            place.extend(draw(st.lists(_one(field, real, depth), max_size=3)))
        elif field.message_type:
            place.CopyFrom(draw(_one(field, real, depth)))
        else:
            setattr(made, field.name, draw(_one(field, real, depth)))
    return made


def damaged(given: bytes, cut: int, more: bytes) -> bytes:
    """The bytes of a message with `more` in place of some, from the byte `cut` on."""
    place = cut % (len(given) + 1)
    return given[:place] + more + given[place + len(more) :]


def payloads(descriptor: Descriptor, real: Mapping[str, Sequence[str]] = NOTHING) -> st.SearchStrategy[bytes]:
    """What may arrive as a message of this type: mostly one, some with bytes changed, some anything."""
    whole = messages(descriptor, real).map(lambda made: made.SerializeToString())
    changed = st.builds(damaged, whole, st.integers(0, 300), st.binary(min_size=1, max_size=3))
    return st.one_of(whole, whole, changed, st.binary(max_size=300))
