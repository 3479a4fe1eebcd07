"""What the runner makes of an answer."""

import json

from service.db.chunks import Request
from service.worker import runner
from service.worker.engine import Answer


def test_a_body_is_stored_on_one_line() -> None:
    """An endpoint that writes its JSON over several lines breaks no line of the output; nothing else changes."""
    body = '{\n  "a": "b\\n",\r\n  "c": [1.0, 1e400]\n}'
    stored = runner._result(Request(1, 2, 3, "c3", "/v1/completions", "{}"), Answer(200, body, 5, 7))
    assert stored.body is not None
    assert "\n" not in stored.body
    assert "\r" not in stored.body
    assert json.loads(stored.body, parse_float=str) == json.loads(body, parse_float=str)
    assert (stored.custom_id, stored.index, stored.prompt_tokens, stored.completion_tokens) == ("c3", 3, 5, 7)
