"""Channels to the gateway or the watchdog, with TLS and a token from arguments or the environment.

| argument          | environment                        |                                                          |
| ----------------- | ---------------------------------- | -------------------------------------------------------- |
| `tls_ca`          | `BATCH_TLS_CA`                     | CA bundle used to verify the server; enables TLS         |
| `tls_cert`        | `BATCH_TLS_CERT`                   | client certificate, where the server requires one        |
| `tls_key`         | `BATCH_TLS_KEY`                    | private key of the client certificate                    |
| `tls_server_name` | `BATCH_TLS_SERVER_NAME`            | name in the server's certificate, if not the target's    |
| `token`           | `BATCH_TOKEN`, `BATCH_TOKEN_FILE`  | bearer token; the latter variable names a file with it   |

The first three are paths of PEM files. None: use the environment. Empty: use none, even if the environment has one.

gRPC uses the proxy in `grpc_proxy`, `https_proxy` or `http_proxy`, unless `no_grpc_proxy` or `no_proxy` names the
target. Loopback targets and Unix sockets are never called through one.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc

from vllm_batch import small_files

Options = Sequence[tuple[str, Any]]

DEFAULT_TARGET = "127.0.0.1:50051"
DEFAULT_WATCHDOG_TARGET = "127.0.0.1:50053"
# Its health (grpc.health.v1) says whether new work is accepted.
BATCH_SERVICE = "vllm_batch.v1.BatchService"
# Schemes of gRPC whose addresses are not host:port.
_SCHEMES = ("unix:", "unix-abstract:", "vsock:", "ipv4:", "ipv6:", "xds:")
_HOST = re.compile(r"\[[0-9A-Fa-f:.]+(%[^\s\]]+)?\]|[^\s/@\[\]?#]+")
# The server's limit too.
MAX_MESSAGE_BYTES = 64 << 20

OPTIONS: Options = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # A stream without a deadline fails about 15 s after its server falls silent.
    ("grpc.keepalive_time_ms", 10_000),
    # keepalive_timeout_ms does not shorten this timeout, which is a minute by default.
    ("grpc.http2.ping_timeout_ms", 5_000),
    # Otherwise gRPC would send a ping only every minute after two pings without data.
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.max_reconnect_backoff_ms", 5_000),
    # The name may stand for another address by then; gRPC asks only every 30 s.
    ("grpc.dns_min_time_between_resolutions_ms", 1_000),
)


def open_channel(target: str, *, options: Options = OPTIONS, **security: str | None) -> grpc.Channel:
    """A channel to `target`, host:port. Raises OSError for an unreadable file, TypeError for an unknown argument.

    Raises ValueError when the settings contradict each other, or when a token would be sent to another machine without
    TLS (allowed by BATCH_ALLOW_INSECURE=true).
    """
    credentials, token, options = _secured(target, _direct(target, options), **security)
    if credentials is None:
        channel = grpc.insecure_channel(target, options=options)
    else:
        channel = grpc.secure_channel(target, credentials, options=options)
    return grpc.intercept_channel(channel, _WithToken(token)) if token else channel


def open_aio_channel(target: str, *, options: Options = OPTIONS, **security: str | None) -> grpc.aio.Channel:
    """A channel for asyncio; see `open_channel`."""
    credentials, token, options = _secured(target, _direct(target, options), **security)
    # grpc.aio registers each interceptor for one kind of call only.
    interceptors = [kind(token) for kind in _AIO_KINDS] if token else []
    if credentials is None:
        return grpc.aio.insecure_channel(target, options=options, interceptors=interceptors)
    return grpc.aio.secure_channel(target, credentials, options=options, interceptors=interceptors)


def _direct(target: str, options: Options) -> Options:
    return (*options, ("grpc.enable_http_proxy", 0)) if _is_local(target) else options


def _secured(
    target: str,
    options: Options,
    *,
    tls_ca: str | None = None,
    tls_cert: str | None = None,
    tls_key: str | None = None,
    tls_server_name: str | None = None,
    token: str | None = None,
) -> tuple[grpc.ChannelCredentials | None, str, Options]:
    ca = _given(tls_ca, "BATCH_TLS_CA")
    certificate, key = _given(tls_cert, "BATCH_TLS_CERT"), _given(tls_key, "BATCH_TLS_KEY")
    server_name = _given(tls_server_name, "BATCH_TLS_SERVER_NAME")
    if not isinstance(token, str | None):
        raise TypeError(f"token must be a str, not {type(token).__name__}")
    # As in a file, a line break may follow, which the kept secrets of other systems often end with.
    secret = _given(token, "BATCH_TOKEN").strip()
    token_file = os.environ.get("BATCH_TOKEN_FILE", "")
    if token is None and not secret and token_file:
        secret = _read("BATCH_TOKEN_FILE", token_file).decode(errors="replace").strip()
    if not (secret.isascii() and secret.isprintable()):
        raise ValueError("the token has characters that no token has: it must be printable ASCII, in one line")
    if bool(certificate) != bool(key):
        raise ValueError("a client certificate and its key must both be set: BATCH_TLS_CERT, BATCH_TLS_KEY")
    if certificate and not ca:
        raise ValueError("client certificates require TLS: set BATCH_TLS_CA")
    if not ca:
        is_allowed = os.environ.get("BATCH_ALLOW_INSECURE", "").lower() in ("1", "true", "yes", "on")
        if secret and not is_allowed and not _is_local(target):
            raise ValueError(f"a token would be sent to {target} in plain text: set BATCH_TLS_CA")
        return None, secret, options
    trusted = _read("BATCH_TLS_CA", ca)
    pair = (_read("BATCH_TLS_KEY", key), _read("BATCH_TLS_CERT", certificate)) if certificate else (None, None)
    _check_files(ca, certificate, key)
    credentials = grpc.ssl_channel_credentials(trusted, *pair)
    if server_name:
        options = (*options, ("grpc.ssl_target_name_override", server_name))
    return credentials, secret, options


def _read(variable: str, path: str) -> bytes:
    """The content of a file. Raises OSError, or, for what is no small file, ValueError that names the variable."""
    try:
        return small_files.read(Path(path))
    except ValueError as error:
        raise ValueError(f"{variable}: {error}") from None


def _check_files(ca: str, certificate: str, key: str) -> None:
    """Raises ValueError for files that gRPC cannot use, with which it would only fail to connect, again and again."""
    # Not needed without TLS.
    import ssl

    def password() -> str:
        raise ValueError(f"BATCH_TLS_KEY: {key} is encrypted, which gRPC cannot read")

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        context.load_verify_locations(ca)
    except ssl.SSLError:
        raise ValueError(f"BATCH_TLS_CA: {ca} has no certificate in PEM form") from None
    if certificate:
        try:
            context.load_cert_chain(certificate, key, password)
        except ssl.SSLError:
            what = f"{certificate} and {key} are not a certificate and its key in PEM form"
            raise ValueError(f"BATCH_TLS_CERT, BATCH_TLS_KEY: {what}") from None


def check_target(target: str) -> None:
    """Raises ValueError for an invalid address, which gRPC would try to reach until patience ends.

    Valid are `host:port`, `[IPv6]:port`, `dns:host:port`, `dns://server/host:port`, and gRPC's other schemes, which are
    left to gRPC.
    """
    if not isinstance(target, str):
        raise TypeError(f"target must be a str, host:port, not {target!r}")
    if target.startswith(_SCHEMES):
        return
    wrong = f"{target!r} is no address"
    if "://" in target and not target.startswith("dns://"):
        raise ValueError(f"{wrong}: give host:port, without {target.partition('://')[0]}://")
    address = target.removeprefix("dns:")
    address = address.rpartition("/")[2] if address.startswith("//") else address
    host, colon, port = address.rpartition(":")
    if not colon or not host:
        raise ValueError(f"{wrong}: give host:port")
    if ":" in host and not (host.startswith("[") and host.endswith("]")):
        raise ValueError(f"{wrong}: an IPv6 address is written [address]:port")
    if not _HOST.fullmatch(host):
        raise ValueError(f"{wrong}: give host:port")
    if not (port.isascii() and port.isdigit() and 1 <= int(port) <= 65535):
        raise ValueError(f"{wrong}: {port[:20]!r} is no port, which is a number from 1 to 65535")


def _given(argument: str | None, variable: str) -> str:
    return os.environ.get(variable, "") if argument is None else argument


def _is_local(target: str) -> bool:
    host = target.rpartition("/")[2] if "://" in target else target
    if host.startswith("unix:"):
        return True
    host = host.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class _Details(grpc.ClientCallDetails):
    """The details of a call, with a token added to its metadata."""

    def __init__(self, details: Any, token: str) -> None:
        self.method = details.method
        self.timeout = details.timeout
        self.metadata = (*(details.metadata or ()), ("authorization", f"Bearer {token}"))
        self.credentials = details.credentials
        self.wait_for_ready = details.wait_for_ready
        self.compression = details.compression


class _WithToken(
    grpc.UnaryUnaryClientInterceptor,
    grpc.UnaryStreamClientInterceptor,
    grpc.StreamUnaryClientInterceptor,
    grpc.StreamStreamClientInterceptor,
):
    """Sends a token with every call."""

    def __init__(self, token: str) -> None:
        self._token = token

    def intercept_unary_unary(self, continuation: Any, details: Any, request: Any) -> Any:
        return continuation(_Details(details, self._token), request)

    def intercept_unary_stream(self, continuation: Any, details: Any, request: Any) -> Any:
        return continuation(_Details(details, self._token), request)

    def intercept_stream_unary(self, continuation: Any, details: Any, requests: Any) -> Any:
        return continuation(_Details(details, self._token), requests)

    def intercept_stream_stream(self, continuation: Any, details: Any, requests: Any) -> Any:
        return continuation(_Details(details, self._token), requests)


class _AioWithToken:
    def __init__(self, token: str) -> None:
        self._token = token

    def _details(self, details: Any) -> Any:
        metadata = grpc.aio.Metadata(*(details.metadata or ()), ("authorization", f"Bearer {self._token}"))
        return details._replace(metadata=metadata)


class _UnaryUnary(_AioWithToken, grpc.aio.UnaryUnaryClientInterceptor):
    async def intercept_unary_unary(self, continuation: Any, details: Any, request: Any) -> Any:
        return await continuation(self._details(details), request)


class _UnaryStream(_AioWithToken, grpc.aio.UnaryStreamClientInterceptor):
    async def intercept_unary_stream(self, continuation: Any, details: Any, request: Any) -> Any:
        return await continuation(self._details(details), request)


class _StreamUnary(_AioWithToken, grpc.aio.StreamUnaryClientInterceptor):
    async def intercept_stream_unary(self, continuation: Any, details: Any, requests: Any) -> Any:
        return await continuation(self._details(details), requests)


class _StreamStream(_AioWithToken, grpc.aio.StreamStreamClientInterceptor):
    async def intercept_stream_stream(self, continuation: Any, details: Any, requests: Any) -> Any:
        return await continuation(self._details(details), requests)


_AIO_KINDS = (_UnaryUnary, _UnaryStream, _StreamUnary, _StreamStream)
