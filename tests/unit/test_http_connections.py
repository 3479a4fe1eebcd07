"""Connections to OpenAI's door: what stays silent is ended, wherever in a request it does."""

import asyncio
import itertools
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
import uvicorn
from uvicorn.server import ServerState

from service.errors import ApiError
from service.http import certified, door, multipart

REQUEST = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"


class Transport(asyncio.Transport):
    """A connection of which only the end is looked at."""

    def __init__(self) -> None:
        super().__init__()
        self.aborted = asyncio.Event()
        self.closed = asyncio.Event()
        self.written = b""
        # What is not sent yet, and what the other side says, look after look, to have of the rest.
        self.unsent = 0
        self.acknowledged: Iterator[int] = itertools.repeat(0)

    def abort(self) -> None:
        self.aborted.set()

    def write(self, data: Any) -> None:
        self.written += data

    def close(self) -> None:
        self.closed.set()

    def get_write_buffer_size(self) -> int:
        return self.unsent

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self if name == "socket" else default

    def getsockopt(self, *_: int) -> bytes:
        return bytes(120) + next(self.acknowledged).to_bytes(8, "little")

    def getsockname(self) -> tuple[str, int]:
        return "127.0.0.1", 1

    getpeername = getsockname

    def pause_reading(self) -> None:
        """All is there already."""

    def resume_reading(self) -> None:
        """The same."""

    def is_closing(self) -> bool:
        return self.aborted.is_set() or self.closed.is_set()


async def answer(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body", "body": b""})


async def echo(scope: Any, receive: Any, send: Any) -> None:
    body, is_complete = b"", False
    while not is_complete:
        message = await receive()
        body, is_complete = body + message["body"], not message["more_body"]
    headers = [(b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def connected(app: Any = answer, state: ServerState | None = None) -> tuple[certified.Protocol, Transport]:
    config = uvicorn.Config(app, lifespan="off", log_config=None, ws="none")
    config.load()
    protocol = certified.Protocol(config=config, server_state=state or ServerState(), app_state={})
    transport = Transport()
    protocol.connection_made(transport)
    return protocol, transport


def test_more_connections_than_one_port_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Further ones are closed at once, and there is room again when one has ended."""
    monkeypatch.setattr(certified, "MAX_CONNECTIONS", 2)

    async def run() -> None:
        state = ServerState()
        (first, one), (_, two), (third, three) = (connected(state=state) for _ in range(3))
        assert [each.aborted.is_set() for each in (one, two, three)] == [False, False, True]
        for protocol in (third, first):
            protocol.connection_lost(None)
        assert not connected(state=state)[1].aborted.is_set()

    asyncio.run(run())


@pytest.mark.parametrize("sent", [b"", b"G", REQUEST[:-1], REQUEST + b"G", REQUEST * 2 + REQUEST[:20]])
def test_a_connection_that_sends_no_whole_headers_is_ended(sent: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Headers have a time limit, from the connection and from their first byte on: nobody can hold connections."""
    monkeypatch.setattr(certified, "HEADERS_TIMEOUT_S", 0.01)

    async def run() -> None:
        protocol, transport = connected()
        protocol.data_received(sent)
        await asyncio.wait_for(transport.aborted.wait(), 30)

    asyncio.run(run())


@pytest.mark.parametrize("sent", [REQUEST, b"POST / HTTP/1.1\r\nContent-Length: 9\r\n\r\n"])
def test_a_connection_with_whole_headers_is_left_alone(sent: bytes) -> None:
    """While a body arrives or an answer is made, and between requests, other limits apply."""

    async def run() -> None:
        protocol, transport = connected()
        assert protocol._silence
        protocol.data_received(sent)
        assert protocol._silence is None
        protocol.connection_lost(None)
        assert not transport.aborted.is_set()

    asyncio.run(run())


@pytest.mark.parametrize("first", [b"GET /" + b"a" * 1000, REQUEST[:-2], REQUEST + REQUEST[:-2]])
def test_headers_without_an_end(first: bytes) -> None:
    """Before it is known who calls, nobody fills the memory: URL and headers have a size limit."""

    async def run() -> None:
        protocol, transport = connected()
        protocol.data_received(first)
        more = b"a" * 1000 if first.startswith(b"GET /a") else b"X-More: " + b"a" * 990 + b"\r\n"
        sent = 0
        while not transport.aborted.is_set():
            protocol.data_received(more)
            sent += len(more)
            assert sent < 2 * certified.MAX_HEADERS_BYTES

    asyncio.run(run())


def test_headers_with_a_large_body() -> None:
    """What arrives together with the headers does not count as one of them."""

    async def run() -> None:
        protocol, transport = connected()
        size = 2 * certified.MAX_HEADERS_BYTES
        protocol.data_received(b"POST / HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % size + b"a" * size)
        assert not transport.aborted.is_set()

    asyncio.run(run())


@pytest.mark.parametrize("rest", [b"a", b"a" * 9])
def test_a_body_that_goes_on_after_its_answer(rest: bytes) -> None:
    """A request that is refused before its body has come does not keep its connection for ever."""

    async def run() -> None:
        protocol, transport = connected()
        protocol.timeout_keep_alive = 0.01
        protocol.data_received(b"POST / HTTP/1.1\r\nContent-Length: 9\r\n\r\n")
        await asyncio.wait(protocol.tasks)
        assert protocol.cycle.response_complete
        protocol.data_received(rest)
        await asyncio.wait_for(transport.closed.wait(), 30)

    asyncio.run(run())


def test_nothing_is_kept_of_a_connection_that_is_reset() -> None:
    """Proxies reset idle connections: no clock holds the memory of one that is gone."""

    async def run() -> None:
        protocol, _ = connected()
        protocol.data_received(REQUEST)
        await asyncio.wait(protocol.tasks)
        timer = protocol.timeout_keep_alive_task
        assert timer is not None
        protocol.connection_lost(ConnectionResetError())
        assert timer.cancelled()

    asyncio.run(run())


OFFER = b"Host: a\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQ\r\n"


@pytest.mark.parametrize(
    ("sent", "bodies"),
    [
        (b"POST / HTTP/1.1\r\n" + OFFER + b"Content-Length: 3\r\n\r\nabc", [b"abc"]),
        (
            b"POST / HTTP/1.1\r\n" + OFFER + b"Transfer-Encoding: chunked\r\n\r\n2\r\nab\r\n1\r\nc\r\n0\r\n\r\n",
            [b"abc"],
        ),
        (b"GET / HTTP/1.1\r\n" + OFFER + b"\r\n" + REQUEST, [b"", b""]),
        ((b"POST / HTTP/1.1\r\n" + OFFER + b"Content-Length: 3\r\n\r\nabc") * 3, [b"abc"] * 3),
    ],
)
def test_another_protocol_is_offered(sent: bytes, bodies: list[bytes]) -> None:
    """A client that offers HTTP/2, as Java's does, is answered as if it had not, wherever its request is cut in two."""

    async def run() -> None:
        for place in range(1, len(sent)):
            protocol, transport = connected(echo)
            for part in (sent[:place], sent[place:]):
                protocol.data_received(part)
                await asyncio.sleep(0)
            while protocol.tasks:
                await asyncio.wait(protocol.tasks)
            found = [answer.partition(b"\r\n\r\n")[2] for answer in transport.written.split(b"HTTP/1.1 200 OK")[1:]]
            assert found == bodies, place
            protocol.connection_lost(None)

    asyncio.run(run())


def test_what_follows_an_offer_is_no_request() -> None:
    """It is answered as such."""

    async def run() -> None:
        protocol, transport = connected(echo)
        protocol.data_received(b"POST / HTTP/1.1\r\n" + OFFER + b"Transfer-Encoding: chunked\r\n\r\nno number\r\n")
        assert transport.written.startswith(b"HTTP/1.1 400 ")
        protocol.connection_lost(None)
        await asyncio.wait(protocol.tasks)

    asyncio.run(run())


def test_an_answer_that_nobody_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that takes in nothing of its answer is not waited for, also when it took in some before."""
    monkeypatch.setattr(certified, "ANSWER_TIMEOUT_S", 0.01)

    async def run() -> None:
        _, transport = connected()
        transport.acknowledged, transport.unsent = itertools.chain(range(5), itertools.repeat(5)), 9
        await asyncio.wait_for(transport.aborted.wait(), 30)
        assert next(transport.acknowledged) == 5

    asyncio.run(run())


def test_an_answer_that_is_read_slowly(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that takes in a byte now and then is left alone, however long it takes."""
    monkeypatch.setattr(certified, "ANSWER_TIMEOUT_S", 0.001)

    async def run() -> None:
        protocol, transport = connected()
        is_seen = asyncio.Event()

        def acknowledged() -> Iterator[int]:
            yield from range(20)
            is_seen.set()
            yield from itertools.count(20)

        transport.acknowledged = acknowledged()
        transport.unsent = 9
        await asyncio.wait_for(is_seen.wait(), 30)
        protocol.connection_lost(None)
        assert not transport.aborted.is_set()
        assert protocol._answer is not None
        assert protocol._answer.cancelled()

    asyncio.run(run())


def test_a_body_that_stops_arriving(monkeypatch: pytest.MonkeyPatch) -> None:
    """A body that is read as a whole has the limit of an upload's pieces; once it is complete there is none."""
    monkeypatch.setattr(multipart, "PIECE_TIMEOUT_S", 0.01)

    async def silent() -> dict[str, Any]:
        await asyncio.Event().wait()
        raise AssertionError

    async def run() -> None:
        with pytest.raises(ApiError) as raised:
            await door._limited(silent, {})()
        assert raised.value.code is grpc.StatusCode.DEADLINE_EXCEEDED
        gone: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        gone.put_nowait({"type": "http.request", "body": b"{}", "more_body": False})
        limited = door._limited(gone.get, {})
        await limited()
        asyncio.get_running_loop().call_later(0.1, gone.put_nowait, {"type": "http.disconnect"})
        assert await limited() == {"type": "http.disconnect"}

    asyncio.run(run())
