"""The handlers of calls, as interceptors see and wrap them: of four kinds, by what is streamed."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

import grpc

from service import roles

# Generic in gRPC's stubs alone.
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Continuation = Callable[[grpc.HandlerCallDetails], Awaitable["Handler | None"]]


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


class Interceptor(grpc.aio.ServerInterceptor):
    """Puts something around the handler of each method but those of health. gRPC asks at each call: it is made once."""

    def __init__(self) -> None:
        # What was wrapped, and what that became, by method.
        self._wrapped: dict[str, tuple[Handler, Handler]] = {}

    def wrap(self, method: str, handler: Handler) -> Handler:
        """The handler with what is put around it."""
        raise NotImplementedError

    async def intercept_service(self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails) -> Any:
        """The handler of this call."""
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or roles.is_open(method):
            return handler
        known = self._wrapped.get(method)
        if known is None or known[0] is not handler:
            known = self._wrapped[method] = (handler, self.wrap(method, handler))
        return known[1]
