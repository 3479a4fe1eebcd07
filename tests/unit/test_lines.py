"""The line parser: valid lines pass unchanged, errors name line and field."""

import bz2
import contextlib
import gzip
import json
import lzma
from dataclasses import replace

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.db.served import Served
from service.errors import ApiError
from service.worker.lines import LineError, format_of, parse
from service.worker.offer import Offer

MODELS = {"tiny"}
URLS = {"/v1/chat/completions", "/v1/embeddings"}
OFFER = Offer(MODELS, URLS)
GOOD = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"model": "tiny", "messages": []}}


def refused(line: bytes) -> list[tuple[str, str]]:
    with pytest.raises(LineError) as caught:
        parse(line, "line 7", OFFER)
    return [(v.field, v.description) for v in caught.value.violations]


def changed(**fields: object) -> bytes:
    return json.dumps({k: v for k, v in (GOOD | fields).items() if v is not ...}).encode()


def test_models_of_other_workers() -> None:
    """A line may name what another worker serves, with its endpoints; what is unknown is named with what is known."""
    offer = Offer(MODELS, {"/v1/chat/completions"}, Served({"embedder": frozenset({"/v1/embeddings"})}))
    there = changed(url="/v1/embeddings", body={"model": "embedder", "input": "x"})
    assert parse(there, "line 1", offer).model == "embedder"
    for url, model, field, description in (
        ("/v1/chat/completions", "embedder", "url", "is not served; available: /v1/embeddings"),
        ("/v1/embeddings", "tiny", "url", "is not served; available: /v1/chat/completions"),
        ("/v1/chat/completions", "big", "body.model", "'big' is not served; available: embedder, tiny"),
    ):
        with pytest.raises(LineError) as caught:
            parse(changed(url=url, body={"model": model}), "line 7", offer)
        [violation] = caught.value.violations
        assert violation.field == f"line 7: {field}"
        assert violation.description.endswith(description)
        assert caught.value.unknown_model == ("big" if model == "big" else "")


def test_models_that_are_away() -> None:
    """One that is away is refused for now if that is asked for; so is one that may come, and no other."""
    offer = Offer(MODELS, URLS, Served({"away": URLS, "there": URLS}, frozenset({"there"}), frozenset({"awaited"})))
    offer.check_live("away", "line 1")
    offer.check_coming("big", "line 1")
    strict = replace(offer, require_live=True)
    strict.check_live("tiny", "line 1")
    strict.check_live("there", "line 1")
    loading = replace(offer, others=Served(is_loading=True))
    for refusing, model, reason in (
        (lambda: strict.check_live("away", "line 7"), "away", "WORKER_OFFLINE"),
        (lambda: offer.check_coming("awaited", "line 7"), "awaited", "WORKER_OFFLINE"),
        (lambda: loading.check_coming("big", "line 7"), "big", "WORKER_LOADING"),
    ):
        with pytest.raises(ApiError, match=f"line 7: no worker .*{model}") as caught:
            refusing()
        assert caught.value.code is grpc.StatusCode.UNAVAILABLE
        assert (caught.value.reason, caught.value.metadata) == (reason, {"models": model})


def test_body_is_kept_byte_for_byte() -> None:
    """The body reaches the engine exactly as given, including spaces, number spelling and escapes."""
    body = b'{ "model":"tiny", "seed": 12345678901234567890123, "t":1.0e-2 ,"x":"\\u0000\\ud83d\\ude00"}'
    line = b'{"custom_id":"a","url":"/v1/chat/completions","body":' + body + b"}"
    assert parse(line, "line 1", OFFER).body == body


@pytest.mark.parametrize(
    ("line", "field", "description"),
    [
        (b"{", "line 7", "not JSON"),
        (b"nonsense", "line 7", "not JSON"),
        (b'"\xff"', "line 7", "not UTF-8 at byte 1"),
        (b"[]", "line 7", "Expected `object`"),
        (b'"good morning"', "line 7", "Expected `object`, got `str`"),
        (b"null", "line 7", "Expected `object`, got `null`"),
        (b"17", "line 7", "Expected `object`, got `int`"),
        (changed(custom_id=...), "line 7: custom_id", "is required"),
        (changed(custom_id=5), "line 7: custom_id", "Expected `str`"),
        (changed(custom_id=None), "line 7: custom_id", "Expected `str`, got `null`"),
        (changed(custom_id=""), "line 7: custom_id", "must not be empty"),
        (changed(custom_id="x" * 513), "line 7: custom_id", "at most 512"),
        (changed(custom_id="a\0"), "line 7: custom_id", "NUL"),
        (changed(url=...), "line 7: url", "is required"),
        (changed(url="/v1/nothing"), "line 7: url", "available: /v1/chat/completions, /v1/embeddings"),
        (changed(url="/chat/completions"), "line 7: url", "'/chat/completions' is not served; available: /v1/chat"),
        (changed(url="http://localhost:8000/v1/chat/completions"), "line 7: url", "is not served; available: /v1/chat"),
        (changed(url="/v1/chat/completions/"), "line 7: url", "'/v1/chat/completions/' is not served; available: /v1"),
        (changed(url="v1/chat/completions"), "line 7: url", "'v1/chat/completions' is not served; available: /v1/chat"),
        (changed(method="GET"), "line 7: method", "must be 'POST'"),
        (changed(body=...), "line 7: body", "is required"),
        (changed(body=[]), "line 7: body", "Expected `object`"),
        (changed(body="say hello"), "line 7: body", "Expected `object`, got `str`"),
        (changed(body=None), "line 7: body", "Expected `object`, got `null`"),
        (changed(body={"model": "gpt-9"}), "line 7: body.model", "available: tiny"),
        (changed(body={"model": 3}), "line 7: body.model", "Expected `str | null`"),
        (changed(body={"model": "tiny", "stream": True}), "line 7: body.stream", "not streamed"),
        (changed(body=...)[:-1] + b',"body":{"a":NaN}}', "line 7", "not JSON"),
        (changed(body=...)[:-1] + b',"body":' + b"[" * 100_000 + b"}", "line 7", "nested too deeply"),
    ],
)
def test_wrong_lines_name_line_and_field(line: bytes, field: str, description: str) -> None:
    """Each kind of invalid line is rejected, naming the line, the field and the problem."""
    [(found_field, found_description)] = refused(line)
    assert found_field == field
    assert description in found_description


@pytest.mark.parametrize("name", ["NaN", "Infinity", "-Infinity"])
@pytest.mark.parametrize(
    "around", ["%s", "[1, %s]", '{"a": %s, "b": 1}', '{"NaN": "Infinity", "x": {"y": [%s]}}', " %s "]
)
def test_what_is_no_number_in_json_is_called_by_its_name(name: str, around: str) -> None:
    """NaN and infinities, as Python writes them, are named in the error with the byte where they begin."""
    body = '{"model": "tiny", "top_p": ' + around % name + "}"
    line = b'{"custom_id": "NaN", "url": "/v1/chat/completions", "body": %s}' % body.encode()
    at = line.rindex(name.encode())
    expected = f"not JSON: {name} is no JSON number (byte {at}): use null, or leave it out"
    assert refused(line) == [("line 7", expected)]


@pytest.mark.parametrize("text", [b"nan", b"inf", b"NaNs", b"Infinit", b"None", b"+1", b".5", b"-"])
def test_what_only_looks_alike_is_not_called_so(text: bytes) -> None:
    """Text that only resembles NaN or Infinity gets the ordinary JSON error."""
    [(field, description)] = refused(changed(body=...)[:-1] + b',"body":{"a":' + text + b"}}")
    assert (field, "no JSON number" in description) == ("line 7", False)
    assert description.startswith("not JSON: ")


@pytest.mark.parametrize("half", [r"\ud83d", r"\uDBFF", r"\udc00", r"\uDFFF", r"\ud83d\ud83d"])
@pytest.mark.parametrize(
    "around", ["%s", "x%s", r"\\%s", r"\ud83d\ude00%s", "%s and more text behind it", r"%s\u0041", r"\n%s\n"]
)
@pytest.mark.parametrize("place", ["body", "key", "custom_id"])
def test_half_a_character_is_called_so(half: str, around: str, place: str) -> None:
    """A surrogate without its other half, as a cut text has it, is named with its byte wherever it stands."""
    text = around % half
    body = {"body": f'{{"a": "{text}"}}', "key": f'{{"{text}": 1}}'}.get(place, "{}")
    custom_id = text if place == "custom_id" else "a"
    line = f'{{"custom_id": "{custom_id}", "url": "/v1/chat/completions", "body": {body}}}'.encode()
    at = line.index(text.encode()) + around.index("%s")
    what = f"not JSON: {half[:6]} (byte {at}) is half of a character, whose other half is missing"
    assert refused(line) == [("line 7", what)]


@pytest.mark.parametrize("text", [b'"abc', b'"\\\\ud83d', b'"\\ud83d\\ude00', b'"\\ud8', b'"\\u', b'"\\', b"["])
def test_a_line_that_ends_early_has_no_half_characters(text: bytes) -> None:
    """A truncated line is called truncated, also where text in it only looks like half a character."""
    [(_, description)] = refused(changed(body=...)[:-1] + b',"body":{"a":' + text)
    assert "truncated" in description


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("\ufeff{}", r"invalid character '\ufeff' (byte 0)"),
        ("\x1e{}", r"invalid character '\x1e' (byte 0)"),
        ("# a comment", "invalid character '#' (byte 0)"),
        ("\0\0\0", r"invalid character '\x00' (byte 0)"),
        ('{"a":\u00a01}', r"invalid character '\xa0' (byte 5)"),
        (changed().decode() + "{}", f"trailing characters '{{' (byte {len(changed())})"),
        (changed().decode() + ",", f"trailing characters ',' (byte {len(changed())})"),
        (changed().decode() + " \U0001f680", rf"trailing characters '\U0001f680' (byte {len(changed()) + 1})"),
        ("\u201ca\u201d", r"invalid character '\u201c' (byte 0)"),
    ],
)
def test_what_stands_where_it_cannot_is_shown(line: str, told: str) -> None:
    """A character that JSON cannot have there is named, with its code where it is invisible or not ASCII."""
    assert refused(line.encode()) == [("line 7", f"not JSON: JSON is malformed: {told}")]


def test_an_object_over_several_lines() -> None:
    """Its first line is called truncated, with what to do."""
    told = "not JSON: Input data was truncated: each request must be whole on its line"
    assert refused(b"{") == refused(b'{"custom_id": "a",') == [("line 7", told)]


@pytest.mark.parametrize("model", [None, ""])
def test_a_model_that_is_nothing_is_missing(model: str | None) -> None:
    """A null or empty model counts as absent, as in vLLM and its run_batch, and the body is unchanged."""
    parsed = parse(changed(body={"model": model, "messages": []}), "line 1", OFFER)
    assert parsed.model is None
    assert json.loads(parsed.body) == {"model": model, "messages": []}


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (gzip.compress(b"{}", mtime=0), "compressed with gzip"),
        (bz2.compress(b"{}"), "compressed with bzip2"),
        (lzma.compress(b"{}"), "compressed with xz"),
        (b"\x28\xb5\x2f\xfd\x20", "compressed with zstd"),
        (b"\x50\x2a\x4d\x18\x04\0\0\0", "compressed with zstd"),
        (b"\x5f\x2a\x4d\x18\x04\0\0\0", "compressed with zstd"),
        (b"\x04\x22\x4d\x18\x64", "compressed with lz4"),
        (b"\x1f\x9d\x90", "compressed with compress"),
        (b"7z\xbc\xaf\x27\x1c\0", "a 7z archive"),
        (b"ARROW1\0\0", "an Arrow file"),
        (b"SQLite format 3\0", "an SQLite database"),
        (b"%PDF-1.7", "a PDF"),
        (b"PK\x03\x04", "a zip archive"),
        (b"PAR1", "a Parquet file"),
        ("{}".encode("utf-16"), "UTF-16"),
        (b"\xfe\xff\0{", "UTF-16"),
        *(("{}\n".encode(f"utf-16-{order}"), "UTF-16") for order in ("le", "be")),
        *(("{}\n".encode(f"utf-32{order}"), "UTF-32") for order in ("", "-le", "-be")),
        (b"\0\0\xfe\xff\0\0\0{", "UTF-32"),
        (b'[{"custom_id": "a"}]', "a JSON array"),
        (b"[", "a JSON array"),
        (b"<!DOCTYPE html>", "HTML or XML"),
        (b"version https://git-lfs.github.com/spec/v1", "a pointer of Git LFS, without the file that it stands for"),
        (b'{"a":{}}\r{"a":{}}\r', "text whose lines end with a carriage return alone"),
        (b'{"a":"}\\r{"}\r', None),
        (b"{", None),
        (b"", None),
        (b" \n{", None),
        (b"\xef\xbb\xbf{", None),
    ],
)
def test_a_file_of_another_format_is_known(data: bytes, name: str | None) -> None:
    """Files of other formats are recognized by their first line."""
    assert format_of(data) == name


def test_all_wrong_fields_of_a_line_are_named() -> None:
    """All invalid fields of a line are reported at once."""
    fields = [field for field, _ in refused(changed(custom_id="", url="x", body={"model": "y"}))]
    assert fields == ["line 7: custom_id", "line 7: url", "line 7: body.model"]


@given(st.binary(max_size=200))
def test_no_bytes_break_the_parser(line: bytes) -> None:
    """Any bytes give a parsed line or a LineError, never another exception."""
    with contextlib.suppress(LineError):
        assert parse(line, "line 1", OFFER).custom_id


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_any_json_in_a_body_passes_unchanged(value: object) -> None:
    """Parameters unknown to us are neither dropped nor altered."""
    body = json.dumps({"model": "tiny", "extra": value})
    line = json.dumps(GOOD | {"body": 0}).replace('"body": 0', f'"body": {body}').encode()
    assert parse(line, "line 1", OFFER).body == body.encode()
