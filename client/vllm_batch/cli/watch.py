"""`vllm-batch watch`, and waiting for a batch with a progress bar."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import click
from rich.progress import MofNCompleteColumn

from vllm_batch.cli.options import json_option
from vllm_batch.cli.results import write_results
from vllm_batch.cli.tables import notes, outlook, summary
from vllm_batch.cli.terminal import EXIT_FAILED, err, errors, print_json, progress_bar
from vllm_batch.client import Client
from vllm_batch.output import state_name
from vllm_batch.v1 import batch_service_pb2 as pb

OnProgress = Callable[[pb.Batch], None]


@click.command()
@click.argument("batch")
@json_option
@click.pass_obj
def watch(client: Client, batch: str, as_json: bool) -> None:
    """Wait for BATCH to end, with a progress bar. Ctrl-C leaves it running.

    With --json: print the batch whenever it changes.

    \b
    Example:
      vllm-batch watch batch_1 && echo all well
    """
    ended = wait_for(client, batch, on_progress=print_json if as_json else None)
    sys.exit(0 if is_success(ended) else EXIT_FAILED)


def is_success(batch: pb.Batch) -> bool:
    """True when every request of an ended batch was answered with 2xx."""
    return batch.state == pb.BATCH_STATE_COMPLETED and not batch.counts.failed


def wait_for(
    client: Client, batch_id: str, *, output: Path | None = None, on_progress: OnProgress | None = None
) -> pb.Batch:
    """The batch once it has ended and its results are in `output`, if given. Shows a bar, then a summary."""
    with errors(batch_id):
        batch = _follow(client, batch_id, on_progress)
    if output is not None:
        write_results(client, batch_id, output)
    err.print(summary(batch))
    return batch


def _follow(client: Client, batch_id: str, on_progress: OnProgress | None) -> pb.Batch:
    """Shows a bar until the batch has ended; where there is no terminal, a line for each tenth. Whatever the batch
    waits for is a line too."""
    shown, reason = -1, pb.WAIT_REASON_UNSPECIFIED
    with progress_bar(MofNCompleteColumn()) as progress:
        task = progress.add_task(batch_id, total=None)

        def show(batch: pb.Batch) -> None:
            nonlocal shown, reason
            if on_progress is not None:
                on_progress(batch)
            done, total = batch.counts.completed + batch.counts.failed, batch.counts.total
            name = " ".join(filter(None, (batch_id, state_name(batch), outlook(batch))))
            progress.update(task, total=total, completed=done, description=name)
            if batch.wait.reason != reason:
                reason = batch.wait.reason
                text = notes([batch])[0] if reason else f"{batch_id} goes on"
                err.print(text, style="yellow")
            tenth = 10 * done // max(1, total)
            if not err.is_terminal and tenth != shown:
                shown = tenth
                err.print(f"{batch_id} {state_name(batch)} {done}/{total}")

        return client.wait(batch_id, show)
