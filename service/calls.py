"""What each call has: an id in the logs of all who serve it, a count and a duration, a span."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from contextvars import ContextVar
from typing import Any, Self

import grpc
import structlog

from service import logs, metrics, tracing

log = logs.get("rpc")

Context = grpc.aio.ServicerContext[Any, Any]
Metadata = tuple[tuple[str, str], ...]

# By number, as gRPC says it after an abort, and as they are set.
_CODES: dict[Any, str] = {key: code.name for code in grpc.StatusCode for key in (code, code.value[0])}

# Of the call being served. Each is a task, and thereby a context, of its own.
_current: ContextVar[Call] = ContextVar("call")


class Call:
    """A call to a server. `caller` is the name of the token that it has shown, `traceparent` for what is called for it.

    While it is served, by `with`, it is in the logs and has a span; when that ends it is counted, with its duration.
    """

    # These, and no generators, as they are made at every call.
    __slots__ = ("_began_s", "_context", "_method", "_span", "caller", "id", "traceparent")

    def __init__(self, method: str, metadata: Iterable[tuple[str, Any]]) -> None:
        given = dict(metadata)
        self._method = method
        self.caller = ""
        self.id = logs.call_id(given)
        self.traceparent = tracing.valid(given.get(tracing.HEADER))

    def metadata(self) -> Metadata:
        """What a call made for this one says, so that both are known as one."""
        trace = ((tracing.HEADER, self.traceparent),) if self.traceparent else ()
        return ((logs.CALL_ID_HEADER, self.id), *trace)

    def served(self, context: Context) -> Self:
        """This call, for `with`."""
        self._context = context
        return self

    def __enter__(self) -> None:
        self._began_s = time.perf_counter()
        caller = {"caller": self.caller} if self.caller else {}
        structlog.contextvars.bind_contextvars(call_id=self.id, **caller)
        self._span = tracing.span(self._method[1:], self.traceparent, is_server=True)
        self.traceparent = self._span.traceparent

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        duration_s = time.perf_counter() - self._began_s
        if kind is None:
            code = "OK"
        elif issubclass(kind, (asyncio.CancelledError, GeneratorExit)):
            code = "CANCELLED"
        else:
            code = _CODES.get(self._context.code(), "UNKNOWN")
        metrics.rpc_ended(self._method, code, duration_s)
        self._span.note({"rpc.system": "grpc", "rpc.status": code, "call_id": self.id})
        self._span.__exit__(kind, *error)
        log.debug("call_ended", method=self._method, code=code, duration_s=round(duration_s, 4))


def begin(method: str, metadata: Iterable[tuple[str, Any]]) -> Call:
    """A call that comes in, with what its client says of it."""
    call = Call(method, metadata)
    _current.set(call)
    return call


def current() -> Call:
    """The call that is being served here. Only within one."""
    return _current.get()
