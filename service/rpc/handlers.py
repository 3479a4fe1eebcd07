"""Call handlers as interceptors wrap them. There are four kinds, by which side streams."""

from __future__ import annotations

from typing import Any, TypeAlias

import grpc

# Generic only in gRPC's type stubs.
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


def behaviour(handler: Handler) -> Any:
    """The function of a handler of any kind."""
    return handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream


def replace(handler: Handler, unary: Any, stream: Any, deserializer: Any = None) -> Handler:
    """The same handler with another function: `stream` if its response is a stream, else `unary`."""
    make = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }[handler.request_streaming, handler.response_streaming]
    return make(
        stream if handler.response_streaming else unary,
        request_deserializer=deserializer or handler.request_deserializer,
        response_serializer=handler.response_serializer,
    )
