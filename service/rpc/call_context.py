"""The context of a call: its id in the logs of every process that serves it, its metrics and its span."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from contextvars import ContextVar
from typing import Any, Self

import grpc
import structlog

from service.auth.callers import NOBODY, Caller
from service.rpc.handlers import Context
from service.telemetry import logs, metrics, tracing

log = logs.get("rpc")

Metadata = tuple[tuple[str, str], ...]

# abort() reports the number, set_code() the enum.
_CODES: dict[Any, str] = {key: code.name for code in grpc.StatusCode for key in (code, code.value[0])}

# The call being served. Each runs as a task, and thus in a context, of its own.
_current: ContextVar[Call] = ContextVar("call")


class Call:
    """A call to a server. `caller` makes it; `traceparent` goes to calls made on its behalf.

    Serve it in a `with` block: its id is in the logs and a span is open; at the end it is counted with its duration.
    """

    # Slots and `with` instead of generators: one per call.
    __slots__ = ("_began_s", "_context", "_method", "_span", "caller", "id", "traceparent")

    def __init__(self, method: str, metadata: Iterable[tuple[str, Any]]) -> None:
        given = dict(metadata)
        self._method = method
        self.caller = NOBODY
        self.id = logs.call_id(given)
        self.traceparent = tracing.valid(given.get(tracing.HEADER))

    def identify(self, caller: Caller) -> None:
        """Makes the caller known to what is logged from here on."""
        self.caller = caller
        structlog.contextvars.bind_contextvars(caller=caller.name)

    def metadata(self) -> Metadata:
        """Metadata for calls made on behalf of this one, so that they share its id and trace."""
        trace = ((tracing.HEADER, self.traceparent),) if self.traceparent else ()
        return ((logs.CALL_ID_HEADER, self.id), *trace)

    def served(self, context: Context) -> Self:
        """This call, ready for `with`."""
        self._context = context
        return self

    def __enter__(self) -> None:
        self._began_s = time.perf_counter()
        caller = {"caller": self.caller.name} if self.caller.name else {}
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
    """Makes an incoming call, with its client's metadata, the current one."""
    call = Call(method, metadata)
    _current.set(call)
    return call


def scope() -> str | None:
    """The tenant to whose batches the call being served is limited; None: all tenants'."""
    return current().caller.scope


def current() -> Call:
    """The call being served. Raises LookupError outside of one."""
    return _current.get()
