"""Writes examples/chat-200.jsonl: 200 chat requests in OpenAI's batch format. `python examples/make_chat_200.py`."""

import json
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

TEXTS = [
    "The harbour was quiet that morning, and the nets lay drying on the stones.",
    "Our quarterly revenue grew by four percent, mostly from renewals in the north.",
    "Water expands when it freezes, which is why pipes burst in a hard winter.",
    "The committee postponed its decision until the new figures are published.",
    "She tuned the old radio until a voice came through, thin and far away.",
    "A good index makes a slow query fast; a bad one makes every write slow.",
    "The recipe calls for two eggs, a cup of flour and more patience than most cooks have.",
    "Bees find their way back by the position of the sun, even behind clouds.",
    "The patch fixes a leak of file descriptors under sustained load.",
    "He had walked the ridge every autumn for thirty years and never seen it so dry.",
]
TASKS = {
    "translate-de": "Translate the text into German.",
    "translate-fr": "Translate the text into French.",
    "summarise": "Summarise the text in at most ten words.",
    "sentiment": "Answer with one word: is the text positive, negative or neutral?",
    "keywords": "List three keywords of the text, separated by commas.",
    "question": "Write one question that the text answers.",
    "continue": "Continue the text with one more sentence.",
    "simplify": "Rewrite the text for a child of eight.",
    "title": "Give the text a title of at most five words.",
    "formal": "Rewrite the text in a formal tone.",
}


def requests() -> Iterator[dict[str, Any]]:
    """Each task on each text, once to the point and once with some freedom."""
    variants = [{"temperature": 0}, {"temperature": 0.8, "top_p": 0.95, "seed": 7}]
    cases = product(TASKS.items(), enumerate(TEXTS), enumerate(variants))
    for number, ((task, instruction), (place, text), (variant, sampling)) in enumerate(cases):
        body = {
            "model": "tiny",
            "messages": [
                {"role": "system", "content": instruction},
                {"role": "user", "content": text},
            ],
            "max_tokens": 256 + 32 * (number % 8),
            **sampling,
        }
        yield {
            "custom_id": f"{task}-{place:02d}-{variant}",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": body,
        }


if __name__ == "__main__":
    with Path(__file__).with_name("chat-200.jsonl").open("w", encoding="utf-8") as file:
        for request in requests():
            file.write(json.dumps(request) + "\n")
