"""What the HTTP door decides: ranges, statuses of errors, codes of wrong lines, ids, windows, names in certificates."""

import asyncio
import json
import re
from itertools import pairwise
from typing import Any

import grpc
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError
from python_multipart.multipart import parse_options_header
from starlette.requests import Request

from service.api import messages
from service.errors import ApiError, Violation, database_unavailable, invalid, not_found
from service.http import certified, door, errors, multipart, objects, ranges
from service.worker import wrong_lines

SIZE = 1000


@pytest.mark.parametrize(
    ("header", "found"),
    [
        (None, None),
        ("bytes=0-0", (0, 1)),
        ("bytes=5-", (5, SIZE)),
        ("bytes=990-5000", (990, SIZE)),
        ("bytes=-10", (990, SIZE)),
        ("bytes=-5000", (0, SIZE)),
        ("Bytes = 1 - 2", (1, 3)),
        ("bytes=5-4", None),
        ("bytes=0-1,5-6", None),
        ("lines=0-1", None),
        ("bytes=-", None),
        ("bytes=1", None),
        ("bytes=" + "9" * 30 + "-", None),
    ],
)
def test_range(header: str | None, found: tuple[int, int] | None) -> None:
    """One range is answered as asked; what is no single range is answered with the whole file."""
    assert ranges.asked(header, SIZE) == found


RANGES = st.text("bytes=-0123456789, \xb2", max_size=25) | st.builds(
    "bytes={}-{}".format, st.just("") | st.integers(0, 2000), st.just("") | st.integers(0, 2000)
)


@given(RANGES, st.integers(0, 1500))
def test_any_range(header: str, size: int) -> None:
    """Whatever is asked for, the answer has bytes of the file, or all of it; only what begins behind it is refused."""
    first, _, last = header.removeprefix("bytes=").partition("-")
    is_range = re.fullmatch(r"bytes=\d{1,18}-(\d{1,18})?|bytes=-\d{1,18}", header, re.ASCII) is not None
    try:
        found = ranges.asked(header, size)
    except ranges.UnsatisfiableError:
        assert not is_range or (int(first) >= size if first else not size or not int(last))
        return
    if found is None:
        assert not is_range or (first and last and int(last) < int(first))
        return
    begin, end = found
    assert 0 <= begin < end <= size
    if is_range and first:
        assert found == (int(first), min(size, int(last) + 1) if last else size)
    elif is_range:
        assert found == (max(0, size - int(last)), size)


CONTENTS = st.lists(
    st.sampled_from([b"\r", b"\n", b"\r\n", b"-", b"--", b"\r\n--ab", b"--abc", b"\r\n--abd", b"a", b"\0", b"\xff"]),
    max_size=8,
).map(b"".join)
NAMED = st.text(st.characters(exclude_characters='"\\;', exclude_categories=["Cc", "Cs"]), min_size=1, max_size=10)


def fields(pieces: list[bytes], content_type: str = "multipart/form-data; boundary=abc") -> list[Any]:
    """What a form that arrives in these pieces has: name, file name and content of each field."""
    arriving = iter([*({"type": "http.request", "body": piece, "more_body": True} for piece in pieces)])

    async def receive() -> Any:
        return next(arriving, {"type": "http.request", "body": b"", "more_body": False})

    async def read() -> list[Any]:
        found, content = [], b""
        scope = {"type": "http", "headers": [(b"content-type", content_type.encode("latin-1"))]}
        async for field, data in multipart.fields(Request(scope, receive)):
            content += data or b""
            if data is None:
                found.append((field.name, field.filename, content))
                content = b""
        return found

    return asyncio.run(read())


@given(
    st.lists(st.tuples(NAMED, st.none() | NAMED, CONTENTS), max_size=4),
    st.lists(st.integers(0, 400), max_size=8),
    st.booleans(),
)
def test_any_form_in_pieces_of_any_size(
    parts: list[tuple[str, str | None, bytes]], cuts: list[int], is_each_byte: bool
) -> None:
    """However a form is split on its way, its fields and files are what was sent, byte for byte."""
    assume(not any(b"\r\n--abc" in b"\r\n" + content for *_, content in parts))
    data = b""
    for name, filename, content in parts:
        named = f'; filename="{filename}"' if filename is not None else ""
        data += b"--abc\r\n" + f'Content-Disposition: form-data; name="{name}"{named}\r\n\r\n'.encode()
        data += content + b"\r\n"
    data += b"--abc--\r\n"
    places = sorted({0, len(data), *(range(len(data)) if is_each_byte else (cut for cut in cuts if cut < len(data)))})
    assert fields([data[begin:end] for begin, end in pairwise(places)]) == parts


FORM_PIECES = st.sampled_from(
    [
        *(
            b"--abc",
            b"--abc--",
            b"\r\n",
            b"\r\n\r\n",
            b"Content-Disposition: ",
            b"form-data",
            b"; ",
            b'name="a"',
            b"name",
        ),
        *(
            b"=",
            b'"',
            b"\\",
            b"filename=",
            b"filename*=",
            b"utf-8''%ff",
            b"iso-8859-1''%E9",
            b"filename*0=",
            b"*",
            b":",
        ),
        *(b"\0", b"\xff", b"Content-Type: x", b"Content-Transfer-Encoding: base64", b"x" * 20_000, b"a"),
    ]
)


@given(
    st.lists(FORM_PIECES, max_size=14),
    st.sampled_from(["", "multipart/form-data", "multipart/form-data; boundary=", "MULTIPART/Form-Data;Boundary=abc"])
    | st.just("multipart/form-data; boundary=abc")
    | st.text(st.characters(max_codepoint=255, exclude_categories=["Cc"]), max_size=20).map(
        "multipart/form-data; boundary={}".format
    ),
)
def test_what_is_no_form(pieces: list[bytes], content_type: str) -> None:
    """Any bytes are read as a form, or refused in words."""
    refusal = None
    try:
        fields(pieces, content_type)
    except ApiError as error:
        refusal = error
    if refusal is not None:
        assert refusal.code is grpc.StatusCode.INVALID_ARGUMENT
        assert refusal.violations[0].field in ("body", "content-type")


@pytest.mark.parametrize("header", ["bytes=1000-", "bytes=1000-2000", "bytes=-0"])
def test_range_behind_the_end(header: str) -> None:
    """Who has the whole file already is told that there is no more."""
    with pytest.raises(ranges.UnsatisfiableError):
        ranges.asked(header, SIZE)
    with pytest.raises(ranges.UnsatisfiableError):
        ranges.asked("bytes=-1", 0)


@pytest.mark.parametrize(
    ("error", "status", "kind", "param", "code"),
    [
        (invalid([Violation("limit", "is 0")]), 400, "invalid_request_error", "limit", None),
        (not_found("file"), 404, "invalid_request_error", None, "not_found"),
        (
            ApiError(grpc.StatusCode.UNAUTHENTICATED, "", "TOKEN_WRONG"),
            401,
            "invalid_request_error",
            None,
            "invalid_api_key",
        ),
        (
            ApiError(grpc.StatusCode.PERMISSION_DENIED, "", "ROLE_MISSING"),
            403,
            "permission_error",
            None,
            "role_missing",
        ),
        (
            ApiError(grpc.StatusCode.RESOURCE_EXHAUSTED, "", "RATE_LIMITED", retry_delay_s=0.2),
            *(429, "rate_limit_error", None, "rate_limited"),
        ),
        (
            ApiError(grpc.StatusCode.RESOURCE_EXHAUSTED, "", "LIMIT_REACHED"),
            413,
            "invalid_request_error",
            None,
            "limit_reached",
        ),
        (database_unavailable("gone"), 503, "server_error", None, "database_unavailable"),
        (ApiError(grpc.StatusCode.INTERNAL, ""), 500, "server_error", None, None),
    ],
)
def test_error(error: ApiError, status: int, kind: str, param: str | None, code: str | None) -> None:
    """Each error has the status and the object by which OpenAI's clients know what to do."""
    body = errors.body_of(error)["error"]
    assert (errors.status_of(error), body["type"], body["param"], body["code"]) == (status, kind, param, code)
    assert set(body) == {"message", "type", "param", "code"}


def test_when_to_try_again() -> None:
    """A delay is given in both forms that SDKs read, rounded up to seconds in the one."""
    limited = ApiError(grpc.StatusCode.RESOURCE_EXHAUSTED, "", "RATE_LIMITED", retry_delay_s=0.2)
    assert errors.headers_of(limited) == {"retry-after": "1", "retry-after-ms": "200"}
    assert errors.headers_of(not_found("file")) == {}


@pytest.mark.parametrize(
    ("violation", "code", "line", "param"),
    [
        (Violation("line 3", "not JSON: x"), "invalid_json_line", 3, None),
        (Violation("line 3: body", "not JSON: x"), "invalid_json_line", 3, "body"),
        (Violation("line 4: custom_id", "is required"), "missing_required_parameter", 4, "custom_id"),
        (
            Violation("line 5: custom_id", "'a' is already used by an earlier request"),
            "duplicate_custom_id",
            5,
            "custom_id",
        ),
        (Violation("line 6: url", "'/x' is not served"), "invalid_url", 6, "url"),
        (Violation("line 7: body.model", "'x' is not served"), "model_not_found", 7, "body.model"),
        (Violation("line 7: body.model", "Expected `str | null`, got `int`"), "invalid_value", 7, "body.model"),
        (Violation("line 8: method", "must be 'POST'"), "invalid_method", 8, "method"),
        (Violation("line 9: custom_id", "must not be empty"), "invalid_value", 9, "custom_id"),
        (Violation("requests", "must contain at least one request"), "empty_file", None, "file"),
        (Violation("file", "is compressed with gzip"), "invalid_file", None, "file"),
    ],
)
def test_wrong_line(violation: Violation, code: str, line: int | None, param: str | None) -> None:
    """Each wrong line is told with a code, its number and its field."""
    [found] = wrong_lines.errors_of(invalid([violation]))
    assert (found["code"], found["line"], found["param"]) == (code, line, param)
    assert found["message"]


def test_line_that_is_too_long() -> None:
    """A limit that a line is over names that line."""
    error = ApiError(grpc.StatusCode.RESOURCE_EXHAUSTED, "bytes of line 7: 99, at most 5 are allowed", "LIMIT_REACHED")
    assert wrong_lines.errors_of(error) == [
        {"code": "limit_reached", "line": 7, "message": error.message, "param": None}
    ]


def test_wrong_line_with_anything_in_it() -> None:
    """What a file has in it can be told, whatever it is."""
    [found] = wrong_lines.errors_of(invalid([Violation("line 1: a\0b", "is \udc80\0")]))
    assert (found["param"], found["message"]) == ("ab", "ab is ?")


@pytest.mark.parametrize("kind", ["input", "output", "error"])
def test_ids_of_files(kind: str) -> None:
    """An id says which file it is, and what is no id is a 404."""
    name = objects.file_name(kind, 12)  # type: ignore[arg-type]
    assert objects.file_of(name) == (kind, 12)
    for wrong in (name + "x", "file-", "file-" + "1" * 30, "batch_12", "", "file-٣"):
        with pytest.raises(ApiError):
            objects.file_of(wrong)


def test_windows() -> None:
    """24h as OpenAI has it, and other times as a client of one's own server needs them."""
    assert objects.window_s("24h") == 86_400
    assert objects.window_s("7d") == 7 * 86_400
    for wrong in ("", "24", "0h", "367d", "-1h", "24hours", "1.5h"):
        with pytest.raises(ApiError):
            objects.window_s(wrong)


SUBJECT = ((("organizationName", "Example"),), (("commonName", "ci"),))


@pytest.mark.parametrize(
    ("peer", "found"),
    [
        ({}, ()),
        ({"subject": SUBJECT}, (b"ci",)),
        ({"subject": SUBJECT, "subjectAltName": (("DNS", "ci.test"), ("IP Address", "::1"))}, (b"ci.test", b"::1")),
        ({"subject": SUBJECT, "subjectAltName": (("DirName", ((("commonName", "x"),),)),)}, (b"ci",)),
    ],
)
def test_identities_in_a_certificate(peer: dict[str, object], found: tuple[bytes, ...]) -> None:
    """As gRPC has them: the alternative names, and the common name only if there are none."""
    assert certified.identities(peer) == found


@pytest.mark.parametrize(
    ("disposition", "name"),
    [
        ("form-data; name=file", None),
        ('form-data; name="file"; filename=""', ""),
        ('form-data; name="file"; filename="a b.jsonl"', "a b.jsonl"),
        ('form-data; name="file"; filename="été.jsonl"', "été.jsonl"),
        ("form-data; name=file; filename*=UTF-8''%e2%82%ac%20rates.jsonl", "€ rates.jsonl"),
        ("form-data; name=file; filename=\"EURO\"; filename*=utf-8'en'%E2%82%AC", "€"),
        ("form-data; name=file; filename*=UTF-8''%E2%82%AC; filename=EURO", "€"),
        ("form-data; name=file; FileName* = iso-8859-1''%A3", "£"),
        ("form-data; name=file; filename*=UTF-8''%FF", "\N{REPLACEMENT CHARACTER}"),
        ("form-data; name=file; filename=x; filename*=koi8-r''%C1", "x"),
        ('form-data; name="file"; filename="; filename*=UTF-8\'\'x"', "; filename*=UTF-8''x"),
        ('form-data; name="file"; filename="a\\"; filename*=UTF-8\'\'x"', "a\"; filename*=UTF-8''x"),
    ],
)
def test_names_of_files(disposition: str, name: str | None) -> None:
    """A file's name is read in both forms that clients send it in."""
    given = disposition.encode()
    assert multipart.filename_of(given, parse_options_header(given)[1]) == name


@pytest.mark.parametrize(
    ("error", "content_type", "param", "message"),
    [
        ({"type": "json_invalid", "loc": ("body", 101), "msg": "JSON decode error"}, "application/json", "body", "101"),
        ({"type": "missing", "loc": ("body",), "msg": "Field required"}, "application/json", "body", "is required"),
        (
            {"type": "model_attributes_type", "loc": ("body",), "msg": "?"},
            "application/x-www-form-urlencoded",
            "content-type",
            "application/json",
        ),
        ({"type": "model_attributes_type", "loc": ("body",), "msg": "?"}, "", "content-type", "application/json"),
        ({"type": "model_attributes_type", "loc": ("body",), "msg": "?"}, "Application/JSON; a=b", "body", "object"),
        ({"type": "model_attributes_type", "loc": ("body",), "msg": "?"}, "application/a+json", "body", "object"),
        ({"type": "missing", "loc": ("body", "endpoint"), "msg": "Field required"}, "", "endpoint", "Field required"),
        ({"type": "int_parsing", "loc": ("query", "limit"), "msg": "no integer"}, "", "limit", "no integer"),
    ],
)
def test_what_is_wrong_with_a_body(error: dict[str, object], content_type: str, param: str, message: str) -> None:
    """A body that is no JSON object, or is sent as something else, is told so; never a number for a field's name."""
    found = json.loads(door.of_validation([error], content_type).body)["error"]
    assert found["param"] == param
    assert found["message"].startswith(f"{param}: ")
    assert message in found["message"]


@pytest.mark.parametrize(
    ("kind", "given", "param"),
    [
        (objects.CreateBatch, {"input_file_id": "f", "endpoint": "e", "completion_window": "24h"}, "metdata"),
        (objects.CreateUpload, {"bytes": 1, "filename": "f", "mime_type": "m", "purpose": "batch"}, "mime"),
        (objects.CompleteUpload, {"part_ids": []}, "md6"),
        (objects.ExpiresAfter, {"anchor": "created_at", "seconds": 3600}, "second"),
    ],
)
def test_unknown_parameters(kind: type[BaseModel], given: dict[str, object], param: str) -> None:
    """A parameter that is not known, such as a misspelt one, is refused by its name, never left out silently."""
    kind.model_validate(given)
    with pytest.raises(ValidationError) as raised:
        kind.model_validate(given | {param: "x"})
    found = json.loads(door.of_validation(raised.value.errors(), "application/json").body)["error"]
    assert found == {
        "message": f"Unknown parameter: '{param}'.",
        "type": "invalid_request_error",
        "param": param,
        "code": "unknown_parameter",
    }


@pytest.mark.parametrize(
    ("path", "plain"),
    [
        ("/v1/files", "/v1/files"),
        ("/v1/files/", "/v1/files"),
        ("//v1/files", "/v1/files"),
        ("/v1//files//file-1///content//", "/v1/files/file-1/content"),
        ("/v1/", "/v1"),
        ("/", "/"),
        ("//", "/"),
        ("", "/"),
        ("/healthz/", "/healthz"),
        ("//page//api/session", "/page/api/session"),
    ],
)
def test_slashes_in_paths(path: str, plain: str) -> None:
    """Doubled slashes and one at the end make no difference, and nothing else is changed."""
    assert door.plain_path(path) == plain


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb", "\0"])
def test_metadata_that_cannot_be_stored(text: str) -> None:
    """NUL and half of a character are refused by their name, in keys and values, not by Postgres."""
    for metadata in ({"k": text}, {text: "v"}):
        [violation] = messages.wrong_metadata(metadata, "metadata")
        assert violation.field.startswith("metadata[")
    assert not messages.wrong_metadata({"k": "😀 é"}, "metadata")
