"""What each call has: an id in the logs of all who serve it, a count and a duration, a span."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import grpc
import structlog

from service import logs, metrics, tracing
from service.handlers import Handler, behaviour, replace

log = logs.get("rpc")

Context = grpc.aio.ServicerContext[Any, Any]
Metadata = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Call:
    """The call that is being served: its id, and the trace context for what it calls."""

    id: str
    traceparent: str | None

    def metadata(self) -> Metadata:
        """What a call made for this one says, so that both are known as one."""
        trace = ((tracing.HEADER, self.traceparent),) if self.traceparent else ()
        return ((logs.CALL_ID_HEADER, self.id), *trace)


# By number, as gRPC says it after an abort, and as they are set.
_CODES: dict[Any, str] = {key: code.name for code in grpc.StatusCode for key in (code, code.value[0])}

_current: ContextVar[Call] = ContextVar("call")


def current() -> Call:
    """The call that is being served here. Only within one."""
    return _current.get()


def counted(method: str, handler: Handler) -> Handler:
    """The handler with an id, a count, a duration and a span for each call, but for reflection.

    To be the outermost: it sees how a call ended for its client.
    """
    if method.startswith("/grpc."):
        return handler
    inner = behaviour(handler)

    async def unary(request: Any, context: Context) -> Any:
        with _serving(method, context):
            return await inner(request, context)

    async def stream(request: Any, context: Context) -> AsyncIterator[Any]:
        with _serving(method, context):
            async for response in inner(request, context):
                yield response

    return replace(handler, unary, stream)


@contextmanager
def _serving(method: str, context: Context) -> Iterator[None]:
    metadata: Any = context.invocation_metadata() or ()
    call_id = logs.call_id(metadata)
    parent = tracing.valid(dict(metadata).get(tracing.HEADER))
    began_s = time.perf_counter()
    code = grpc.StatusCode.OK.name
    # Never reset: each call has a task, and thereby a context, of its own.
    structlog.contextvars.bind_contextvars(call_id=call_id)
    with tracing.span(method[1:], parent, is_server=True) as span:
        _current.set(Call(call_id, span.traceparent))
        try:
            yield
        except (asyncio.CancelledError, GeneratorExit):
            code = grpc.StatusCode.CANCELLED.name
            raise
        except BaseException:
            code = _CODES.get(context.code(), "UNKNOWN")
            raise
        finally:
            duration_s = time.perf_counter() - began_s
            metrics.rpc_ended(method, code, duration_s)
            span.note({"rpc.system": "grpc", "rpc.status": code, "call_id": call_id})
            log.debug("call_ended", method=method, code=code, duration_s=round(duration_s, 4))
