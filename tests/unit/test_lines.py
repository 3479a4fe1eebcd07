"""The line parser: what is right passes unchanged, what is wrong is named."""

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.lines import LineError, parse

MODELS = {"tiny"}
URLS = {"/v1/chat/completions", "/v1/embeddings"}
GOOD = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"model": "tiny", "messages": []}}


def refused(line: bytes) -> list[tuple[str, str]]:
    with pytest.raises(LineError) as caught:
        parse(line, "line 7", MODELS, URLS)
    return [(v.field, v.description) for v in caught.value.violations]


def changed(**fields: object) -> bytes:
    return json.dumps({k: v for k, v in (GOOD | fields).items() if v is not ...}).encode()


def test_body_is_kept_byte_for_byte() -> None:
    """The body reaches the engine exactly as it was given: spaces, number spelling and escapes included."""
    body = b'{ "model":"tiny", "seed": 12345678901234567890123, "t":1.0e-2 ,"x":"\\u0000\\ud83d\\ude00"}'
    line = b'{"custom_id":"a","url":"/v1/chat/completions","body":' + body + b"}"
    assert parse(line, "line 1", MODELS, URLS).body == body


@pytest.mark.parametrize(
    ("line", "field", "description"),
    [
        (b"{", "line 7", "not JSON"),
        (b"nonsense", "line 7", "not JSON"),
        (b'"\xff"', "line 7", "not UTF-8 at byte 1"),
        (b"[]", "line 7", "Expected `object`"),
        (changed(custom_id=...), "line 7: custom_id", "is required"),
        (changed(custom_id=5), "line 7: custom_id", "Expected `str`"),
        (changed(custom_id=""), "line 7: custom_id", "must not be empty"),
        (changed(custom_id="x" * 513), "line 7: custom_id", "at most 512"),
        (changed(custom_id="a\0"), "line 7: custom_id", "NUL"),
        (changed(url=...), "line 7: url", "is required"),
        (changed(url="/v1/nothing"), "line 7: url", "there are /v1/chat/completions, /v1/embeddings"),
        (changed(method="GET"), "line 7: method", "must be 'POST'"),
        (changed(body=...), "line 7: body", "is required"),
        (changed(body=[]), "line 7: body", "Expected `object`"),
        (changed(body={"model": "gpt-9"}), "line 7: body.model", "there are tiny"),
        (changed(body={"model": 3}), "line 7: body.model", "Expected `str`"),
        (changed(body={"model": "tiny", "stream": True}), "line 7: body.stream", "not streamed"),
        (changed(body=...)[:-1] + b',"body":{"a":NaN}}', "line 7", "not JSON"),
        (changed(body=...)[:-1] + b',"body":' + b"[" * 100_000 + b"}", "line 7", "nested too deeply"),
    ],
)
def test_wrong_lines_name_line_and_field(line: bytes, field: str, description: str) -> None:
    """Each kind of wrong line is refused with the line, the field and what is wrong with it."""
    [(found_field, found_description)] = refused(line)
    assert found_field == field
    assert description in found_description


def test_all_wrong_fields_of_a_line_are_named() -> None:
    """Somebody who fixes a line needs to be told once."""
    fields = [field for field, _ in refused(changed(custom_id="", url="x", body={"model": "y"}))]
    assert fields == ["line 7: custom_id", "line 7: url", "line 7: body.model"]


@given(st.binary(max_size=200))
def test_no_bytes_break_the_parser(line: bytes) -> None:
    """Whatever arrives is a parsed line or a LineError, never another exception."""
    with contextlib.suppress(LineError):
        assert parse(line, "line 1", MODELS, URLS).custom_id


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_any_json_in_a_body_passes_unchanged(value: object) -> None:
    """Parameters that we know nothing of are neither dropped nor altered."""
    body = json.dumps({"model": "tiny", "extra": value})
    line = json.dumps(GOOD | {"body": 0}).replace('"body": 0', f'"body": {body}').encode()
    assert parse(line, "line 1", MODELS, URLS).body == body.encode()
