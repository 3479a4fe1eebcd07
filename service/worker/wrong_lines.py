"""What is wrong with a file, as OpenAI's batches tell it: a code, the line and the field of each. Pure."""

import re
from collections.abc import Mapping

from service.errors import ApiError, Violation

_PLACE = re.compile(r"line (\d+)(?:: (.*))?")
_OF_LINE = re.compile(r"\bline (\d+)\b")
_CODES = {
    "method": "invalid_method",
    "url": "invalid_url",
    "body.model": "model_not_found",
    "body.stream": "invalid_request",
}


def errors_of(error: ApiError) -> list[Mapping[str, object]]:
    """The entries of `errors.data` for a file that was refused."""
    if error.violations:
        return [_entry(violation) for violation in error.violations]
    line = _OF_LINE.search(error.message)
    return [one("limit_reached", error.message, line=int(line[1]) if line else None)]


def one(code: str, message: str, param: str | None = None, line: int | None = None) -> Mapping[str, object]:
    """An entry of `errors.data`, of text that Postgres can keep."""
    return {"code": code, "line": line, "message": _kept(message), "param": None if param is None else _kept(param)}


def _kept(text: str) -> str:
    return text.replace("\0", "").encode("utf-8", "replace").decode()


def _entry(violation: Violation) -> Mapping[str, object]:
    place = _PLACE.fullmatch(violation.field)
    if place is None:
        code = "empty_file" if violation.field == "requests" else "invalid_file"
        return one(code, f"The file {violation.description}.", "file")
    field = place[2] or None
    text = violation.description
    if "already used" in text:
        code = "duplicate_custom_id"
    elif text == "is required":
        code = "missing_required_parameter"
    elif field is None or "not JSON" in text:
        code = "invalid_json_line"
    else:
        code = _CODES.get(field, "invalid_value")
        if code == "model_not_found" and "is not served" not in text:
            code = "invalid_value"
    # A sentence about the field, or one of its own.
    between = ": " if text[:1].isupper() else " "
    return one(code, f"{field}{between}{text}" if field else text, field, int(place[1]))
