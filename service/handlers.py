"""The handlers of calls, as interceptors see and wrap them: of four kinds, by what is streamed."""

from __future__ import annotations

from typing import Any, TypeAlias

import grpc

# Generic in gRPC's stubs alone.
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"


def behaviour(handler: Handler) -> Any:
    """The function of a handler, of whichever kind it is."""
    return handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream


def replace(handler: Handler, unary: Any, stream: Any, deserializer: Any = None) -> Handler:
    """The same handler with another function: `unary` or `stream`, by what it answers with."""
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
