"""How batches and results are printed."""

from __future__ import annotations

import json
from collections.abc import Iterable

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from rich.table import Table

from vllm_batch.v1 import batch_service_pb2 as pb


def line(result: pb.Result) -> str:
    """A result as a line of OpenAI's batch output, without its end. The body is the endpoint's own text: no number
    is read and written anew.
    """
    head = f'{{"id": {json.dumps(result.id)}, "custom_id": {json.dumps(result.custom_id)}, '
    if result.HasField("response"):
        response = f'{{"status_code": {result.response.status_code}, "request_id": {json.dumps(result.id)}, '
        return f'{head}"response": {response}"body": {result.response.body_json}}}, "error": null}}'
    error = json.dumps({"code": result.error.code, "message": result.error.message})
    return f'{head}"response": null, "error": {error}}}'


def json_line(message: Message) -> str:
    """A message of the contract as one line of JSON, in the names of the proto."""
    return json.dumps(MessageToDict(message, preserving_proto_field_name=True))


def state_name(batch: pb.Batch) -> str:
    """As OpenAI writes it: `in_progress`."""
    return pb.BatchState.Name(batch.state).removeprefix("BATCH_STATE_").lower()


def summary(batch: pb.Batch) -> str:
    """One line that says how a batch stands."""
    counts = batch.counts
    return f"{batch.id} {state_name(batch)}: {counts.completed} completed, {counts.failed} failed of {counts.total}"


def table(batches: Iterable[pb.Batch]) -> Table:
    """A row for each batch."""
    made = Table(box=None, pad_edge=False)
    for name in ("batch", "state", "total", "done", "failed", "created (UTC)"):
        made.add_column(name, justify="right" if name in ("total", "done", "failed") else "left")
    for batch in batches:
        counts = batch.counts
        created = f"{batch.create_time.ToDatetime():%Y-%m-%d %H:%M:%S}"
        done = counts.completed + counts.failed
        made.add_row(batch.id, state_name(batch), str(counts.total), str(done), str(counts.failed), created)
    return made


def details(batch: pb.Batch) -> Table:
    """All that is known of one batch, a line each."""
    made = Table.grid(padding=(0, 2))
    made.add_row("batch", batch.id)
    made.add_row("state", state_name(batch))
    made.add_row("requests", f"{batch.counts.total}: {batch.counts.completed} completed, {batch.counts.failed} failed")
    made.add_row("tokens", f"{batch.usage.prompt_tokens} of prompts, {batch.usage.completion_tokens} generated")
    made.add_row("models", ", ".join(batch.models))
    times = {"created": "create_time", "started": "start_time", "ended": "end_time", "expires": "expire_time"}
    for name, field in times.items():
        if batch.HasField(field):
            made.add_row(name, f"{getattr(batch, field).ToDatetime():%Y-%m-%d %H:%M:%S} UTC")
    if batch.priority:
        made.add_row("priority", str(batch.priority))
    if batch.request_id:
        made.add_row("request id", batch.request_id)
    for key, value in sorted(batch.metadata.items()):
        made.add_row(f"  {key}", value)
    return made
