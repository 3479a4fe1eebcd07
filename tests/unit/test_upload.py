"""An upload on its way through the gateway: which model it is for, and that it can be sent again while it is small."""

import asyncio
from collections.abc import AsyncIterator, Coroutine
from typing import Any

import pytest

from service.gateway import wanted
from service.gateway.upload import KEPT_BYTES, Upload
from vllm_batch.v1 import batch_service_pb2 as pb

LINE = b'{"custom_id": "a", "body": {"model": "m", "messages": []}}'


class Client:
    """Sends what it is told to, when it is told to."""

    def __init__(self, *data: bytes) -> None:
        self._messages: asyncio.Queue[pb.UploadBatchRequest | None] = asyncio.Queue()
        self._messages.put_nowait(pb.UploadBatchRequest(options=pb.BatchOptions()))
        for one in data:
            self.send(one)

    def send(self, data: bytes) -> None:
        self._messages.put_nowait(pb.UploadBatchRequest(data=data))

    def end(self) -> None:
        self._messages.put_nowait(None)

    async def __aiter__(self) -> AsyncIterator[pb.UploadBatchRequest]:
        while (message := await self._messages.get()) is not None:
            yield message


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 30))


async def received(upload: Upload) -> list[bytes]:
    return [message.data async for message in upload.messages() if message.WhichOneof("piece") == "data"]


@pytest.mark.parametrize(
    ("pieces", "models"),
    [
        ([LINE + b"\n" + b"{"], {"m"}),
        ([b"\xef\xbb\xbf" + LINE + b"\n"], {"m"}),
        ([b"\n \n", b"\n", LINE[:20], LINE[20:] + b"\n"], {"m"}),
        ([b"{}\n" + LINE + b"\n"], set()),
        ([b"nonsense\n"], set()),
        ([b'{"body": {"model": ["m"]}}\n'], set()),
        ([b"[" * 100_000 + b"\n"], set()),
        ([b"x" * (KEPT_BYTES + 1)], set()),
    ],
)
def test_the_model_of_the_first_line(pieces: list[bytes], models: set[str]) -> None:
    """However the file is cut; a line that is wrong or does not end soon names none, and nothing is lost by looking."""

    async def test() -> None:
        client = Client(*pieces)
        upload = Upload(aiter(client), "made")
        assert await upload.models() == models
        client.end()
        assert await received(upload) == pieces

    run(test())


def test_a_second_try_gets_all_of_it() -> None:
    """What came for a try that was broken off, or while nobody read, is there for the next."""

    async def test() -> None:
        client = Client(b"1", b"2")
        upload = Upload(aiter(client), "made")
        first = asyncio.create_task(received(upload))
        client.send(b"3")
        for _ in range(50):
            await asyncio.sleep(0)
        assert (len(upload._kept), upload._reading is None) == (4, False)
        first.cancel()
        client.send(b"4")
        second = asyncio.create_task(received(upload))
        client.end()
        assert await second == [b"1", b"2", b"3", b"4"]
        assert upload.is_repeatable
        assert await received(upload) == [b"1", b"2", b"3", b"4"]

    run(test())


def test_little_is_kept() -> None:
    """Of an upload of any size the gateway holds one message, once it is too large to be sent again."""

    async def test() -> None:
        pieces = [b"x" * 100_000] * 50
        client = Client(*pieces)
        client.end()
        upload = Upload(aiter(client), "made")
        count = 0
        async for _ in upload.messages():
            count += 1
            assert len(upload._kept) <= 4
        assert (count, upload.is_repeatable, len(upload._kept)) == (51, False, 0)

    run(test())


def test_every_upload_has_a_name() -> None:
    """The client's request_id goes on; where it gave none the gateway's does."""

    async def named() -> None:
        async def source() -> AsyncIterator[pb.UploadBatchRequest]:
            yield pb.UploadBatchRequest(options=pb.BatchOptions(request_id="mine"))

        upload = Upload(source(), "made")
        await upload.models()
        assert upload.request_id == "mine"

    async def both() -> None:
        client = Client(LINE + b"\n")
        client.end()
        upload = Upload(aiter(client), "made")
        await upload.models()
        first, *_ = [message async for message in upload.messages()]
        assert (first.options.request_id, upload.request_id) == ("made", "made")

    run(both())
    run(named())


def test_models_of_inline_requests() -> None:
    """All models are named, of structures and of text; what is wrong names none."""
    structure = pb.InlineRequest()
    structure.body.update({"model": "a"})
    texts = [pb.InlineRequest(body_json=text) for text in ('{"model": "b"}', "{", '{"model": 1}', "{}")]
    assert wanted.of_inline(pb.CreateBatchRequest(requests=[structure, *texts])) == {"a", "b"}
