"""Who is at the other end of a connection, by its client certificate, as gRPC has it."""

import asyncio
from collections.abc import Mapping
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

# Of what ASGI calls the state of a request.
_IDENTITIES = "identities"


class Protocol(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
    """uvicorn's, which tells each request the identities in the certificate of its connection."""

    app_state: dict[str, Any]

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Looks at the certificate once: the handshake is over."""
        super().connection_made(transport)
        connection = transport.get_extra_info("ssl_object")
        # Empty unless it was verified.
        peer = connection.getpeercert() if connection is not None else None
        self.app_state = {**self.app_state, _IDENTITIES: identities(peer or {})}


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
