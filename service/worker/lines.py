"""Parses and checks the lines of a batch: JSON in OpenAI's batch format. Pure."""

import re
from contextlib import suppress
from typing import Any

import msgspec

from service.errors import Violation
from service.worker import estimates, prefixes
from service.worker.offer import Offer

MAX_CUSTOM_ID = 512
# Digits that are read of a number of tokens: more than any model has.
MAX_DIGITS = 12

# The first bytes of files in other formats, and what these formats are called.
_FORMATS = {
    b"\x1f\x8b": "compressed with gzip",
    b"\x28\xb5\x2f\xfd": "compressed with zstd",
    # A frame to be skipped, with which parallel compressors begin.
    **{bytes((first, 0x2A, 0x4D, 0x18)): "compressed with zstd" for first in range(0x50, 0x60)},
    b"\x04\x22\x4d\x18": "compressed with lz4",
    b"\x1f\x9d": "compressed with compress",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"\xfd7zXZ\0": "compressed with xz",
    b"BZh": "compressed with bzip2",
    b"PK\x03\x04": "a zip archive",
    b"PAR1": "a Parquet file",
    b"ARROW1": "an Arrow file",
    b"SQLite format 3\0": "an SQLite database",
    b"%PDF-": "a PDF",
    b"\xff\xfe\0\0": "UTF-32",
    b"\0\0\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
    # The same without a byte order mark.
    b"{\0\0\0": "UTF-32",
    b"\0\0\0{": "UTF-32",
    b"{\0": "UTF-16",
    b"\0{": "UTF-16",
    # Text that often stands where a file of requests is meant.
    b"[": "a JSON array",
    b"<": "HTML or XML",
    b"version https://git-lfs": "a pointer of Git LFS, without the file that it stands for",
}
# Between two objects: as the end of a line in files of old Macs.
_LONE_RETURN = b"}\r{"
_AT_BYTE = re.compile(r" \(byte (\d+)\)$")
_NO_NUMBER = re.compile(rb"-?(?:NaN|Infinity)\b")
# Escapes, each as a whole, so that no backslash is taken for the begin of one; named: a surrogate without the other.
_ESCAPE = re.compile(
    rb"\\(?:[^u]|u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|(?P<half>u[dD][89a-fA-F][0-9a-fA-F]{2})|u)"
)
_CHARACTER = re.compile(r"invalid character|trailing characters")
_PATH = re.compile(r" - at `\$\.?([^`]*)`$")
_MISSING = re.compile(r"missing required field `([^`]+)`")


class _Line(msgspec.Struct):
    custom_id: str
    url: str
    body: msgspec.Raw
    method: str = "POST"


_ABSENT = msgspec.Raw(b"")


class _Body(msgspec.Struct):
    """The fields of a body that we check or count; the endpoint checks the rest."""

    model: str | None = None
    stream: Any = False
    # Not decoded: a number that fits into no float is the endpoint's to refuse.
    max_completion_tokens: msgspec.Raw = _ABSENT
    max_tokens: msgspec.Raw = _ABSENT
    max_output_tokens: msgspec.Raw = _ABSENT
    n: msgspec.Raw = _ABSENT


class _PromptedBody(prefixes.Prompt):
    """The same with what makes its prompt."""

    model: str | None = None
    stream: Any = False
    max_completion_tokens: msgspec.Raw = _ABSENT
    max_tokens: msgspec.Raw = _ABSENT
    max_output_tokens: msgspec.Raw = _ABSENT
    n: msgspec.Raw = _ABSENT


_decode_line = msgspec.json.Decoder(_Line).decode
_decode_body = msgspec.json.Decoder(_Body).decode
_decode_prompted = msgspec.json.Decoder(_PromptedBody).decode


# A struct, because one is made for each line.
class ParsedLine(msgspec.Struct, frozen=True):
    """A valid line. `body` is its JSON text as given, `estimated_tokens` those of prompt and answer.

    `prefix` is the key of its prompt; empty if it is too short, or was not asked for.
    """

    custom_id: str
    url: str
    body: bytes
    model: str | None
    estimated_tokens: int
    prefix: bytes = b""


class LineError(Exception):
    """An invalid line, with all its violations. `unknown_model`: the model that it names and nobody serves, if any."""

    def __init__(self, violations: list[Violation], unknown_model: str = "") -> None:
        super().__init__("; ".join(f"{v.field}: {v.description}" for v in violations))
        self.violations = violations
        self.unknown_model = unknown_model


def format_of(data: bytes) -> str | None:
    """The format of data that is not JSON lines in UTF-8, by its first line; None if it is not recognized."""
    if _LONE_RETURN in data:
        return "text whose lines end with a carriage return alone"
    return next((name for begin, name in _FORMATS.items() if data.startswith(begin)), None)


def not_json(data: bytes, error: Exception) -> str:
    """Describes what is wrong with JSON text.

    NaN and Infinity, as Python writes them, are named, and so are halves of characters, as JavaScript leaves them where
    it cuts a text, and characters that stand where none of theirs can, which may be invisible.
    """
    text = str(error)
    if any(word in text for word in ("surrogate", "hex escape", "truncated")):
        half = next((found for found in _ESCAPE.finditer(data) if found["half"]), None)
        if half:
            what = f"{half[0].decode()} (byte {half.start()}) is half of a character, whose other half is missing"
            return f"not JSON: {what}"
    place = _AT_BYTE.search(text)
    if place:
        at = int(place[1])
        # The parser reports the position after a minus sign.
        at -= data[at - 1 : at] == b"-"
        found = _NO_NUMBER.match(data, at)
        if found:
            return f"not JSON: {found[0].decode()} is no JSON number (byte {at}): use null, or leave it out"
        stray = _CHARACTER.search(text)
        if stray:
            # Of trailing characters the parser has read the first.
            at -= stray[0].startswith("trailing")
            # One character has at most four bytes.
            character = data[at : at + 4].decode(errors="ignore")[:1]
            return f"not JSON: {text[: place.start()]} {character!a} (byte {at})"
    return f"not JSON: {text}"


def parse(line: bytes, where: str, offer: Offer, with_prefix: bool = False) -> ParsedLine:
    """Parses one line and checks it against what is served. Raises LineError naming `where` and the fields."""
    try:
        line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise LineError([Violation(where, f"not UTF-8 at byte {error.start}")]) from None
    try:
        parsed = _decode_line(line)
    except (msgspec.DecodeError, RecursionError) as error:
        raise LineError([_violation(where, "", error, line)]) from None

    violations = []

    def wrong(field: str, description: str) -> None:
        violations.append(Violation(f"{where}: {field}", description))

    if not parsed.custom_id:
        wrong("custom_id", "must not be empty")
    elif len(parsed.custom_id) > MAX_CUSTOM_ID:
        wrong("custom_id", f"has {len(parsed.custom_id)} characters; at most {MAX_CUSTOM_ID} are allowed")
    elif "\0" in parsed.custom_id:
        wrong("custom_id", "must not contain NUL")
    if parsed.method != "POST":
        wrong("method", f"must be 'POST', not {parsed.method[:20]!r}")
    model, unknown_model, wrong_body = None, "", None
    text = bytes(parsed.body)
    try:
        body = _read_body(text, with_prefix)
    except (msgspec.DecodeError, RecursionError) as error:
        wrong_body = _violation(where, "body", error, parsed.body)
    else:
        # vLLM treats null and "" as missing, too.
        model = body.model or None
    urls = offer.urls_of(model)
    if parsed.url not in urls:
        wrong("url", f"{parsed.url[:100]!r} is not served; available: {', '.join(sorted(urls))}")
    if wrong_body is not None:
        violations.append(wrong_body)
    else:
        if body.stream not in (False, None):
            wrong("body.stream", "batch results are not streamed: omit it or set it to false")
        if model is not None and not offer.knows(model):
            wrong("body.model", f"{model[:100]!r} is not served; available: {', '.join(sorted(offer.known))}")
            unknown_model = model
    if violations:
        raise LineError(violations, unknown_model)
    asked = _integer(body.max_completion_tokens) or _integer(body.max_tokens) or _integer(body.max_output_tokens)
    tokens = estimates.tokens(parsed.url, len(text), asked, _integer(body.n))
    prefix = b""
    if isinstance(body, _PromptedBody):
        prefix = prefixes.key(parsed.url, body)
    elif with_prefix and len(text) > prefixes.MOST_BYTES:
        prefix = prefixes.key_of_large(parsed.url, text)
    return ParsedLine(parsed.custom_id, parsed.url, text, model, tokens, prefix)


def _read_body(text: bytes, with_prefix: bool) -> _Body | _PromptedBody:
    """The fields of a body; with those of its prompt if it is worth a key and of a reasonable size."""
    if with_prefix and prefixes.LEAST_BYTES <= len(text) <= prefixes.MOST_BYTES:
        # Messages may be anything: the endpoint judges them.
        with suppress(msgspec.DecodeError, RecursionError):
            return _decode_prompted(text)
    return _decode_body(text)


def _integer(number: msgspec.Raw) -> int:
    """A positive integer, of which the first digits are enough; 0 for all else."""
    text = bytes(number)
    return int(text[:MAX_DIGITS]) if text.isdigit() else 0


def _violation(where: str, parent: str, error: Exception, data: bytes | msgspec.Raw) -> Violation:
    """Converts msgspec's error, moving the path of the field out of its message."""
    text = str(error)
    if isinstance(error, RecursionError):
        return Violation(f"{where}: {parent}" if parent else where, "nested too deeply")
    path = _PATH.search(text)
    missing = _MISSING.search(text)
    fields = [part for part in (parent, path and path[1], missing and missing[1]) if part]
    if missing:
        text = "is required"
    elif path:
        text = text[: path.start()]
    elif not isinstance(error, msgspec.ValidationError):
        text = not_json(bytes(data), error)
        if text.endswith("truncated"):
            text += ": each request must be whole on its line"
    return Violation(f"{where}: {'.'.join(fields)}" if fields else where, text)
