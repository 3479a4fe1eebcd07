"""What both clients share: their methods, when they retry, and what each attempt sends."""

import asyncio
import contextlib
import inspect
import io
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any, cast

import grpc
import pytest
import tenacity
from hypothesis import given
from hypothesis import strategies as st

import vllm_batch
from service.errors import ApiError
from tests.support.loops import in_loop
from vllm_batch import AsyncClient, CallError, Client
from vllm_batch.requests import Lines, Listing
from vllm_batch.retries import retry_rules
from vllm_batch.uploads import Upload, to_bytes
from vllm_batch.v1 import batch_service_pb2 as pb


class Failure(grpc.RpcError):
    """An RpcError as gRPC raises it for a server's error."""

    def __init__(self, code: grpc.StatusCode, delay_s: float | None = None, message: str = "no") -> None:
        self.error = ApiError(code, message, "REASON", {"a": "b"}, delay_s)

    def code(self) -> grpc.StatusCode:
        return self.error.code

    def details(self) -> str:
        return self.error.message

    def trailing_metadata(self) -> object:
        return self.error.trailing_metadata


def sync(call: Callable[[], str], rules: dict[str, object]) -> str:
    return tenacity.Retrying(**rules)(call)  # type: ignore[arg-type]


def aio(call: Callable[[], str], rules: dict[str, object]) -> str:
    async def once() -> str:
        return call()

    return asyncio.run(tenacity.AsyncRetrying(**rules)(once))  # type: ignore[arg-type]


@pytest.mark.parametrize("retry", [sync, aio])
def test_unavailable_alone_is_tried_again(retry: Callable[[Callable[[], str], dict[str, object]], str]) -> None:
    """Only UNAVAILABLE is retried, after the server's delay or a growing one of our own; other errors are final."""
    waits: list[float] = []
    unavailable = grpc.StatusCode.UNAVAILABLE
    failures = [Failure(unavailable, 0.01), Failure(unavailable, 0.02), Failure(unavailable)]

    def call() -> str:
        if failures:
            raise CallError(failures.pop(0))
        return "done"

    rules = retry_rules(60, lambda error, delay_s: waits.append(delay_s))
    assert retry(call, rules) == "done"
    assert waits == [0.01, 0.02, 2.0]
    for code in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.INTERNAL):
        failures[:] = [Failure(code, 0.01)]
        with pytest.raises(CallError) as caught:
            retry(call, rules)
        assert (caught.value.code, caught.value.reason, caught.value.metadata) == (code, "REASON", {"a": "b"})
    assert len(waits) == 3


@pytest.mark.parametrize("retry", [sync, aio])
def test_calls_that_end_with_their_channel(retry: Callable[[Callable[[], str], dict[str, object]], str]) -> None:
    """A call whose channel was closed under it is tried again; not one that was cancelled, nor after `close`."""
    for message, is_closed, is_retried in (
        ("Channel closed!", False, True),
        ("Channel closed!", True, False),
        ("Cancelled on request", False, False),
    ):
        failures = [Failure(grpc.StatusCode.CANCELLED, 0.01, message)]

        def call(failures: list[Failure] = failures) -> str:
            if failures:
                raise CallError(failures.pop(0))
            return "done"

        rules = retry_rules(60, is_closed=lambda is_closed=is_closed: is_closed)  # type: ignore[misc]
        if is_retried:
            assert retry(call, rules) == "done"
            continue
        with pytest.raises(CallError) as caught:
            retry(call, rules)
        assert caught.value.code is grpc.StatusCode.CANCELLED


class Cut:
    """A stub whose channel is closed under its first calls: gRPC raises asyncio's own error then."""

    def __init__(self, closed: int) -> None:
        self.closed = closed

    async def GetBatch(self, *_: object, **__: object) -> pb.GetBatchResponse:
        return await self.read()

    def WatchBatch(self, *_: object) -> "Cut":
        return self

    async def read(self) -> Any:
        self.closed -= 1
        if self.closed >= 0:
            raise asyncio.CancelledError
        return pb.GetBatchResponse(batch=pb.Batch(id="a"))

    def cancel(self) -> None:
        pass


@pytest.mark.parametrize("is_stream", [False, True])
@in_loop
async def test_asyncio_calls_that_end_with_their_channel(is_stream: bool) -> None:
    """Such a call is tried again or, once the client was closed, a CallError: its task was cancelled by nobody."""

    async def ask(client: AsyncClient) -> str:
        return (await anext(client.watch("a")) if is_stream else await client.get("a")).id

    client = AsyncClient("127.0.0.1:1", token="")
    for rules in (client._rules, client._stream_rules):
        rules["wait"] = lambda _: 0
    client._stub = cast("Any", Cut(2))
    assert await ask(client) == "a"
    await client.close()
    client._stub = cast("Any", Cut(1))
    with pytest.raises(CallError) as caught:
        await ask(client)
    assert caught.value.code is grpc.StatusCode.CANCELLED


@in_loop
async def test_asyncio_calls_that_are_cancelled() -> None:
    """Whoever cancels the task of a call has cancelled it."""
    client = AsyncClient("127.0.0.1:1", token="")
    task = asyncio.create_task(client._retry(asyncio.Event().wait))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await client.close()


class Sending:
    """An upload under way, as gRPC's blocking API has it; its own stub, too."""

    def __init__(self) -> None:
        self.has_ended = threading.Event()
        self.callbacks: list[Callable[[object], None]] = []
        self.UploadBatch = self

    def future(self, *_: object, **__: object) -> "Sending":
        return self

    def add_done_callback(self, callback: Callable[[object], None]) -> None:
        self.callbacks.append(callback)

    def result(self) -> pb.UploadBatchResponse:
        self.has_ended.wait()
        return pb.UploadBatchResponse(batch=pb.Batch(id="a"))

    def cancel(self) -> None:
        self.has_ended.set()


@in_loop
async def test_asyncio_uploads_take_no_threads() -> None:
    """However many uploads are under way, the loop's own threads are there for others, such as name resolution."""
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
    client, sending = AsyncClient("127.0.0.1:1", token=""), Sending()
    client._upload_stub = cast("Any", sending)
    uploading = asyncio.create_task(client.submit(io.BytesIO()))
    await asyncio.sleep(0)
    try:
        assert await asyncio.wait_for(asyncio.to_thread(lambda: "others"), 5) == "others"
        sending.has_ended.set()
        await asyncio.to_thread(sending.callbacks[0], sending)
        assert (await uploading).id == "a"
    finally:
        sending.has_ended.set()
        await client.close()


def test_patience_ends() -> None:
    """Once patience has run out, UNAVAILABLE is raised instead of retried."""
    with pytest.raises(CallError):
        sync(
            lambda: (_ for _ in ()).throw(CallError(Failure(grpc.StatusCode.UNAVAILABLE, 0.01))), retry_rules(0, print)
        )


@pytest.mark.parametrize("retry", [sync, aio])
def test_no_wait_is_longer_than_patience(retry: Callable[[Callable[[], str], dict[str, object]], str]) -> None:
    """However long a server asks to wait, the last attempt comes when patience ends."""
    waits: list[float] = []
    attempts = 0

    def call() -> str:
        nonlocal attempts
        attempts += 1
        raise CallError(Failure(grpc.StatusCode.UNAVAILABLE, 300))

    with pytest.raises(CallError):
        retry(call, retry_rules(0.05, lambda _, delay_s: waits.append(delay_s)))
    assert attempts > 1
    assert 0 < waits[0] <= 0.05


@pytest.mark.parametrize("retry", [sync, aio])
@pytest.mark.parametrize(("of_stream", "most"), [(False, 2), (True, 5)])
def test_patience_begins_with_a_failure(
    retry: Callable[[Callable[[], str], dict[str, object]], str],
    of_stream: bool,
    most: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The hours before a stream or an upload broke are no failing; those of a stream that broke again are none
    either, while an upload that always breaks ends.
    """
    now_s = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now_s)
    attempts = 0

    def call() -> str:
        nonlocal attempts, now_s
        attempts += 1
        if attempts == 5:
            return "done"
        now_s += 3600
        raise CallError(Failure(grpc.StatusCode.UNAVAILABLE, 0))

    rules = retry_rules(600, of_stream=of_stream) | {"sleep": time_free(retry)}
    with contextlib.nullcontext() if of_stream else pytest.raises(CallError):
        assert retry(call, rules) == "done"
    assert attempts == most


def time_free(retry: Callable[..., str]) -> Callable[[float], object]:
    """A sleep that takes no time."""

    async def aio_sleep(_: float) -> None:
        pass

    return (lambda _: None) if retry is sync else aio_sleep


def test_each_try_sends_the_same() -> None:
    """Each attempt sends the whole file under the same request_id, and the previous attempt yields nothing more."""
    file = io.BytesIO(b"x" * 700_000)
    upload = Upload(file, {"priority": 3})
    first = upload.messages()
    begun = [next(first), next(first)]
    second = list(upload.messages())
    assert second[0] == begun[0]
    assert second[0].options.request_id
    assert second[0].options.priority == 3
    assert b"".join(message.data for message in second) == file.getvalue()
    assert second[-1] == pb.UploadBatchRequest(end=pb.UploadEnd())
    assert list(first) == []


@pytest.mark.parametrize("text", [b"x" * 700_000, b"y" * 600_000, b"y" * 400_000, b""])
def test_a_file_that_changes_while_it_is_sent(tmp_path: Path, text: bytes) -> None:
    """It is not submitted half old and half new: the upload breaks off before its end, also where lines are whole."""
    path = tmp_path / "batch.jsonl"
    path.write_bytes(b"x" * 600_000)
    with path.open("rb") as file:
        messages = Upload(file, {}).messages()
        begun = [next(messages), next(messages)]
        # As an editor or a program that logs may do it; a file that takes its place is another matter.
        with path.open("r+b") as written:
            written.write(text)
            written.truncate()
        os.utime(path, (0, 0))
        with pytest.raises(OSError, match="changed while it was being sent"):
            begun.extend(messages)
    assert not begun[-1].HasField("end")


def test_a_file_that_is_replaced_while_it_is_sent(tmp_path: Path) -> None:
    """What is sent is the file that was opened, and so it is if nobody touches it."""
    path, other = tmp_path / "batch.jsonl", tmp_path / "other"
    path.write_bytes(b"x" * 600_000)
    other.write_bytes(b"y")
    with path.open("rb") as file:
        messages = Upload(file, {}).messages()
        begun = [next(messages), next(messages)]
        other.replace(path)
        begun.extend(messages)
    assert b"".join(message.data for message in begun) == b"x" * 600_000
    assert begun[-1].HasField("end")


class Broken(io.BytesIO):
    """A file on a disk that fails after the first piece."""

    def read(self, size: int | None = -1, /) -> bytes:
        if self.tell():
            raise OSError(5, "Input/output error")
        return super().read(size)


@pytest.mark.parametrize(
    ("file", "kind"), [(Broken(b"x" * (1 << 20)), OSError), (io.StringIO("{}\n"), TypeError), (io.BytesIO(), CallError)]
)
def test_what_reading_a_file_raises_is_raised(file: io.BytesIO, kind: type[Exception]) -> None:
    """A file that cannot be read, or is open as text, is the caller's error and not an UNKNOWN of gRPC's."""
    upload = Upload(file, {})
    with contextlib.suppress(OSError, TypeError):
        list(upload.messages())
    with pytest.raises(kind), upload.reading():
        # What gRPC makes of an iterator that fails, and what any other failure of the call looks like.
        raise CallError(Failure(grpc.StatusCode.UNKNOWN))


@pytest.mark.parametrize(
    ("options", "kind", "why"),
    [
        ({"requestid": "nightly"}, TypeError, "no option 'requestid'; it has request_id"),
        ({"metdata": {}}, TypeError, "no option 'metdata'"),
        ({"order": "fifo"}, ValueError, "one of 'prefix', 'input'"),
        ({"order": None}, ValueError, "order is None"),
    ],
)
def test_options_that_submit_does_not_have(options: dict[str, object], kind: type[Exception], why: str) -> None:
    """A misspelt option is an error, never a batch without it."""
    with pytest.raises(kind, match=why):
        Upload(io.BytesIO(), options)  # type: ignore[arg-type]


@pytest.mark.parametrize("given", ["/path", b"{}", None, Path("/path")])
def test_what_is_no_file(given: object) -> None:
    """A path or content in place of a file is told as that."""
    with pytest.raises(TypeError, match="open in binary mode"):
        Upload(given, {})  # type: ignore[arg-type]


@pytest.mark.parametrize("given", ["{}\n{}", b"{}", {"custom_id": "a"}])
def test_one_text_is_no_list_of_lines(given: object) -> None:
    """One text, or one request, is not taken for as many lines as it has characters or fields."""
    with Client("127.0.0.1:1", patience_s=0) as client, pytest.raises(TypeError, match="as a list"):
        client.submit_lines(given)  # type: ignore[arg-type]

    async def aio() -> None:
        async with AsyncClient("127.0.0.1:1", patience_s=0) as client:
            await client.submit_lines(given)  # type: ignore[arg-type]

    with pytest.raises(TypeError, match="as a list"):
        asyncio.run(aio())


def test_lines() -> None:
    """Requests may be dicts, strings or bytes, with or without a final newline."""
    assert [to_bytes(line) for line in ({"a": "ü"}, "b", b"c\n")] == [b'{"a": "\\u00fc"}\n', b"b\n", b"c\n"]


def calls(client: type) -> dict[str, inspect.Signature]:
    """A client's public methods with their signatures, those of AsyncClient mapped to their sync counterparts."""
    found = {}
    for name, function in vars(client).items():
        if name.startswith("_") and name != "__init__":
            continue
        signature = inspect.signature(function)
        lines = signature.parameters.get("lines")
        if lines is not None:
            plain = lines.replace(annotation=lines.annotation.replace(" | AsyncIterable[Line]", ""))
            parameters = [plain if each is lines else each for each in signature.parameters.values()]
            signature = signature.replace(parameters=parameters)
        returned = signature.return_annotation
        if returned.startswith("AsyncGenerator["):
            returned = returned.replace("AsyncGenerator[", "Iterator[").replace(", None]", "]")
        found[name] = signature.replace(return_annotation=returned)
    return found


def test_both_clients_have_the_same_calls() -> None:
    """Both clients have the same methods, with the same parameters, defaults, types and documentation."""
    assert calls(Client) == calls(AsyncClient)
    assert {"__init__", "submit", "results", "service_status", "accepting", "close"} <= set(calls(Client))
    for name in set(calls(Client)) - {"__init__", "close"}:
        plain, awaited = getattr(Client, name), getattr(AsyncClient, name)
        assert (awaited.__doc__ or "").startswith((plain.__doc__ or "?").rstrip()), name
        is_stream = "Iterator" in calls(Client)[name].return_annotation
        assert inspect.isasyncgenfunction(awaited) == is_stream, name
        assert inspect.iscoroutinefunction(awaited) != is_stream, name


def test_the_package_is_cheap_to_import() -> None:
    """Importing the generated messages loads neither gRPC nor the clients, yet every public name is available."""
    script = """
import sys
from vllm_batch.v1 import batch_service_pb2
assert not {"grpc", "tenacity", "rich", "vllm_batch.client"} & set(sys.modules), sorted(sys.modules)
from vllm_batch import *
assert Client.__module__ == "vllm_batch.client" and DEFAULT_TARGET and SubmitOptions
assert not {"rich", "click"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert set(vllm_batch.__all__) <= set(dir(vllm_batch))
    with pytest.raises(AttributeError, match="Cleint"):
        vllm_batch.Cleint  # noqa: B018


@pytest.mark.parametrize(
    ("limit", "stored", "sizes"),
    [(0, 9, []), (5, 9, [5]), (2500, 9000, [1000, 1000, 500]), (2500, 1200, [1000, 1000]), (1000, 1000, [1000])],
)
def test_listing_asks_for_no_more_than_its_limit(limit: int, stored: int, sizes: list[int]) -> None:
    """A listing fetches pages, each by the previous token, until the limit is reached or the last page has come."""
    listing = Listing(pb.ListBatchesRequest(states=["BATCH_STATE_COMPLETED"]), limit)
    asked, sent = [], 0
    while not listing.is_complete:
        assert listing.request.page_token == (str(sent) if sent else "")
        assert list(listing.request.states) == [pb.BATCH_STATE_COMPLETED]
        asked.append(listing.request.page_size)
        count = min(asked[-1], stored - sent)
        sent += count
        listing.came(count, str(sent) if sent < stored else "")
    assert asked == sizes
    assert sent == min(limit, stored)


@given(st.lists(st.binary(max_size=20), max_size=10), st.lists(st.integers(0, 200), max_size=12))
def test_lines_in_pieces_of_any_size(texts: list[bytes], cuts: list[int]) -> None:
    """However lines are split into pieces, they are put together again, whole and unchanged."""
    data = b"".join(text.replace(b"\n", b"") + b"\n" for text in texts)
    places = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    lines, taken = Lines(), []
    for begin, end in pairwise(places):
        taken.append(lines.take(data[begin:end]))
    assert b"".join(taken) == data
    assert all(not some or some.endswith(b"\n") for some in taken)


LINE = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {}}


@pytest.mark.parametrize(
    ("call", "kind", "name"),
    [
        (lambda client: client.get(5), TypeError, "batch_id"),
        (lambda client: client.result("batch_1", 5), TypeError, "custom_id"),
        (lambda client: client.list(limit=-1), ValueError, "limit"),
        (lambda client: client.list(limit=2.5), TypeError, "limit"),
        (lambda client: client.deliveries(limit=None), TypeError, "limit"),
        (lambda client: client.list(["completed"]), ValueError, "states"),
        (lambda client: client.list(tenant=5), TypeError, "tenant"),
        (lambda client: client.results("batch_1", order="input"), ValueError, "order"),
        (lambda client: client.result_bytes("batch_1", filter="failed"), ValueError, "filter"),
        (lambda client: client.submit_lines([5]), TypeError, "a line"),
        (lambda client: client.submit_lines([LINE], priority="high"), TypeError, "priority"),
        (lambda client: client.submit_lines([LINE], priority=1 << 40), ValueError, "priority"),
        (lambda client: client.submit_lines([LINE], metadata="team=search"), ValueError, "metadata"),
        (lambda client: client.submit_lines([LINE], metadata={"pages": 3}), TypeError, "metadata"),
        (lambda client: client.submit_lines([LINE], request_id=5), TypeError, "request_id"),
        (
            lambda client: client.submit_lines([LINE], completion_window_s=float("nan")),
            ValueError,
            "completion_window_s",
        ),
        (
            lambda client: client.submit_lines([LINE], completion_window_s=float("inf")),
            ValueError,
            "completion_window_s",
        ),
        (lambda client: client.submit_lines([LINE], completion_window_s="24h"), TypeError, "completion_window_s"),
        (lambda client: client.retry("batch_1", 5), TypeError, "request_id"),
    ],
)
def test_values_that_an_argument_cannot_have(call: Callable[[Any], Any], kind: type[Exception], name: str) -> None:
    """A value of the wrong type or range is an error that names the argument, in both clients and before any call."""

    def sync() -> None:
        with Client("127.0.0.1:1", patience_s=0) as client:
            found = call(client)
            next(found if inspect.isgenerator(found) else iter(()))

    async def aio() -> None:
        async with AsyncClient("127.0.0.1:1", patience_s=0) as client:
            found = call(client)
            await (anext(found) if inspect.isasyncgen(found) else found)

    for run in (sync, lambda: asyncio.run(aio())):
        with pytest.raises(kind, match=f"^{name} "):
            run()


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        ({"patience_s": float("nan")}, ValueError),
        ({"patience_s": -1}, ValueError),
        ({"patience_s": "5"}, TypeError),
        ({"patience_s": None}, TypeError),
        ({"target": None}, TypeError),
        ({"target": b"127.0.0.1:1"}, TypeError),
        ({"token": b"secret"}, TypeError),
    ],
)
def test_values_that_a_client_cannot_have(given: dict[str, Any], kind: type[Exception]) -> None:
    """A client is not made with what would fail with its first call, or never end."""
    with pytest.raises(kind, match=f"^{next(iter(given))} "):
        Client(**{"target": "127.0.0.1:1", **given})


def test_any_mapping_is_a_line() -> None:
    """A read-only mapping is as good as a dict."""
    assert to_bytes(MappingProxyType({"a": 1})) == b'{"a": 1}\n'


async def _unreadable(*_: object, **__: object) -> None:
    """What gRPC's asyncio API makes of an answer that it cannot read."""


@in_loop
async def test_an_answer_that_cannot_be_read() -> None:
    """An answer that is none of ours is a CallError of the asyncio client too."""
    async with AsyncClient("127.0.0.1:1", patience_s=0) as client:
        stub = SimpleNamespace(GetBatch=_unreadable, GetServiceStatus=_unreadable)
        stub.WatchBatch = lambda _: SimpleNamespace(read=_unreadable, cancel=lambda: None)
        client._stub = cast(Any, stub)
        for call in (client.get, client.wait):
            with pytest.raises(CallError, match=r"^INTERNAL: "):
                await call("batch_1")
        assert await client.accepting() == "Exception deserializing response!"


@pytest.mark.parametrize("details", [b"\xff\xff", b"", b"\x1a\x02\x12\x00"])
def test_details_that_are_none(details: bytes) -> None:
    """What another server sends in the place of details leaves code and message as they are."""
    failure = Failure(grpc.StatusCode.INTERNAL)
    failure.trailing_metadata = lambda: (("grpc-status-details-bin", details),)  # type: ignore[method-assign]
    error = CallError(failure)
    assert (error.code, error.message, error.reason) == (grpc.StatusCode.INTERNAL, "no", "")
