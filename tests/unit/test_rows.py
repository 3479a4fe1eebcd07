"""Files of any line endings, encoding and size become rows for COPY, wherever they are split into pieces."""

import contextlib
import json
import re
from collections.abc import Iterable, Sequence
from itertools import pairwise

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.errors import ApiError
from service.worker.intake import Rows, Sizes, inline_lines
from service.worker.offer import Offer
from vllm_batch.v1 import batch_service_pb2

URL = "/v1/chat/completions"
ANY = Sizes(1_000_000, 1 << 20, 1 << 30)
ENDINGS = st.sampled_from([b"\n", b"\r\n", b" \n", b"\t\r\n", b"\r\r\n"])
BLANKS = st.lists(st.sampled_from([b"\n", b"\r\n", b"  \n", b"\r\r\n", b"\v\f\n"]), max_size=3).map(b"".join)
# What str.splitlines takes for the end of a line, and JSON for a character.
NO_ENDINGS = st.text("\x85\u2028\u2029a", max_size=4)
CUTS = st.lists(st.integers(0, 5000), max_size=8)
ENCODINGS = (
    *("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1", "cp1252", "cp437", "koi8-r"),
    *("shift_jis", "euc_jp", "euc_kr", "gb18030", "big5", "iso2022_jp", "utf-7", "cp037"),
)
NUMBER = r"-?(0|[1-9][0-9]{0,40})(\.[0-9]{1,40})?([eE][+-]?[0-9]{1,8})?"


def line(custom_id: str, body: str = "{}") -> bytes:
    return f'{{"custom_id": {json.dumps(custom_id)}, "url": "{URL}", "body": {body}}}'.encode()


def pieces(data: bytes, cuts: Iterable[int]) -> list[bytes]:
    places = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    return [data[begin:end] for begin, end in pairwise(places)]


def fed(data: bytes, cuts: Iterable[int] = (), sizes: Sizes = ANY) -> tuple[Rows, list[Sequence[bytes]]]:
    """Returns what Postgres reads from the rows: number, custom_id and body. Raises ApiError."""
    rows = Rows(7, Offer({"tiny"}, {URL}), sizes)
    copied = b"".join(rows.feed(piece) for piece in pieces(data, cuts)) + rows.end()
    assert b"\r" not in copied
    columns = [row.split(b"\t") for row in copied.split(b"\n")[:-1]]
    assert all(row[0] == b"7" and row[3] == URL.encode() and len(row) == 8 for row in columns)
    return rows, [(row[1], unescaped(row[2]), unescaped(row[4])) for row in columns]


def unescaped(field: bytes) -> bytes:
    """As Postgres reads a field of COPY's text format."""
    kept = {b"t": b"\t", b"n": b"\n", b"r": b"\r"}
    return re.sub(rb"\\(.)", lambda found: kept.get(found[1], found[1]), field, flags=re.DOTALL)


@given(st.lists(st.tuples(BLANKS, NO_ENDINGS, ENDINGS), min_size=1, max_size=8), BLANKS, st.booleans(), CUTS)
def test_line_endings(given: list[tuple[bytes, str, bytes]], after: bytes, is_ended: bool, cuts: list[int]) -> None:
    """Any line endings, blank lines and no last line break: one request per line, in order, with its line number."""
    data, places = b"", []
    for number, (before, text, ending) in enumerate(given):
        data += before
        places.append(data.count(b"\n") + 1)
        data += line(f"c{number}", f'{{"x": "{text}"}}') + ending
    data = data + after if is_ended else data[: -len(given[-1][2])]
    rows, found = fed(data, cuts)
    assert [(int(row[0]), row[1]) for row in found] == [(i, f"c{i}".encode()) for i in range(len(given))]
    assert [rows.place_of_row(number + 1) for number in range(rows.total)] == [f"line {place}" for place in places]


@pytest.mark.parametrize("indent", [None, 2, "\t"])
@pytest.mark.parametrize("before", [b"", b"5\n", line("a") + b"\n\n5\n"])
def test_pretty_printed_json(before: bytes, indent: int | str | None) -> None:
    """An object over several lines is one error, beside those of the lines before it."""
    pretty = json.dumps(json.loads(line("b")), indent=indent).encode().replace(b"\n", b"\r\n")
    with pytest.raises(ApiError) as refused:
        fed(before + pretty + b"\n" + pretty + b"\n6\n")
    found = [(violation.field, "pretty-printed" in violation.description) for violation in refused.value.violations]
    first = before.count(b"\n") + 1
    wrong = [(f"line {first - 1}", False)] * (before != b"")
    # On one line each, they are two requests of one name.
    others = [(f"line {first + 1}: custom_id", False), (f"line {first + 2}", False)]
    assert found == [*wrong, *([(f"line {first}", True)] if indent else others)]


# With what COPY's text format has a meaning for.
NAMES = st.text(max_size=30) | st.text("\r\n\t\\N.a\x7f\u2028", max_size=10)


@given(st.lists(NAMES, min_size=1, max_size=5), st.booleans(), CUTS)
def test_any_text(texts: list[str], is_ascii: bool, cuts: list[int]) -> None:
    """Names and bodies of any text reach Postgres byte for byte."""
    names = [f"{number}{text}".replace("\0", "") for number, text in enumerate(texts)]
    bodies = [json.dumps({"x": text}, ensure_ascii=is_ascii) for text in texts]
    data = b"\n".join(line(name, body) for name, body in zip(names, bodies, strict=True))
    _, found = fed(data, cuts)
    assert [(row[1], row[2]) for row in found] == [
        (name.encode(), body.encode()) for name, body in zip(names, bodies, strict=True)
    ]


# What some encodings write and read as something else.
ONE_WAY = "\xa5\u203e\x1b\u3164"
# Text that an encoding has: of any text most encodings lack a character.
ENCODED = st.sampled_from(ENCODINGS).flatmap(
    lambda encoding: st.tuples(
        st.just(encoding),
        st.text(st.characters(codec=encoding, exclude_categories=["Cs"], exclude_characters=ONE_WAY), max_size=30),
    )
)


@given(ENCODED, CUTS)
def test_any_encoding(given: tuple[str, str], cuts: list[int]) -> None:
    """A file that is not valid UTF-8 is refused; the bytes of any other are stored unchanged."""
    encoding, text = given
    data = line("a", json.dumps({"x": text}, ensure_ascii=False)).decode().encode(encoding)
    try:
        _, found = fed(data, cuts)
    except ApiError:
        assert encoding not in ("utf-8", "utf-8-sig")
        return
    assert found[0][2] in data
    assert json.loads(found[0][2]) == json.loads(data.decode("utf-8-sig"))["body"]


@given(st.integers(0, 3000), st.integers(-1, 1), CUTS)
def test_sizes(more: int, over: int, cuts: list[int]) -> None:
    """Exactly the limit of bytes or requests is accepted; one more is refused with the limit."""
    one = line("a", json.dumps({"x": "x" * more}))
    data = one + b"\n" + line("b")
    for sizes, size, limit in (
        (Sizes(9, len(one) - over, 1 << 20), len(one), len(one) - over),
        (Sizes(9, 1 << 20, len(data) - over), len(data), len(data) - over),
        (Sizes(2 - over, 1 << 20, 1 << 20), 2, 2 - over),
    ):
        if size <= limit:
            assert fed(data, cuts, sizes)[0].total == 2
            continue
        with pytest.raises(ApiError, match=str(limit)) as caught:
            fed(data, cuts, sizes)
        assert caught.value.code.name == "RESOURCE_EXHAUSTED"


@given(st.from_regex(NUMBER, fullmatch=True), CUTS)
def test_numbers(number: str, cuts: list[int]) -> None:
    """Numbers of any size, precision and spelling are stored as written."""
    body = f'{{"n": {number}, "m": [{number}]}}'
    assert fed(line("a", body), cuts)[1][0][2] == body.encode()


@given(
    st.text("0123456789+-.eE_xINaf", min_size=1, max_size=12)
    | st.lists(
        st.sampled_from([*"+-.0", "NaN", "Infinity", "nan", "inf", "1e5", "0x1", "²", "٣", "\u2212"]), min_size=1
    )
    .filter(lambda parts: len(parts) < 5)
    .map("".join)
)
def test_what_is_no_number(text: str) -> None:
    """Anything that only looks like a number is refused as invalid JSON, with its line."""
    with contextlib.nullcontext() if re.fullmatch(NUMBER, text) else pytest.raises(ApiError) as caught:
        fed(line("a", f'{{"n": {text}}}'))
    if caught is not None:
        [violation] = caught.value.violations
        assert violation.field == "line 1"
        assert violation.description.startswith("not JSON")


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("nested", [False, True])
def test_a_number_that_json_lacks_in_a_structure_is_the_requests_fault(number: float, nested: bool) -> None:
    """NaN and Infinity, which a body given as a structure can have, make the request invalid and are named."""
    asked = batch_service_pb2.CreateBatchRequest()
    asked.requests.add(custom_id="a", url=URL).body["temperature"] = 1.0
    asked.requests.add(custom_id="b", url=URL).body["temperature"] = {"inner": [number]} if nested else number
    with pytest.raises(ApiError) as raised:
        inline_lines(asked)
    assert raised.value.code is grpc.StatusCode.INVALID_ARGUMENT
    [violation] = raised.value.violations
    assert violation.field == "requests[1]: body"
    assert "NaN and Infinity" in violation.description


def test_inline_bodies_are_refused_as_lines_are() -> None:
    """One that is nested too deeply is called so although it is JSON, and no more than 20 are told of."""
    asked = batch_service_pb2.CreateBatchRequest()
    for number in range(30):
        asked.requests.add(custom_id=f"c{number}", url=URL, body_json='{"x": ' + "[" * 100_000 + "]" * 100_000 + "}")
    with pytest.raises(ApiError) as raised:
        inline_lines(asked)
    told = [(violation.field, violation.description) for violation in raised.value.violations]
    assert told == [(f"requests[{number}]: body_json", "nested too deeply") for number in range(20)]
