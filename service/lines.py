"""The lines of a batch: JSON in OpenAI's batch format, checked one by one. Pure."""

import re
from collections.abc import Set
from dataclasses import dataclass
from typing import Any

import msgspec

from service.errors import Violation

MAX_CUSTOM_ID = 512
# Beyond this many wrong fields a client learns nothing more from reading on.
MAX_VIOLATIONS = 20

_PATH = re.compile(r" - at `\$\.?([^`]*)`$")
_MISSING = re.compile(r"missing required field `([^`]+)`")


class _Line(msgspec.Struct):
    custom_id: str
    url: str
    body: msgspec.Raw
    method: str = "POST"


class _Body(msgspec.Struct):
    """What of a body concerns us; the rest is the endpoint's."""

    model: str | msgspec.UnsetType = msgspec.UNSET
    stream: Any = False


_decode_line = msgspec.json.Decoder(_Line).decode
_decode_body = msgspec.json.Decoder(_Body).decode


@dataclass(frozen=True)
class ParsedLine:
    """A line that is right. `body` is its JSON text as given."""

    custom_id: str
    url: str
    body: bytes
    model: str | None


class LineError(Exception):
    """A line that is wrong, with all that is wrong with it."""

    def __init__(self, violations: list[Violation]) -> None:
        super().__init__("; ".join(f"{v.field}: {v.description}" for v in violations))
        self.violations = violations


def parse(line: bytes, where: str, models: Set[str], urls: Set[str]) -> ParsedLine:
    """One line, checked against what the worker serves. Raises LineError naming `where` and the fields."""
    try:
        line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise LineError([Violation(where, f"not UTF-8 at byte {error.start}")]) from None
    try:
        parsed = _decode_line(line)
    except (msgspec.DecodeError, RecursionError) as error:
        raise LineError([_violation(where, "", error)]) from None

    violations = []

    def wrong(field: str, description: str) -> None:
        violations.append(Violation(f"{where}: {field}", description))

    if not parsed.custom_id:
        wrong("custom_id", "must not be empty")
    elif len(parsed.custom_id) > MAX_CUSTOM_ID:
        wrong("custom_id", f"has {len(parsed.custom_id)} characters, at most {MAX_CUSTOM_ID} are allowed")
    elif "\0" in parsed.custom_id:
        wrong("custom_id", "must not contain NUL")
    if parsed.method != "POST":
        wrong("method", f"is {parsed.method[:20]!r}, must be 'POST'")
    if parsed.url not in urls:
        wrong("url", f"{parsed.url[:100]!r} is not served; there are {', '.join(sorted(urls))}")
    model = None
    try:
        body = _decode_body(parsed.body)
    except (msgspec.DecodeError, RecursionError) as error:
        violations.append(_violation(where, "body", error))
    else:
        if body.stream not in (False, None):
            wrong("body.stream", "results of a batch are not streamed: leave it out or say false")
        if body.model is not msgspec.UNSET:
            model = body.model
            if model not in models:
                wrong("body.model", f"{model[:100]!r} is not served; there are {', '.join(sorted(models))}")
    if violations:
        raise LineError(violations)
    return ParsedLine(parsed.custom_id, parsed.url, bytes(parsed.body), model)


def _violation(where: str, parent: str, error: Exception) -> Violation:
    """What msgspec found, with the field that it found it in taken out of its message."""
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
        text = f"not JSON: {text}"
    return Violation(f"{where}: {'.'.join(fields)}" if fields else where, text)
