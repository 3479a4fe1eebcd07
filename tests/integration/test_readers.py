"""Readers of OpenAI's door over real sockets: of one that reads nothing more, nothing is kept."""

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import pytest
import uvicorn
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from service.http import certified
from tests.support.certificates import Authority

PIECE = bytes(1 << 20)


@pytest.mark.parametrize("is_secure", [False, True])
def test_a_reader_that_stopped(is_secure: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What makes an answer ends with the connection of a client that reads no more of it."""
    monkeypatch.setattr(certified, "ANSWER_TIMEOUT_S", 0.1)
    authority = Authority(tmp_path, "ca")
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    made.load_cert_chain(*authority.issue())

    async def run() -> None:
        ended = asyncio.Event()

        async def pieces() -> AsyncIterator[bytes]:
            try:
                while True:
                    # As one that reads from Postgres.
                    await asyncio.sleep(0)
                    yield PIECE
            finally:
                ended.set()

        async def answer(scope: Scope, receive: Receive, send: Send) -> None:
            await StreamingResponse(pieces())(scope, receive, send)

        context = made if is_secure else None
        config = uvicorn.Config(
            answer,
            http=certified.Protocol,
            loop="none",
            lifespan="off",
            log_config=None,
            ssl_context_factory=None if context is None else lambda *_: context,
        )
        server = uvicorn.Server(config)
        listening = socket.create_server(("127.0.0.1", 0))
        config.load()
        serving = asyncio.create_task(server._serve([listening]))
        reader, writer = await asyncio.open_connection(
            *listening.getsockname(), ssl=ssl.create_default_context(cafile=authority.file) if is_secure else None
        )
        writer.write(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        await reader.readexactly(4 * len(PIECE))
        assert not ended.is_set()
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        await asyncio.wait_for(ended.wait(), 60)
        with suppress(OSError):
            writer.close()
            await writer.wait_closed()
        assert not server.server_state.connections
        server.should_exit = True
        await serving

    asyncio.run(run())
