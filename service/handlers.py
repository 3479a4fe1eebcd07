"""The handlers of calls, as interceptors see and wrap them: of four kinds, by what is streamed."""

from __future__ import annotations

from typing import Any, TypeAlias

import grpc

# Generic in gRPC's stubs alone.
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"


def behaviour(handler: Handler) -> Any:
    """The function of a handler, of whichever kind it is."""
    return handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream


def make_handler(
    request_streaming: bool, response_streaming: bool, function: Any, deserializer: Any, serializer: Any
) -> Handler:
    """A handler of the kind that is asked for."""
    make = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }[request_streaming, response_streaming]
    return make(function, request_deserializer=deserializer, response_serializer=serializer)


def replace(handler: Handler, unary: Any, stream: Any, deserializer: Any = None) -> Handler:
    """The same handler with another function: `unary` or `stream`, by what it answers with."""
    return make_handler(
        handler.request_streaming,
        handler.response_streaming,
        stream if handler.response_streaming else unary,
        deserializer or handler.request_deserializer,
        handler.response_serializer,
    )
