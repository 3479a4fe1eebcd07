"""Connections: who is at the other end, by its client certificate, as gRPC has it; silent ones are closed."""

import asyncio
import socket
import sys
from collections.abc import Mapping
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

from service.telemetry import logs

# Of what ASGI calls the state of a request.
_IDENTITIES = "identities"

# As on a gRPC port: excess ones are closed. uvicorn's limit_concurrency keeps them, and only refuses their requests.
MAX_CONNECTIONS = 1_000
# How long the headers of a request may take, from the connection or from their first byte on: uvicorn has no limit, and
# connections that send nothing would take all that a process can have.
HEADERS_TIMEOUT_S = 60.0
# How large they may be, the URL included. uvicorn has no limit here either, and who calls is not known before.
MAX_HEADERS_BYTES = 64 << 10
# How often to check that a client reads its answer. One that has read nothing since is cut off: uvicorn would wait for
# ever, with a piece of the answer and the task that makes the rest in memory.
ANSWER_TIMEOUT_S = 60.0
# Of TCP_INFO: how many bytes the other side has acknowledged.
_ACKNOWLEDGED = slice(120, 128)

log = logs.get("http")


class Protocol(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
    """uvicorn's, which tells each request the identities in the certificate of its connection, and limits silence."""

    app_state: dict[str, Any]
    connections: set[Any]
    timeout_keep_alive_task: asyncio.TimerHandle | None
    _silence: asyncio.TimerHandle | None = None
    _awaited_bytes = 0
    _answer: asyncio.TimerHandle | None = None
    # At the last check: how much was not sent yet, and how much was acknowledged.
    _untaken: tuple[int, bytes] = (0, b"")
    _data = b""
    _is_resuming = False

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Looks at the certificate once: the handshake is over."""
        super().connection_made(transport)
        if len(self.connections) > MAX_CONNECTIONS:
            transport.abort()
            return
        connection = transport.get_extra_info("ssl_object")
        # Empty unless it was verified.
        peer = connection.getpeercert() if connection is not None else None
        self.app_state = {**self.app_state, _IDENTITIES: identities(peer or {})}
        self._await_headers()
        self._look_at_answer()

    def data_received(self, data: bytes) -> None:
        """Part of a request. Ends the connection when its headers are too large."""
        self._awaited_bytes += len(data)
        self._data = data
        super().data_received(data)
        self._data = b""
        if self.transport.is_closing():
            return
        if self._silence is not None:
            if self._awaited_bytes > MAX_HEADERS_BYTES:
                self.transport.abort()
        elif self.cycle is not None and self.cycle.response_complete and self.timeout_keep_alive_task is None:
            # More of a body that was answered before it was complete: uvicorn takes it for the next request, and stops
            # the clock of a connection without one.
            later = asyncio.get_running_loop().call_later
            self.timeout_keep_alive_task = later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def on_message_begin(self) -> None:
        """The first byte of a request."""
        if not self._is_resuming:
            self._await_headers()
            super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        """A part of the URL."""
        if not self._is_resuming:
            super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header."""
        if not self._is_resuming:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """What follows is the body, whose pieces have a limit of their own."""
        if not self._is_resuming:
            self._end_silence()
            super().on_headers_complete()

    def on_message_complete(self) -> None:
        """The end of a request, unless its body is still to be read, by another parser."""
        if not self.parser.should_upgrade() or self.scope["method"] == "CONNECT":
            super().on_message_complete()

    def _unsupported_upgrade_warning(self) -> None:
        """Reads on after the headers of a request that offers another protocol.

        Java's HTTP client offers HTTP/2 in each first request over http. To go on without it is right (RFC 9110, 7.8),
        but the parser takes what follows for the other protocol, and uvicorn for nothing: the body would be lost.
        """
        offer, rest = sys.exc_info()[1], self._data
        while offer is not None and self.scope["method"] != "CONNECT":
            rest = rest[offer.args[0] :]
            offer = self._read_on(rest)

    def _read_on(self, rest: bytes) -> Exception | None:
        """Reads what follows the headers that were read last. Returns that another protocol is offered there, too."""
        # There are machines without it.
        import httptools

        framing = [pair for pair in self.headers if pair[0] in (b"content-length", b"transfer-encoding")]
        self.parser = httptools.HttpRequestParser(self)
        try:
            self._is_resuming = True
            self.parser.feed_data(b"POST / HTTP/1.1\r\n%s\r\n" % b"".join(b"%s: %s\r\n" % pair for pair in framing))
            self._is_resuming = False
            self.parser.feed_data(rest)
        except httptools.HttpParserError:
            self.send_400_response("Invalid HTTP request received.")
        except httptools.HttpParserUpgrade as offer:
            return offer
        return None

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing comes any more."""
        self._end_silence()
        if self._answer is not None:
            self._answer.cancel()
        super().connection_lost(exc)
        # uvicorn lets it run when the client resets the connection, and it holds all that belongs to that.
        if self.timeout_keep_alive_task is not None:
            self.timeout_keep_alive_task.cancel()
            self.timeout_keep_alive_task = None

    def _await_headers(self) -> None:
        self._end_silence()
        self._awaited_bytes = 0
        # uvicorn's other parser, for machines without httptools, does not tell where headers end.
        if hasattr(AutoHTTPProtocol, "on_headers_complete"):
            self._silence = asyncio.get_running_loop().call_later(HEADERS_TIMEOUT_S, self.transport.abort)

    def _look_at_answer(self) -> None:
        size = self.transport.get_write_buffer_size()
        if size:
            # What is left in the buffer is not enough to tell: TLS and the system have their own.
            connection = self.transport.get_extra_info("socket")
            found = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _ACKNOWLEDGED.stop)
            last, self._untaken = self._untaken, (size, found[_ACKNOWLEDGED])
            if self._untaken == last:
                log.info("answer_not_read", peer=str(self.client))
                self.transport.abort()
                return
        else:
            self._untaken = (0, b"")
        self._answer = asyncio.get_running_loop().call_later(ANSWER_TIMEOUT_S, self._look_at_answer)

    def _end_silence(self) -> None:
        if self._silence is not None:
            self._silence.cancel()
            self._silence = None


def identities(peer: Mapping[str, Any]) -> tuple[bytes, ...]:
    """A certificate's subject alternative names; its common name if it has none. `peer`: as `getpeercert` has it."""
    names = [value for _, value in peer.get("subjectAltName", ()) if isinstance(value, str)]
    if not names:
        names = [value for part in peer.get("subject", ()) for key, value in part if key == "commonName"][:1]
    return tuple(name.encode() for name in names)


def of_request(scope: Mapping[str, Any]) -> tuple[bytes, ...]:
    """The identities of the client that makes a request; none without a certificate."""
    found: tuple[bytes, ...] = scope.get("state", {}).get(_IDENTITIES, ())
    return found
