"""What each call has: an id in the logs of all who serve it, a count and a duration, a span."""

from __future__ import annotations

import asyncio
import time
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import grpc
import structlog

from service import logs, metrics, tracing

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


class Serving:
    """A call while it is served, for `with`: its id, its span, and when it ends its count and its duration.

    A class, as a generator takes several times as long, and this is around every call.
    """

    __slots__ = ("_began_s", "_call_id", "_context", "_method", "_span")

    def __init__(self, method: str, context: Context) -> None:
        self._method = method
        self._context = context

    def __enter__(self) -> None:
        metadata: Any = dict(self._context.invocation_metadata() or ())
        self._call_id = logs.call_id(metadata)
        self._began_s = time.perf_counter()
        # Never reset: each call has a task, and thereby a context, of its own.
        structlog.contextvars.bind_contextvars(call_id=self._call_id)
        parent = tracing.valid(metadata.get(tracing.HEADER))
        self._span = tracing.span(self._method[1:], parent, is_server=True)
        _current.set(Call(self._call_id, self._span.traceparent))

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        duration_s = time.perf_counter() - self._began_s
        if kind is None:
            code = "OK"
        elif issubclass(kind, (asyncio.CancelledError, GeneratorExit)):
            code = "CANCELLED"
        else:
            code = _CODES.get(self._context.code(), "UNKNOWN")
        metrics.rpc_ended(self._method, code, duration_s)
        self._span.note({"rpc.system": "grpc", "rpc.status": code, "call_id": self._call_id})
        self._span.__exit__(kind, *error)
        log.debug("call_ended", method=self._method, code=code, duration_s=round(duration_s, 4))
