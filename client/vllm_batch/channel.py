"""The channels of the client: each one that it opens comes from here."""

from __future__ import annotations

import grpc

OPTIONS = (
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.max_send_message_length", 64 << 20),
    # A stream without a deadline ends within about 15 s of its server's silence.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.max_reconnect_backoff_ms", 5_000),
)


def open_channel(target: str) -> grpc.Channel:
    """A channel to `target`, host:port."""
    return grpc.insecure_channel(target, options=OPTIONS)


def open_aio_channel(target: str) -> grpc.aio.Channel:
    """A channel for asyncio to `target`, host:port."""
    return grpc.aio.insecure_channel(target, options=OPTIONS)
