"""The ports of all servers: their limits, and TLS whose certificates can be replaced without a restart."""

from collections.abc import Callable
from pathlib import Path
from typing import cast
from urllib.parse import unquote

import grpc

from service import addresses
from service.auth.key_files import Reloaded, check_authorities, check_pair
from service.config import Settings
from vllm_batch import small_files

# Per-call metadata; above the soft limit gRPC rejects at random, more often the larger it is.
SOFT_METADATA_BYTES = 8 << 10
MAX_METADATA_BYTES = 16 << 10

OPTIONS = (
    # Otherwise two servers could bind one port, and each would get some of the calls.
    ("grpc.so_reuseport", 0),
    # Clients may ping every 2.5 s, also between calls: that is how they notice a frozen server. A client that pings
    # more often is disconnected at the third such ping since the server last sent it anything.
    ("grpc.http2.min_ping_interval_without_data_ms", 2_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_ping_strikes", 2),
    ("grpc.max_metadata_size", SOFT_METADATA_BYTES),
    ("grpc.absolute_max_metadata_size", MAX_METADATA_BYTES),
    # Concurrent calls per connection: excess ones wait. Connections: excess ones are closed.
    ("grpc.max_concurrent_streams", 1_000),
    ("grpc.max_allowed_incoming_connections", 1_000),
    ("grpc.server_handshake_timeout_ms", 10_000),
)


def open(server: grpc.Server | grpc.aio.Server, settings: Settings, port: int) -> int:
    """Adds a port, with TLS if the settings have a certificate. Returns its number.

    Raises RuntimeError if the port cannot be bound, ValueError or OSError if a key file is invalid.
    """
    credentials = _credentials(settings)
    address = addresses.joined(settings.host, port)
    return server.add_secure_port(address, credentials) if credentials else server.add_insecure_port(address)


def open_socket(server: grpc.aio.Server, address: str) -> None:
    """Adds a Unix socket for its owner only. Raises RuntimeError if it cannot be bound."""
    path = Path(unquote(address.removeprefix("unix:")))
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    server.add_insecure_port(address)
    path.chmod(0o700)


def _credentials(settings: Settings) -> grpc.ServerCredentials | None:
    if settings.server_cert is None or settings.server_key is None:
        return None
    certificate, key, authorities = settings.server_cert, settings.server_key, settings.client_ca

    def read() -> grpc.ServerCertificateConfiguration:
        check_pair(certificate, key)
        if authorities is not None:
            check_authorities(authorities)
        pair = (small_files.read(key), small_files.read(certificate))
        trusted = small_files.read(authorities) if authorities else None
        return grpc.ssl_server_certificate_configuration([pair], trusted)

    paths: list[Path] = [certificate, key, *([authorities] if authorities else [])]
    files = Reloaded(paths, read)
    current = files.get()

    def changed() -> grpc.ServerCertificateConfiguration | None:
        # gRPC calls this before each handshake. None: keep the current configuration.
        nonlocal current
        newest = files.get()
        if newest is current:
            return None
        current = newest
        return newest

    # gRPC's documentation allows None here, its stubs do not.
    fetch = cast(Callable[[], grpc.ServerCertificateConfiguration], changed)
    return grpc.dynamic_ssl_server_credentials(current, fetch, require_client_authentication=authorities is not None)
