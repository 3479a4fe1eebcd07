"""What each call to the watchdog has: a count and a duration, an id in the logs."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import grpc
import structlog

from service import logs, metrics
from service.handlers import behaviour, replace


class CallInterceptor(grpc.ServerInterceptor):
    """The outermost: sees how a call ended for its client. Health and reflection are not counted."""

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], grpc.RpcMethodHandler[Any, Any] | None],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        handler: Any = continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or method.startswith("/grpc."):
            return handler  # type: ignore[no-any-return]

        inner = behaviour(handler)

        def call(request: Any, context: Any) -> Any:
            began_s = time.perf_counter()
            code = "OK"
            with structlog.contextvars.bound_contextvars(call_id=logs.call_id(dict(context.invocation_metadata()))):
                try:
                    return inner(request, context)
                except BaseException:
                    code = getattr(context.code(), "name", "UNKNOWN")
                    raise
                finally:
                    metrics.rpc_ended(method, code, time.perf_counter() - began_s)

        # Of ours none streams; one that was refused does, but never gets to it.
        return replace(handler, call, call)
