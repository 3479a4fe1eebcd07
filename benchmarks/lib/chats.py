"""The requests used for measuring: chats of a realistic size, each different."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def chat(index: int, max_tokens: int = 32, **more: Any) -> dict[str, Any]:
    """The body of one request. Its number of generated tokens does not depend on what the model says."""
    content = f"Summarise the document number {index} in one sentence, please, and say what is new in it."
    body = {"model": "tiny", "messages": [{"role": "user", "content": content}], "max_tokens": max_tokens}
    return body | {"temperature": 0, "ignore_eos": True} | more


def body(index: int, **more: Any) -> str:
    """The same body as JSON text."""
    return json.dumps(chat(index, **more))


def line(index: int, **more: Any) -> bytes:
    """One line of a batch."""
    request = {"custom_id": f"c{index}", "method": "POST", "url": "/v1/chat/completions", "body": chat(index, **more)}
    return json.dumps(request).encode() + b"\n"


def lines(count: int, **more: Any) -> Iterator[bytes]:
    """The lines of a batch."""
    return (line(index, **more) for index in range(count))


def write(path: Path, count: int, **more: Any) -> Path:
    """Writes a batch to a file. Returns its path."""
    with path.open("wb") as file:
        file.writelines(lines(count, **more))
    return path
