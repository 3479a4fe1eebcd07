"""TLS with certificates that can be replaced without a restart, as on the gRPC ports."""

import ssl
from typing import Any

from service.auth.key_files import Reloaded, check_authorities, check_pair
from service.config import Settings


def context(settings: Settings) -> ssl.SSLContext | None:
    """The context of the server, which takes the current key files at each handshake. None: no TLS.

    Raises ValueError or OSError if a key file is invalid.
    """
    certificate, key, authorities = settings.server_cert, settings.server_key, settings.client_ca
    if certificate is None or key is None:
        return None

    def read() -> ssl.SSLContext:
        check_pair(certificate, key)
        made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        made.minimum_version = ssl.TLSVersion.TLSv1_2
        made.set_alpn_protocols(["http/1.1"])
        made.load_cert_chain(certificate, key)
        if authorities is not None:
            check_authorities(authorities)
            made.load_verify_locations(authorities)
            made.verify_mode = ssl.CERT_REQUIRED
        return made

    files = Reloaded([certificate, key, *([authorities] if authorities else [])], read)
    first = files.get()

    def changed(connection: Any, name: str | None, of: ssl.SSLContext) -> None:
        # Called before each handshake, also when the client names no host.
        newest = files.get()
        if newest is not of:
            connection.context = newest

    first.sni_callback = changed
    return first
