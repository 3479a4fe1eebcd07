"""TLS for the tests' Postgres, which is built without it: handles the TLS handshake of libpq's protocol and forwards
the rest, like a provider's proxy."""

import asyncio
import contextlib
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# libpq's first message when it wants TLS.
SSL_REQUEST = (8).to_bytes(4, "big") + (80877103).to_bytes(4, "big")
GREETING_TIMEOUT_S = 10


class TlsPostgres:
    """A port on loopback for the Postgres at a Unix socket. Each connection gets the certificate in the files."""

    def __init__(self, socket: str, pair: tuple[Path, Path]) -> None:
        self._socket = socket
        self._pair = pair
        self._loop = asyncio.new_event_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server = self._loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.port = int(self._server.sockets[0].getsockname()[1])
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        # A client that rejects the certificate disconnects.
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, TimeoutError, asyncio.CancelledError):
            async with asyncio.timeout(GREETING_TIMEOUT_S):
                assert await reader.readexactly(len(SSL_REQUEST)) == SSL_REQUEST
                writer.write(b"S")
                context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
                context.load_cert_chain(*self._pair)
                await writer.start_tls(context)
            read_server, write_server = await asyncio.open_unix_connection(self._socket)
            pumps = [asyncio.create_task(_pump(reader, write_server)), asyncio.create_task(_pump(read_server, writer))]
            try:
                await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            finally:
                write_server.close()
                for pump in pumps:
                    pump.cancel()
        writer.close()
        self._tasks.discard(task)

    def cut(self) -> None:
        """Ends all connections."""

        async def end() -> None:
            for task in self._tasks:
                task.cancel()
            if self._tasks:
                await asyncio.wait(self._tasks)

        asyncio.run_coroutine_threadsafe(end(), self._loop).result(10)

    def close(self) -> None:
        """Ends all connections and the port."""
        self._loop.call_soon_threadsafe(self._server.close)
        self.cut()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(65_536):
            writer.write(data)
            await writer.drain()


@contextmanager
def tls_postgres(socket: str, pair: tuple[Path, Path]) -> Iterator[TlsPostgres]:
    """Serves until the block ends."""
    server = TlsPostgres(socket, pair)
    try:
        yield server
    finally:
        server.close()
