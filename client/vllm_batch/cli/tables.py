"""Batches as a person reads them in a terminal."""

from __future__ import annotations

from collections.abc import Iterable

from rich.table import Table

from vllm_batch.output import state_name
from vllm_batch.v1 import batch_service_pb2 as pb

# Of all batches where no token is required.
DEFAULT_TENANT = "default"


def summary(batch: pb.Batch) -> str:
    """The outcome of a batch in one line."""
    counts = batch.counts
    return f"{batch.id} {state_name(batch)}: {counts.completed} completed, {counts.failed} failed of {counts.total}"


def wait_name(batch: pb.Batch) -> str:
    """The reason for which a batch waits, such as `worker loading`; empty while it moves."""
    if not batch.HasField("wait"):
        return ""
    return pb.WaitReason.Name(batch.wait.reason).removeprefix("WAIT_REASON_").lower().replace("_", " ")


def outlook(batch: pb.Batch) -> str:
    """When a batch will probably end, or what it waits for, in a few words; empty if nothing is known."""
    if name := wait_name(batch):
        return f"waits: {name}"
    if batch.HasField("estimated_end_time"):
        return f"ends about {batch.estimated_end_time.ToDatetime():%Y-%m-%d %H:%M:%S} UTC"
    return ""


def notes(batches: Iterable[pb.Batch]) -> list[str]:
    """A line for each batch that waits, with what to do, or whose end is known."""
    lines = []
    for batch in batches:
        if batch.HasField("wait"):
            advice = f". {batch.wait.advice}" if batch.wait.advice else ""
            lines.append(f"{batch.id} waits: {batch.wait.message}{advice}")
        elif text := outlook(batch):
            lines.append(f"{batch.id} {text}")
    return lines


def table(batches: Iterable[pb.Batch]) -> Table:
    """One row per batch."""
    batches = list(batches)
    # Whoever sees one tenant's alone knows whose they are.
    several = len({batch.tenant for batch in batches}) > 1
    made = Table(box=None, pad_edge=False)
    for name in ("batch", *(["tenant"] if several else []), "state", "total", "done", "failed", "created (UTC)"):
        made.add_column(name, justify="right" if name in ("total", "done", "failed") else "left")
    for batch in batches:
        counts = batch.counts
        created = f"{batch.create_time.ToDatetime():%Y-%m-%d %H:%M:%S}"
        done = counts.completed + counts.failed
        whose = [batch.tenant] if several else []
        made.add_row(batch.id, *whose, state_name(batch), str(counts.total), str(done), str(counts.failed), created)
    return made


def details(batch: pb.Batch) -> Table:
    """Everything about one batch, one line per field."""
    made = Table.grid(padding=(0, 2))
    made.add_row("batch", batch.id)
    made.add_row("state", state_name(batch))
    if batch.tenant != DEFAULT_TENANT:
        made.add_row("tenant", batch.tenant)
    counts, usage = batch.counts, batch.usage
    running = f", {counts.running} running" if counts.running else ""
    made.add_row("requests", f"{counts.total}: {counts.completed} completed, {counts.failed} failed{running}")
    if batch.HasField("wait"):
        made.add_row("waits", f"{wait_name(batch)}: {batch.wait.message}")
        if batch.wait.advice:
            made.add_row("advice", batch.wait.advice)
    if batch.HasField("estimated_end_time"):
        made.add_row("ends about", f"{batch.estimated_end_time.ToDatetime():%Y-%m-%d %H:%M:%S} UTC")
    cached = f" ({usage.cached_tokens} cached)" if usage.cached_tokens else ""
    reasoning = f" ({usage.reasoning_tokens} reasoning)" if usage.reasoning_tokens else ""
    made.add_row("tokens", f"{usage.prompt_tokens} prompt{cached}, {usage.completion_tokens} completion{reasoning}")
    made.add_row("models", ", ".join(batch.models))
    times = {"created": "create_time", "started": "start_time", "ended": "end_time", "expires": "expire_time"}
    for name, field in times.items():
        if batch.HasField(field):
            made.add_row(name, f"{getattr(batch, field).ToDatetime():%Y-%m-%d %H:%M:%S} UTC")
    if batch.priority:
        made.add_row("priority", str(batch.priority))
    if batch.order == pb.RUN_ORDER_INPUT:
        made.add_row("order", "input")
    if batch.request_id:
        made.add_row("request id", batch.request_id)
    if counts.failed:
        made.add_row("failures", f"vllm-batch errors {batch.id}")
    for key, value in sorted(batch.metadata.items()):
        made.add_row(f"  {key}", value)
    return made
