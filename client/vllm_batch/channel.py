"""Channels to a gateway or a watchdog: with TLS and a token, as arguments or the environment say.

| argument          | environment                        |                                                           |
| ----------------- | ---------------------------------- | --------------------------------------------------------- |
| `tls_ca`          | `BATCH_TLS_CA`                     | file of the authorities that servers are known by         |
| `tls_cert`        | `BATCH_TLS_CERT`                   | file of this client's certificate, where one is asked for |
| `tls_key`         | `BATCH_TLS_KEY`                    | file of the key of that certificate                       |
| `tls_server_name` | `BATCH_TLS_SERVER_NAME`            | name in the server's certificate, if not that of `target` |
| `token`           | `BATCH_TOKEN`, `BATCH_TOKEN_FILE`  | bearer token, or a file that holds it                     |

None: what the environment says. Empty: none, whatever it says. TLS is used when there is a `tls_ca`.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc

Options = Sequence[tuple[str, Any]]

OPTIONS: Options = (
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.max_send_message_length", 64 << 20),
    # A stream without a deadline ends within about 15 s of its server's silence.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    # After two pings without data gRPC would wait for a minute between them.
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.max_reconnect_backoff_ms", 5_000),
)


def open_channel(target: str, *, options: Options = OPTIONS, **security: str | None) -> grpc.Channel:
    """A channel to `target`, host:port. Raises OSError for a file that cannot be read.

    Raises ValueError when a token would go to another machine without TLS (allowed by BATCH_ALLOW_INSECURE=true),
    and TypeError for an argument that is none of the above.
    """
    credentials, token, options = _secured(target, options, **security)
    if credentials is None:
        channel = grpc.insecure_channel(target, options=options)
    else:
        channel = grpc.secure_channel(target, credentials, options=options)
    return grpc.intercept_channel(channel, _WithToken(token)) if token else channel


def open_aio_channel(target: str, *, options: Options = OPTIONS, **security: str | None) -> grpc.aio.Channel:
    """The same for asyncio."""
    credentials, token, options = _secured(target, options, **security)
    # grpc.aio takes one interceptor for one kind of call.
    interceptors = [kind(token) for kind in _AIO_KINDS] if token else []
    if credentials is None:
        return grpc.aio.insecure_channel(target, options=options, interceptors=interceptors)
    return grpc.aio.secure_channel(target, credentials, options=options, interceptors=interceptors)


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
    secret = _given(token, "BATCH_TOKEN")
    token_file = os.environ.get("BATCH_TOKEN_FILE", "")
    if token is None and not secret and token_file:
        secret = Path(token_file).read_text().strip()
    if bool(certificate) != bool(key):
        raise ValueError("a client's certificate and its key go together: BATCH_TLS_CERT, BATCH_TLS_KEY")
    if certificate and not ca:
        raise ValueError("a client's certificate goes with BATCH_TLS_CA, by which the server is known")
    if not ca:
        is_allowed = os.environ.get("BATCH_ALLOW_INSECURE", "").lower() in ("1", "true", "yes", "on")
        if secret and not is_allowed and not _is_local(target):
            raise ValueError(f"a token would go to {target} for everybody to read: set BATCH_TLS_CA")
        return None, secret, options
    credentials = grpc.ssl_channel_credentials(
        Path(ca).read_bytes(),
        Path(key).read_bytes() if key else None,
        Path(certificate).read_bytes() if certificate else None,
    )
    if server_name:
        options = (*options, ("grpc.ssl_target_name_override", server_name))
    return credentials, secret, options


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
    """What is known of a call, with a token in its metadata."""

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
    """Shows a token with every call."""

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
