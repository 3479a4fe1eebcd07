"""The key of a prompt: prompts that begin alike have keys that begin alike, so that sorting brings them together. Pure.

An engine computes a shared prefix once if the requests that share it run while it is cached.
"""

from array import array
from struct import Struct
from typing import Any

import msgspec

# Smaller bodies get no key: their prompts are a few blocks of an engine's cache.
LEAST_BYTES = 512
# Larger bodies are not taken apart, which would cost many times their size in memory: their JSON text is compared.
MOST_BYTES = 1 << 20
# The key has a byte for each block of the prompt's text: (bytes of a block, until which byte of the text). The further
# from the beginning, the less it matters where exactly prompts part. An engine's block of 16 tokens is about 64 bytes.
BLOCKS = ((128, 1 << 10), (256, 8 << 10), (1 << 10, 32 << 10), (4 << 10, 256 << 10), (16 << 10, 1 << 20))
# The leading bytes are for what must be equal before an engine shares anything, such as the model.
HEAD_BYTES = 2


class Message(msgspec.Struct):
    """A message of a chat: what chat templates may use of it, as JSON text, of which nothing is copied."""

    role: msgspec.Raw = msgspec.Raw()
    content: msgspec.Raw = msgspec.Raw()
    name: msgspec.Raw = msgspec.Raw()
    reasoning_content: msgspec.Raw = msgspec.Raw()
    tool_calls: msgspec.Raw = msgspec.Raw()
    tool_call_id: msgspec.Raw = msgspec.Raw()


class Prompt(msgspec.Struct):
    """The fields of a body that make its prompt, in all APIs. The endpoint checks them."""

    model: Any = None
    cache_salt: msgspec.Raw = msgspec.Raw()
    chat_template: msgspec.Raw = msgspec.Raw()
    chat_template_kwargs: msgspec.Raw = msgspec.Raw()
    documents: msgspec.Raw = msgspec.Raw()
    instructions: msgspec.Raw = msgspec.Raw()
    tools: msgspec.Raw = msgspec.Raw()
    messages: list[Message] | None = None
    prompt: msgspec.Raw = msgspec.Raw()
    input: msgspec.Raw = msgspec.Raw()
    query: msgspec.Raw = msgspec.Raw()
    text_1: msgspec.Raw = msgspec.Raw()


class _Part(msgspec.Struct):
    text: msgspec.Raw = msgspec.Raw()


class _LargePrompt(Prompt):
    messages: msgspec.Raw = msgspec.Raw()  # type: ignore[assignment]


_decode_large = msgspec.json.Decoder(_LargePrompt).decode
_decode_parts = msgspec.json.Decoder(list[msgspec.Raw]).decode
_decode_part = msgspec.json.Decoder(_Part).decode
_LIST = ord("[")
_SYSTEM = (b'"system"', b'"developer"')
_BLOCKS = [(size, limit, Struct(f"{size}s").iter_unpack) for size, limit in BLOCKS]


def key(url: str, prompt: Prompt) -> bytes:
    """The key of a request's prompt; empty if it is shorter than a block. Keys are comparable within one process."""
    # In the order of chat templates: system prompt, tools, messages.
    texts: list[Any] = [prompt.instructions, prompt.tools]
    if prompt.messages:
        for message in prompt.messages:
            content = message.content
            texts += (message.role, _parts(content) if content and memoryview(content)[0] == _LIST else content)
            if message.tool_calls or message.reasoning_content or message.name:
                texts += (message.name, message.reasoning_content, message.tool_calls, message.tool_call_id)
        if prompt.tools and bytes(prompt.messages[0].role) in _SYSTEM:
            # The first message and the tools change places.
            texts[1:4] = (*texts[2:4], texts[1])
    texts += (prompt.prompt, prompt.input, prompt.query, prompt.text_1)
    return _key(b"".join(texts), _must_be_equal(url, prompt))


def key_of_large(url: str, body: bytes) -> bytes:
    """The same for a valid body of more than MOST_BYTES, without taking its messages apart."""
    prompt = _decode_large(body)
    parts: list[Any] = [prompt.instructions, prompt.tools, prompt.messages]
    parts += (prompt.prompt, prompt.input, prompt.query, prompt.text_1)
    return _key(b"".join([memoryview(part)[: BLOCKS[-1][1]] for part in parts]), _must_be_equal(url, prompt))


def text_bytes(blocks: int) -> int:
    """How many bytes of text so many blocks of a key stand for."""
    begin = 0
    for size, limit in BLOCKS:
        if blocks <= (limit - begin) // size:
            return begin + blocks * size
        blocks -= (limit - begin) // size
        begin = limit
    return begin


def _key(text: bytes, must_be_equal: int) -> bytes:
    size = len(text)
    if size < _BLOCKS[0][0]:
        return b""
    hashes = array("q")
    view = memoryview(text)
    begin = 0
    for block, limit, blocks_of in _BLOCKS:
        end = begin + (min(size, limit) - begin) // block * block
        # A block is a tuple of one, whose hash is as good.
        hashes.extend(map(hash, blocks_of(view[begin:end])))
        if size <= limit:
            break
        begin = limit
    # The lowest byte of each.
    return (must_be_equal & 0xFFFF).to_bytes(HEAD_BYTES) + hashes.tobytes()[:: hashes.itemsize]


def _must_be_equal(url: str, prompt: Prompt) -> int:
    options = (prompt.cache_salt, prompt.chat_template, prompt.chat_template_kwargs, prompt.documents)
    return hash((url, prompt.model, b"\0".join(options) if any(options) else b""))


def _parts(content: msgspec.Raw) -> bytes:
    """The parts of a message; of an image or the like the hash of its data, as engines have it."""
    try:
        parts = _decode_parts(content)
        return b"".join([part if _decode_part(part).text else b"%x" % hash(bytes(part)) for part in parts])
    except msgspec.DecodeError:
        return bytes(content)
