"""Writes docs/api.md from the comments in the proto files. Called by `scripts/gen-proto.sh`.

`python scripts/api_docs.py DESCRIPTORS OUTPUT`; protoc writes DESCRIPTORS with --include_source_info.
"""

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
    ServiceDescriptorProto,
)

# Field numbers in descriptor.proto: a path of them locates what a comment describes.
MESSAGE, ENUM, SERVICE, METHOD, FIELD, VALUE = 4, 5, 6, 2, 2, 2
HEAD = """# The contract

Made from the comments of `proto/vllm_batch/v1/` by `scripts/gen-proto.sh`; change those, not this. For use from Python
and the shell see [client.md](client.md), for errors [troubleshooting.md](troubleshooting.md).
"""


class Comments:
    """The comments of one file, by path."""

    def __init__(self, file: FileDescriptorProto) -> None:
        self._texts = {tuple(place.path): place.leading_comments for place in file.source_code_info.location}

    def lines(self, *path: int) -> list[str]:
        """Returns the comment's lines as written, without the space after the slashes."""
        return [line.removeprefix(" ").rstrip() for line in self._texts.get(path, "").rstrip("\n").split("\n")]

    def cell(self, *path: int) -> str:
        """Returns the comment on one line, for a table."""
        return " ".join(self.lines(*path)).replace("|", "\\|").strip()


def paragraphs(lines: list[str]) -> Iterator[str]:
    """Yields prose as it is, and indented text, such as a table of errors, as code."""
    in_code = False
    for line in lines:
        if line.startswith("  ") != in_code and line:
            yield "```text" if not in_code else "```"
            in_code = not in_code
        yield line
    if in_code:
        yield "```"


def service(comments: Comments, number: int, found: ServiceDescriptorProto) -> Iterator[str]:
    """Yields a service: its comment, and a section for each call."""
    yield f"## {found.name}\n"
    yield from paragraphs(comments.lines(SERVICE, number))
    for place, method in enumerate(found.method):
        takes, gives = method.input_type.rpartition(".")[2], method.output_type.rpartition(".")[2]
        streams = [("stream " if is_stream else "") for is_stream in (method.client_streaming, method.server_streaming)]
        yield f"\n### {method.name}\n"
        yield f"{streams[0]}[{takes}](#{takes.lower()}) → {streams[1]}[{gives}](#{gives.lower()})\n"
        yield from comments.lines(SERVICE, number, METHOD, place)


def message(comments: Comments, number: int, found: DescriptorProto) -> Iterator[str]:
    """Yields a message: its comment and a table of its fields."""
    yield f"\n### {found.name}\n"
    yield from comments.lines(MESSAGE, number)
    if found.field:
        yield "\n| field | type | |\n| --- | --- | --- |"
    for place, field in enumerate(found.field):
        about = comments.cell(MESSAGE, number, FIELD, place)
        if field.HasField("oneof_index"):
            about = f"One of `{found.oneof_decl[field.oneof_index].name}`. {about}"
        yield f"| `{field.name}` | {type_name(found, field)} | {about} |"


def type_name(owner: DescriptorProto, field: FieldDescriptorProto) -> str:
    """Returns a field's type as in the proto, with a link if this page describes it."""
    for nested in owner.nested_type:
        if nested.options.map_entry and field.type_name.endswith(f".{nested.name}"):
            key, value = (type_name(nested, part) for part in nested.field)
            return f"map of {key} to {value}"
    name = field.type_name.removeprefix(".").removeprefix("vllm_batch.v1.")
    if not name:
        name = f"`{FieldDescriptorProto.Type.Name(field.type).removeprefix('TYPE_').lower()}`"
    elif "." in name:
        name = f"`{name}`"
    else:
        name = f"[{name}](#{name.lower()})"
    return f"repeated {name}" if field.label == FieldDescriptorProto.LABEL_REPEATED else name


def enum(comments: Comments, number: int, found: EnumDescriptorProto) -> Iterator[str]:
    """Yields an enum: its comment and a table of its values."""
    yield f"\n### {found.name}\n"
    yield from comments.lines(ENUM, number)
    yield "\n| value | number | |\n| --- | --- | --- |"
    for place, value in enumerate(found.value):
        yield f"| `{value.name}` | {value.number} | {comments.cell(ENUM, number, VALUE, place)} |"


def page(files: Iterable[FileDescriptorProto]) -> Iterator[str]:
    """Yields the page: for each file its services, then its messages and enums."""
    yield HEAD
    for file in files:
        comments = Comments(file)
        for number, each_service in enumerate(file.service):
            yield from service(comments, number, each_service)
        yield f"\n## Messages of {file.name.rpartition('/')[2]}"
        for number, each_message in enumerate(file.message_type):
            yield from message(comments, number, each_message)
        for number, each_enum in enumerate(file.enum_type):
            yield from enum(comments, number, each_enum)
        yield ""


def main(descriptors: str, output: str) -> None:
    """Writes the page."""
    files = FileDescriptorSet.FromString(Path(descriptors).read_bytes()).file
    Path(output).write_text("\n".join(page(files)), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
