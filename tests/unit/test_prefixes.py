"""Keys of prompts: prompts that begin alike have keys that begin alike, whatever else a body has."""

import json
import random
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.worker.lines import LineError, parse
from service.worker.offer import Offer
from service.worker.prefixes import BLOCKS, HEAD_BYTES, LEAST_BYTES, MOST_BYTES, text_bytes

CHAT = "/v1/chat/completions"
URLS = {CHAT, "/v1/completions", "/v1/embeddings", "/v1/responses", "/score"}


def key(body: object, url: str = CHAT) -> bytes:
    text = body if isinstance(body, str) else json.dumps(body)
    line = f'{{"custom_id": "a", "url": "{url}", "body": {text}}}'.encode()
    return parse(line, "line 1", Offer({"tiny", "lora"}, URLS), with_prefix=True).prefix


def words(seed: int, size: int) -> str:
    chosen = random.Random(seed)
    return "".join(chosen.choice('abcdefghij klmnopqrst\n"äß') for _ in range(size))


def chat(*contents: Any, **more: Any) -> dict[str, Any]:
    roles = ("system", "user", "assistant")
    return {
        "model": "tiny",
        "messages": [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)],
        **more,
    }


def shared(one: bytes, other: bytes) -> int:
    return next(
        (place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )


@given(st.integers(1_000, 40_000), st.integers(0, 2_000), st.integers(0, 2_000), st.integers(0, 1_000))
def test_what_prompts_share_their_keys_share(common: int, one: int, other: int, seed: int) -> None:
    """Keys have at least the leading bytes in common that stand for the text which the prompts have in common."""
    system = words(seed, common)
    first, second = key(chat(system, words(-seed - 1, one))), key(chat(system, words(-seed - 2, other)))
    least = shared(first, second)
    assert text_bytes(least - HEAD_BYTES + 1) > len(system.encode()) or least == min(len(first), len(second))


def test_sorting_brings_a_tree_of_prefixes_together() -> None:
    """Requests with the same system prompt, and among them those with the same document, follow one another."""
    bodies = [
        (system, document, chat(words(system, 2_000), words(100 + document, 2_000) + words(1_000 + number, 300)))
        for number, (system, document) in enumerate((s, d) for s in range(8) for d in range(8) for _ in range(5))
    ]
    random.Random(1).shuffle(bodies)
    order = [place for _, place in sorted((key(body), (system, document)) for system, document, body in bodies)]
    changes = sum(before != after for before, after in pairwise(order))
    changes_of_system = sum(before[0] != after[0] for before, after in pairwise(order))
    assert (changes, changes_of_system) == (63, 7)


@pytest.mark.parametrize(
    "other",
    [
        {"model": "lora"},
        {"cache_salt": "mine"},
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"documents": [{"text": "a"}]},
    ],
)
def test_nothing_is_shared_where_an_engine_shares_nothing(other: dict[str, Any]) -> None:
    """Another model, adapter, salt or template separates prompts from their first byte."""
    body = chat(words(1, 2_000), "x")
    assert key(body)[:HEAD_BYTES] != key(body | other)[:HEAD_BYTES]
    assert key(body)[HEAD_BYTES:] == key(body | other)[HEAD_BYTES:]


def test_order_of_keys_and_spaces_mean_nothing() -> None:
    """The same prompt has the same key however its JSON is written, and whatever else is asked for."""
    messages = [{"role": "system", "content": words(1, 3_000)}, {"role": "user", "content": "Grüße"}]
    one = json.dumps({"model": "tiny", "messages": messages, "max_tokens": 5})
    turned = [dict(reversed(message.items())) for message in messages]
    other = json.dumps({"temperature": 0, "messages": turned, "model": "tiny"}, indent=2)
    assert key(one) == key(other.replace("\n", " ")) != b""


def test_system_prompt_comes_before_tools_and_both_before_the_conversation() -> None:
    """As in chat templates: the same system prompt and tools are shared, wherever the body has them."""
    system, tools = words(1, 2_000), [{"type": "function", "function": {"name": words(2, 2_000)}}]
    with_tools = key({"tools": tools} | chat(system, words(3, 2_000)))
    same_tools = key(chat(system, words(4, 2_000), tools=tools))
    without, other_system = key(chat(system, words(3, 2_000))), key(chat(words(5, 2_000), words(3, 2_000), tools=tools))
    assert shared(with_tools, same_tools) >= shared(with_tools, without) + 7
    assert shared(with_tools, without) >= HEAD_BYTES + 10
    assert shared(with_tools, other_system) <= HEAD_BYTES + 1


def test_images_count_by_their_hash() -> None:
    """The same image is the same prefix, another one is not, and a large one leaves room for what comes after it."""

    def body(image: int, text: int) -> dict[str, Any]:
        url = {"url": "data:image/png;base64," + words(image, 200_000)}
        parts = [{"type": "text", "text": words(5, 1_000)}, {"type": "image_url", "image_url": url}]
        return chat("", [*parts, {"type": "text", "text": words(text, 2_000)}])

    assert key(body(1, 1)) == key(body(1, 1))
    assert len(key(body(1, 1))) < 30
    # One byte in 256 is the same by chance, and hashes differ from process to process.
    same_image = max(shared(key(body(1, 1)), key(body(1, text))) for text in (2, 3, 4))
    other_image = min(shared(key(body(1, 1)), key(body(image, 1))) for image in (2, 3, 4))
    assert same_image >= other_image >= HEAD_BYTES + 8
    assert key(body(1, 1)) != key(body(2, 1))


@pytest.mark.parametrize(
    ("url", "field"),
    [("/v1/completions", "prompt"), ("/v1/embeddings", "input"), ("/v1/responses", "input"), ("/score", "text_1")],
)
def test_prompts_of_other_endpoints(url: str, field: str) -> None:
    """Texts and lists of tokens or texts are compared from their beginning."""
    text, tokens = words(1, 3_000), list(range(1_000))
    for common, one, other in ((text, "a", "b"), (tokens, [1], [2]), ([text], ["a"], ["b"])):
        first, second = (key({"model": "tiny", field: common + more}, url) for more in (one, other))  # type: ignore[operator]
        assert shared(first, second) >= 12


def test_instructions_come_first() -> None:
    """Of the Responses API."""
    bodies = [{"instructions": words(1, 3_000), "input": [{"role": "user", "content": words(n, 600)}]} for n in (1, 2)]
    assert shared(*(key(body, "/v1/responses") for body in bodies)) >= HEAD_BYTES + 14


def test_short_prompts_have_no_key() -> None:
    """What is a few blocks of a cache is not worth the bytes."""
    assert key(chat("short", "question")) == b""
    assert key(chat("short", "question", user="x" * LEAST_BYTES)) == b""


def test_keys_are_small() -> None:
    """However long the prompt, its key is a few hundred bytes."""
    assert len(key(chat("x" * 2_000_000))) == HEAD_BYTES + sum(
        (limit - begin) // size
        for (size, limit), begin in zip(BLOCKS, (0, *(limit for _, limit in BLOCKS)), strict=False)
    )


def test_large_bodies_are_compared_by_their_text() -> None:
    """A shared document of more than a mebibyte is shared all the same."""
    document = words(1, MOST_BYTES)
    one, other = (key(chat(document, words(n, 1_000))) for n in (2, 3))
    assert one == other
    assert one != key(chat(words(4, MOST_BYTES)))


WEIRD = st.recursive(
    st.none()
    | st.booleans()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text()
    | st.integers(-(10**30), 10**30),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=8) | st.sampled_from(["role", "content", "text"]), inner, max_size=4)
    ),
    max_leaves=12,
)
FIELDS = ("messages", "prompt", "input", "tools", "instructions", "query", "text_1", "documents", "cache_salt")


@given(st.dictionaries(st.sampled_from(FIELDS), WEIRD), st.booleans())
def test_no_body_is_too_weird(body: dict[str, Any], is_large: bool) -> None:
    """Whatever the fields are, the upload goes on: the endpoint judges them."""
    key(body | {"user": "x" * (MOST_BYTES if is_large else LEAST_BYTES)})


@pytest.mark.parametrize("depth", [100, *range(900, 1_000, 3), 5_000])
def test_depth_is_the_endpoints_matter(depth: int) -> None:
    """A key is no reason to refuse a line that is accepted without one, however deep its prompt is nested."""
    body = f'{{"messages": [{"[" * depth}{"]" * depth}], "user": "{"x" * LEAST_BYTES}"}}'
    line = f'{{"custom_id": "a", "url": "{CHAT}", "body": {body}}}'.encode()
    try:
        without = parse(line, "line 1", Offer(set(), {CHAT})).body
    except LineError:
        return
    assert parse(line, "line 1", Offer(set(), {CHAT}), with_prefix=True).body == without
