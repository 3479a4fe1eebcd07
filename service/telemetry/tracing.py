"""Traces: calls and batches carry the W3C trace context; spans go to an OTLP collector if one is set.

Without OTEL_EXPORTER_OTLP_ENDPOINT, OpenTelemetry is not imported and a client's context is passed on unchanged.
"""

import os
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from service.telemetry import logs

HEADER = "traceparent"
# For sending the remaining spans when the process ends.
CLOSE_TIMEOUT_S = 2.0

_VALID = re.compile(r"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")
_provider: Any = None

log = logs.get("tracing")


def configure(process: str, endpoint: str | None, attributes: Mapping[str, str] | None = None) -> None:
    """Sends spans over OTLP/gRPC from now on, as service `vllm-batch-<process>`. No endpoint: does nothing.

    The standard OTEL_ variables set sampling, headers, certificates and so on.
    """
    global _provider
    if not endpoint:
        return
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        log.error("tracing_not_installed", cause=str(error), install="vllm-batch[tracing]")
        return
    os.environ.setdefault("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)
    resource = Resource.create({"service.name": f"vllm-batch-{process}", **(attributes or {})})
    _provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    _provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    log.info("tracing_configured")


def close() -> None:
    """Sends the remaining spans, for up to CLOSE_TIMEOUT_S."""
    if _provider is not None:
        thread = threading.Thread(target=_provider.shutdown, daemon=True)
        thread.start()
        thread.join(CLOSE_TIMEOUT_S)


def valid(traceparent: str | None) -> str | None:
    """The client's trace context, or None if it is missing or malformed."""
    return traceparent if traceparent is not None and _VALID.fullmatch(traceparent) else None


@dataclass(frozen=True)
class Span:
    """A piece of work in a trace. Use it with `with`; an exception marks it as failed.

    `traceparent` is for calls made from within it; None: not traced.
    """

    traceparent: str | None
    _recorded: Any = None

    def note(self, attributes: Mapping[str, str | int]) -> None:
        """Adds attributes to the span."""
        if self._recorded is not None:
            self._recorded.set_attributes(attributes)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._recorded is None:
            return
        if kind is not None:
            from opentelemetry.trace import StatusCode

            self._recorded.set_status(StatusCode.ERROR, kind.__name__)
        self._recorded.end()


def span(name: str, parent: str | None, *, is_server: bool = False) -> Span:
    """A span for a piece of work, in the trace of `parent`.

    Only a server starts a trace; other work joins one or is not traced.
    """
    if _provider is None or not (parent or is_server):
        return Span(parent)
    from opentelemetry import trace
    from opentelemetry.context import Context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    propagator = TraceContextTextMapPropagator()
    kind = trace.SpanKind.SERVER if is_server else trace.SpanKind.INTERNAL
    # An empty context, as None would mean whichever context is current.
    context = propagator.extract({HEADER: parent} if parent else {}, Context())
    recorded = _provider.get_tracer("vllm_batch").start_span(name, context, kind)
    carrier: dict[str, str] = {}
    propagator.inject(carrier, trace.set_span_in_context(recorded, Context()))
    return Span(carrier.get(HEADER), recorded)
