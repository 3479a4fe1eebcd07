"""Kinds of failure: what failed results say, without what differs from one to the next. Pure."""

import json
import re
from collections.abc import Iterable

from service.db.failures import MAX_COUNTED, Failures, Text
from vllm_batch.v1 import batch_service_pb2 as pb

MAX_KINDS = 50
MAX_MESSAGE = 2_000

# An apostrophe within a word opens nothing.
_QUOTED = re.compile(r"""(?<!\w)(['"`])(?:(?!\1).)+\1(?!\w)""", re.DOTALL)
_IDENTIFIER = re.compile(r"\b(?=[0-9a-f-]*[0-9])[0-9a-f][0-9a-f-]{7,}\b")
_NUMBER = re.compile(r"\d+(?:\.\d+)?")
# In a body that was cut.
_FIELD = r'"{name}"\s*:\s*"((?:[^"\\]|\\.)*)'


def without_details(message: str) -> str:
    """A message with `…` for each quoted text and `N` for each number or hexadecimal id."""
    return _NUMBER.sub("N", _IDENTIFIER.sub("N", _QUOTED.sub("…", message)))


def said(text: Text) -> tuple[str, str]:
    """`type` and `message` of a failure; for what is no error in vLLM's form, no type and the whole text."""
    if text.status_code is None:
        return "", text.text
    try:
        body = json.loads(text.text)
    except ValueError:
        found = {name: re.search(_FIELD.format(name=name), text.text) for name in ("type", "message")}
        kind, message = (match[1] if match else "" for match in found.values())
        return kind, message or text.text
    error = body.get("error", body) if isinstance(body, dict) else body
    if isinstance(error, dict) and isinstance(error.get("message"), str):
        return str(error.get("type") or ""), error["message"]
    return "", text.text


def response(failures: Failures, failed: int) -> pb.ListErrorsResponse:
    """The kinds among the failures of a batch that has `failed` of them."""
    kinds = _kinds(failures.texts)
    return pb.ListErrorsResponse(
        kinds=kinds,
        other_count=failures.counted - sum(kind.count for kind in kinds),
        is_partial=failures.counted >= MAX_COUNTED and failed > failures.counted,
    )


def _kinds(texts: Iterable[Text]) -> list[pb.ErrorKind]:
    """The most frequent kinds first. Each has the example of its most frequent text."""
    found: dict[tuple[str, int, str, str], pb.ErrorKind] = {}
    for text in texts:
        kind, message = said(text)
        key = (text.error_code or "", text.status_code or 0, kind, without_details(message)[:MAX_MESSAGE])
        if key not in found:
            code, status, _, shape = key
            found[key] = pb.ErrorKind(code=code, status_code=status, type=kind, message=shape)
            found[key].example_custom_id, found[key].example_message = text.custom_id, message[:MAX_MESSAGE]
        found[key].count += text.count
    return sorted(found.values(), key=lambda each: -each.count)[:MAX_KINDS]
