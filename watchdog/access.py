"""Lets calls to the watchdog through that the service's rules of access allow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc
import structlog

from service import logs, roles
from service.access import Access
from service.errors import ApiError
from service.handlers import behaviour, replace

log = logs.get("recovery")


class AccessInterceptor(grpc.ServerInterceptor):
    """Ends a call that `access` refuses with the code and details of its error, without reading its request."""

    def __init__(self, access: Access) -> None:
        self._access = access

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], grpc.RpcMethodHandler[Any, Any] | None],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        handler = continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or roles.is_open(method):
            return handler
        caller, refusal = "", None
        try:
            caller = self._access.caller(method, handler_call_details.invocation_metadata)
        except ApiError as error:
            refusal = error

        def enter(context: grpc.ServicerContext) -> None:
            try:
                self._access.count(method, caller, context.peer())
                if refusal is not None:
                    log.warning("call_refused", method=method, peer=context.peer(), reason=refusal.reason)
                    raise refusal
            except ApiError as error:
                context.set_trailing_metadata(error.trailing_metadata)
                context.abort(error.code, error.message)

        if refusal is not None:
            return grpc.stream_stream_rpc_method_handler(lambda _, context: enter(context))
        if handler.request_streaming:
            # Reflection: one call, however much it asks.
            return handler
        inner = behaviour(handler)

        def call(request: Any, context: grpc.ServicerContext) -> Any:
            enter(context)
            # What is logged says for whom it was.
            with structlog.contextvars.bound_contextvars(**({"caller": caller} if caller else {})):
                return inner(request, context)

        return replace(handler, call, call)
