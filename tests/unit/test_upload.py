"""Uploads through the gateway: which model they are for, and that small ones can be sent again."""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Coroutine
from concurrent.futures import CancelledError
from dataclasses import replace
from typing import Any

import pytest

from service.api import named_models
from service.api.named_models import ANY, Named
from service.gateway.thread_stream import FromThread
from service.gateway.upload import KEPT_BYTES, Upload
from vllm_batch.v1 import batch_service_pb2 as pb

LINE = b'{"custom_id": "a", "body": {"model": "m", "messages": []}}'


class Client:
    """Sends messages when the test says so."""

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
    """The first line's model is found however the file is split; an invalid line names none, and no data is lost."""

    async def test() -> None:
        client = Client(*pieces)
        upload = Upload(aiter(client), "made")
        assert await upload.models(lambda _: True) == Named(frozenset(models))
        client.end()
        assert await received(upload) == pieces

    run(test())


def test_a_second_try_gets_all_of_it() -> None:
    """A second attempt gets all of the data, including what arrived during or after an aborted first attempt."""

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
    """The gateway never keeps more than a few messages, and none once an upload is too large to be sent again."""

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
    """An upload keeps the client's request_id, or gets one from the gateway."""

    async def named() -> None:
        async def source() -> AsyncIterator[pb.UploadBatchRequest]:
            yield pb.UploadBatchRequest(options=pb.BatchOptions(request_id="mine"))

        upload = Upload(source(), "made")
        await upload.models(lambda _: True)
        assert upload.request_id == "mine"

    async def both() -> None:
        client = Client(LINE + b"\n")
        client.end()
        upload = Upload(aiter(client), "made")
        await upload.models(lambda _: True)
        first, *_ = [message async for message in upload.messages()]
        assert (first.options.request_id, upload.request_id) == ("made", "made")

    run(both())
    run(named())


def test_models_of_inline_requests() -> None:
    """The models of inline requests are found in structures and text; invalid requests name none."""
    structure = pb.InlineRequest()
    structure.body.update({"model": "a"})
    texts = [pb.InlineRequest(body_json=text) for text in ('{"model": "b"}', "{", '{"model": 1}', "{}")]
    found = named_models.of_inline(pb.CreateBatchRequest(requests=[structure, *texts]))
    assert found == Named(frozenset({"a", "b"}))
    assert named_models.of_inline(pb.CreateBatchRequest(requests=[structure, texts[0]])) == replace(found, are_all=True)
    empty = [pb.InlineRequest(body_json=text) for text in ('{"model": null}', '{"model": ""}')]
    assert named_models.of_inline(pb.CreateBatchRequest(requests=empty)) == ANY
    nothing = pb.InlineRequest()
    nothing.body.update({"model": None})
    assert named_models.of_inline(pb.CreateBatchRequest(requests=[nothing])) == ANY
    assert named_models.of_line(b'{"body": {"model": null}}') == named_models.of_line(b'{"body": {"model": ""}}') == ""


def test_a_model_that_is_not_utf8_names_none() -> None:
    """The worker reports what is wrong with the line; the gateway forwards it."""
    assert named_models.of_line(LINE.replace(b'"m"', b'"\x80"')) == ""


def test_an_aborted_reader_takes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that is aborted at the moment when it begins to read leaves what comes next to the following one."""
    begin, has_begun = asyncio.run_coroutine_threadsafe, threading.Event()

    def begin_late(*given: Any) -> Any:
        aborting.start()
        # Unless it has to wait, it is over before the read begins.
        aborting.join(0.2)
        has_begun.set()
        return begin(*given)

    def read() -> None:
        with contextlib.suppress(CancelledError):
            next(reader)

    async def test() -> None:
        nonlocal reader, aborting
        client = Client()
        upload = Upload(aiter(client), "made")
        messages = upload.messages()
        await anext(messages)
        reader = FromThread(messages, asyncio.get_running_loop())
        aborting = threading.Thread(target=reader.abort)
        monkeypatch.setattr(asyncio, "run_coroutine_threadsafe", begin_late)
        reading = asyncio.create_task(asyncio.to_thread(read))
        await asyncio.to_thread(has_begun.wait)
        await asyncio.to_thread(aborting.join)
        following = asyncio.create_task(received(upload))
        client.send(b"1")
        client.end()
        assert await following == [b"1"]
        await reading

    reader: FromThread[pb.UploadBatchRequest]
    aborting: threading.Thread
    run(test())
