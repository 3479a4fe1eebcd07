"""Logs and traces: event names match the documentation, ids and trace contexts are passed on."""

import ast
import re
from pathlib import Path

import pytest

from service.telemetry import logs, tracing

ROOT = Path(__file__).resolve().parents[2]


def test_documented_events_are_logged() -> None:
    """Every log event in docs/observability.md is one that the code writes."""
    table = (ROOT / "docs/observability.md").read_text().partition("Events to know")[2].partition("##")[0]
    sources = [path.read_text() for folder in ("service", "watchdog") for path in (ROOT / folder).rglob("*.py")]
    events = set(re.findall(r"`([a-z_]+)`", table))
    assert len(events) > 40
    assert not [event for event in events if not any(f'"{event}"' in source for source in sources)]


def test_warnings_and_errors_are_documented() -> None:
    """docs/observability.md lists each event that the code logs as a warning or an error."""
    listed = (ROOT / "docs/observability.md").read_text().partition("Events to know")[2].partition("##")[0]
    calls = [
        node
        for folder in ("service", "watchdog")
        for path in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args
        if node.func.attr in {"warning", "error", "exception"}
    ]
    events = {call.args[0].value for call in calls if isinstance(call.args[0], ast.Constant)}
    assert len(events) > 40
    assert not [event for event in events if f"`{event}`" not in listed]


def test_call_id_is_the_clients_or_made() -> None:
    """A client's call id is kept, cut to 128 characters; a call without one gets an id of its own."""
    assert logs.call_id({"other": "x", "x-request-id": "mine"}) == "mine"
    assert logs.call_id({"x-request-id": "x" * 5000}) == "x" * 128
    assert logs.call_id({}) != logs.call_id({"x-request-id": ""})


@pytest.mark.parametrize(
    "given",
    [
        None,
        "",
        "nonsense",
        "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7",
        "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
        "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
        "00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01",
        "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01\n",
    ],
)
def test_what_is_no_trace_context_is_not_kept(given: str | None) -> None:
    """A `traceparent` that is not a valid trace context is discarded."""
    assert tracing.valid(given) is None


def test_without_tracing_the_context_passes_unchanged() -> None:
    """Without a collector, a span passes on the trace context it was given."""
    given = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    assert tracing.valid(given) == given
    with tracing.span("anything", given) as span:
        span.note({"request": "batch_req_1_0"})
        assert span.traceparent == given
