"""Requests whose prompts share prefixes, in any order."""

import random
from collections.abc import Iterable

from tests.support.batches import line


def group_of(custom_id: str) -> int:
    """The number of the prefix that a request of `shuffled` has."""
    return int(custom_id.split("-")[0])


def shuffled(groups: int, each: int, seed: int = 1, lengths: Iterable[int] = (16,), **body: object) -> list[bytes]:
    """Lines of requests named GROUP-NUMBER: those of a group have the same system prompt of about 1,000 bytes."""
    chosen = random.Random(seed)
    systems = ["".join(chosen.choices("abcdefghij klmnop", k=1_024)) for _ in range(groups)]
    asked = list(lengths)
    made = [
        line(
            f"{group}-{number}",
            messages=[
                {"role": "system", "content": systems[group]},
                {"role": "user", "content": f"{chosen.random()} " * 20},
            ],
            max_tokens=chosen.choice(asked),
            **body,
        )
        for group in range(groups)
        for number in range(each)
    ]
    chosen.shuffle(made)
    return made
