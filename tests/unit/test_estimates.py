"""Estimates of a request's tokens."""

import json

import pytest

from service.worker.estimates import COMPLETION_TOKENS, MAX_TOKENS
from service.worker.lines import parse
from service.worker.offer import Offer

CHAT = "/v1/chat/completions"


@pytest.mark.parametrize(
    ("url", "given", "completion"),
    [
        (CHAT, {"max_completion_tokens": 10, "max_tokens": 99}, 10),
        (CHAT, {"max_tokens": 7, "n": 3}, 21),
        ("/v1/responses", {"max_output_tokens": 12}, 12),
        (CHAT, {}, COMPLETION_TOKENS),
        (CHAT, {"max_tokens": "many", "n": True}, COMPLETION_TOKENS),
        (CHAT, {"max_tokens": -5}, COMPLETION_TOKENS),
        (CHAT, {"max_tokens": 10**30}, MAX_TOKENS),
        ("/v1/embeddings", {"max_tokens": 10}, 0),
    ],
)
def test_prompt_and_what_is_asked_for(url: str, given: dict[str, object], completion: int) -> None:
    """A quarter of the body's bytes, plus what it lets the model generate; nonsense in it breaks nothing."""
    body = json.dumps({"model": "tiny", "input": "x" * 400} | given)
    line = f'{{"custom_id": "a", "url": "{url}", "body": {body}}}'
    parsed = parse(line.encode(), "line 1", Offer({"tiny"}, {url}))
    assert parsed.estimated_tokens == len(body) // 4 + completion
