"""Connections: who is at the other end, by its client certificate, as gRPC has it; silent ones are closed."""

import asyncio
from collections.abc import Mapping
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

# Of what ASGI calls the state of a request.
_IDENTITIES = "identities"


# How long the headers of a request may take, from the connection or from their first byte on: uvicorn has no limit, and
# connections that send nothing would take all that a process can have.
HEADERS_TIMEOUT_S = 60.0


class Protocol(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
    """uvicorn's, which tells each request the identities in the certificate of its connection, and limits silence."""

    app_state: dict[str, Any]
    _silence: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Looks at the certificate once: the handshake is over."""
        super().connection_made(transport)
        connection = transport.get_extra_info("ssl_object")
        # Empty unless it was verified.
        peer = connection.getpeercert() if connection is not None else None
        self.app_state = {**self.app_state, _IDENTITIES: identities(peer or {})}
        self._await_headers()

    def on_message_begin(self) -> None:
        """The first byte of a request."""
        self._await_headers()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """What follows is the body, whose pieces have a limit of their own."""
        self._end_silence()
        super().on_headers_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing comes any more."""
        self._end_silence()
        super().connection_lost(exc)

    def _await_headers(self) -> None:
        self._end_silence()
        # uvicorn's other parser, for machines without httptools, does not tell where headers end.
        if hasattr(AutoHTTPProtocol, "on_headers_complete"):
            self._silence = asyncio.get_running_loop().call_later(HEADERS_TIMEOUT_S, self.transport.abort)

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
