"""The requests whose order is measured: chats with shared prefixes, without any, and of mixed lengths."""

import json
import math
import random
from collections.abc import Iterator
from pathlib import Path

# The tokens of a shared prefix. The text of one is about two bytes a token for the tiny model.
PREFIX_TOKENS = 1_500
# Azure's public trace of conversations (2023): answers have 129 tokens at the median and 211 on average, in a
# distribution that is about log-normal.
MEDIAN_TOKENS, MEAN_TOKENS = 129, 211
WORDS = ("quick", "brown", "fox", "words", "often", "used", "English", "sentences", "another", "after", "some", "other")


def text(seed: object, tokens: int) -> str:
    """So many tokens of the tiny model, about."""
    chosen = random.Random(repr(seed))
    # One token a word, and three for a number of two digits with its space.
    return " ".join(f"{chosen.choice(WORDS)} {chosen.randint(10, 99)}" for _ in range(tokens // 4))


def line(name: str, system: str, user: str, max_tokens: int) -> bytes:
    """One line of a batch."""
    messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
    body = {"model": "tiny", "messages": messages, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
    return (
        json.dumps({"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": body}).encode() + b"\n"
    )


def shared(path: Path, requests: int, prefixes: int, salt: int = 0) -> Path:
    """Requests of so many prefixes, shuffled. Files with another `salt` have other prefixes."""
    systems = [text((salt, number), PREFIX_TOKENS) for number in range(prefixes)]
    order = [number % prefixes for number in range(requests)]
    random.Random(salt).shuffle(order)
    with path.open("wb") as file:
        for number, prefix in enumerate(order):
            file.write(line(f"c{number}", systems[prefix], text((salt, "user", number), 40), 8))
    return path


def distinct(path: Path, requests: int, salt: int = 0) -> Path:
    """Requests of the same length, which share nothing from their first token on."""
    with path.open("wb") as file:
        for number in range(requests):
            file.write(line(f"c{number}", text((salt, number), 400), text((salt, "user", number), 40), 8))
    return path


def mixed(path: Path, requests: int) -> Path:
    """Requests with answers of the lengths of a public trace, in any order."""
    chosen = random.Random(1)
    sigma = math.sqrt(2 * math.log(MEAN_TOKENS / MEDIAN_TOKENS))
    with path.open("wb") as file:
        for number in range(requests):
            length = min(1_800, max(1, round(chosen.lognormvariate(math.log(MEDIAN_TOKENS), sigma))))
            file.write(line(f"c{number}", "", text(number, 40), length))
    return path


def least_computed(path: Path, model: Path, block: int) -> int:
    """The least prompt tokens that an engine with such blocks computes for a file: each shared block once."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    seen: set[int] = set()
    return sum(_new_tokens(tokens, block, seen) for tokens in _prompts(path, tokenizer))


def _prompts(path: Path, tokenizer: object) -> Iterator[list[int]]:
    with path.open("rb") as file:
        for given in file:
            messages = json.loads(given)["body"]["messages"]
            yield tokenizer.apply_chat_template(  # type: ignore[attr-defined]
                messages, add_generation_prompt=True, return_dict=False
            )


def _new_tokens(tokens: list[int], block: int, seen: set[int]) -> int:
    """The tokens of a prompt that are in no block of those before; its last token is always computed."""
    parent = new = 0
    for begin in range(0, len(tokens), block):
        end = begin + block
        parent = hash((parent, *tokens[begin:end]))
        if end > len(tokens) - 1 or parent not in seen:
            new += min(end, len(tokens)) - begin
        if end <= len(tokens):
            seen.add(parent)
    return new
