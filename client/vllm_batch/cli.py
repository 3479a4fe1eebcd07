"""The `vllm-batch` command."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import click
from google.protobuf.json_format import MessageToDict
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from vllm_batch import __version__, recovery
from vllm_batch.client import DEFAULT_TARGET, PATIENCE_S, CallError, Client
from vllm_batch.output import line
from vllm_batch.terminal import EXIT_FAILED, EXIT_UNAVAILABLE, err, errors, out
from vllm_batch.v1 import batch_service_pb2 as pb

EPILOG = """\b
Exit codes:
  0    done; with --wait: and every request was answered with 2xx
  1    the batch ended with failed requests, or was not completed
  2    wrong usage
  3    refused by the server: each wrong line and field is printed
  4    no worker (or no gateway, or no database) for as long as --patience
  130  Ctrl-C; a batch that was stored goes on
"""
FILE = click.Path(exists=True, dir_okay=False)
STATES = [name.removeprefix("BATCH_STATE_").lower() for name in pb.BatchState.keys()[1:]]


@click.group(epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--target", envvar="BATCH_TARGET", default=DEFAULT_TARGET, show_default=True, help="Gateway, host:port.")
@click.option("--patience", type=float, default=PATIENCE_S, show_default=True, help="Seconds to retry UNAVAILABLE.")
@click.option("--tls-ca", envvar="BATCH_TLS_CA", type=FILE, help="Authorities that know the server: TLS is used.")
@click.option("--tls-cert", envvar="BATCH_TLS_CERT", type=FILE, help="Certificate of this client.")
@click.option("--tls-key", envvar="BATCH_TLS_KEY", type=FILE, help="Key of that certificate.")
@click.option("--tls-server-name", envvar="BATCH_TLS_SERVER_NAME", help="Name in the server's certificate.")
@click.option("--token-file", envvar="BATCH_TOKEN_FILE", type=FILE, help="Holds the token, unless BATCH_TOKEN is set.")
@click.version_option(__version__)
@click.pass_context
def main(context: click.Context, /, target: str, patience: float, **security: str | None) -> None:
    """Batches of inference requests, run by vLLM, each answered exactly once."""
    # Where all that opens a channel looks, the watchdog's among them. A token itself is never an argument: those are
    # seen by everybody on the machine.
    os.environ.update({f"BATCH_{name.upper()}": value for name, value in security.items() if value})
    try:
        context.obj = Client(target, patience, _tell_retry)
    except (OSError, ValueError) as error:
        raise click.UsageError(str(error)) from None
    context.call_on_close(context.obj.close)


def _tell_retry(error: CallError, delay_s: float) -> None:
    err.print(f"{error.message}; trying again in {delay_s:.0f} s", style="yellow")


def _pairs(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    for value in values:
        if "=" not in value:
            raise click.BadParameter(f"{value!r} is not KEY=VALUE")
    return dict(value.split("=", 1) for value in values)


@main.command()
@click.argument("file", type=click.File("rb"))
@click.option("--wait", is_flag=True, help="Wait until the batch is done.")
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="With --wait: results, as JSONL.")
@click.option("--request-id", default="", help="Submitting again under the same name gives the same batch.")
@click.option("-m", "--metadata", multiple=True, callback=_pairs, metavar="KEY=VALUE", help="Kept with the batch.")
@click.option("--priority", type=click.IntRange(-100, 100), default=0, show_default=True, help="Higher runs first.")
@click.option("--window", type=click.FloatRange(min=0, min_open=True), help="Seconds until it expires. Default: never.")
@click.pass_obj
def submit(
    client: Client,
    file: BinaryIO,
    wait: bool,
    output: Path | None,
    request_id: str,
    metadata: dict[str, str],
    priority: int,
    window: float | None,
) -> None:
    """Submit FILE, requests in OpenAI's batch format, one a line. `-` reads stdin. Prints the id of the batch."""
    if output is not None and not wait:
        raise click.UsageError("--output goes with --wait; later: vllm-batch results BATCH -o FILE")
    with errors(), _rewindable(file) as (source, size), _bar(DownloadColumn()) as progress:
        task = progress.add_task("uploading", total=size)
        batch = client.submit(
            source,
            request_id=request_id,
            metadata=metadata,
            priority=priority,
            completion_window_s=window,
            on_sent=lambda sent: progress.update(task, completed=sent),
        )
    # Flushed: whoever reads this through a pipe needs it now.
    click.echo(batch.id)
    sys.stdout.flush()
    if wait:
        _wait(client, batch.id, output)


@main.command()
@click.argument("batch")
@click.pass_obj
def watch(client: Client, batch: str) -> None:
    """Wait until BATCH is done, with a progress bar."""
    _wait(client, batch, None)


@main.command()
@click.argument("batch")
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="Default: stdout.")
@click.option("--follow", is_flag=True, help="Go on until the batch is done.")
@click.option("--order", type=click.Choice(["input", "finished"]), default="input", show_default=True)
@click.pass_obj
def results(client: Client, batch: str, output: Path | None, follow: bool, order: str) -> None:
    """The results of BATCH so far, in OpenAI's batch output format."""
    with errors(batch):
        _write_results(client, batch, output, follow, f"RESULT_ORDER_{order.upper()}")


@main.command("list")
@click.option("--state", multiple=True, type=click.Choice(STATES), help="Only these; may be repeated.")
@click.option("--limit", type=click.IntRange(1), default=20, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
@click.pass_obj
def list_(client: Client, state: tuple[str, ...], limit: int, as_json: bool) -> None:
    """Batches, newest first."""
    states = [f"BATCH_STATE_{name.upper()}" for name in state]
    with errors():
        batches = list(client.list(states, limit))
    if as_json:
        for batch in batches:
            click.echo(json.dumps(MessageToDict(batch, preserving_proto_field_name=True)))
    else:
        out.print(_table(batches))


@main.command()
@click.argument("batch")
@click.pass_obj
def cancel(client: Client, batch: str) -> None:
    """Stop BATCH. Finished results stay."""
    with errors():
        click.echo(_state(client.cancel(batch)))


@main.command()
@click.argument("batch")
@click.option("--request-id", default="", help="Retrying again under the same name gives the same batch.")
@click.pass_obj
def retry(client: Client, batch: str, request_id: str) -> None:
    """Run the failed requests of BATCH again, as a new batch. Prints its id."""
    with errors():
        click.echo(client.retry(batch, request_id).id)


@main.command()
@click.argument("batch")
@click.pass_obj
def delete(client: Client, batch: str) -> None:
    """Delete BATCH, which has ended, with its requests and results."""
    with errors():
        client.delete(batch)


main.add_command(recovery.group)


@main.command()
@recovery.watchdog_option
@click.pass_obj
def status(client: Client, watchdog_target: str) -> None:
    """Gateway, workers, last recovery and batches, on one screen; whatever of it is up."""
    with errors():
        is_up = _print_gateway(client)
        recovery.print_overview(watchdog_target)
        if is_up:
            batches = list(Client(client.target, patience_s=0).list(limit=8))
            out.print(_table(batches) if batches else "batches: none")
    sys.exit(0 if is_up else EXIT_UNAVAILABLE)


def _print_gateway(client: Client) -> bool:
    """True when batches can be listed."""
    quick = Client(client.target, patience_s=0)
    try:
        next(quick.list(limit=1), None)
    except CallError as error:
        out.print(f"gateway   {client.target}  [red]{error.message}[/red]")
        return False
    accepting = quick.accepting()
    out.print(f"gateway   {client.target}  {'[green]accepts new work' if not accepting else f'[yellow]{accepting}'}")
    return True


def _table(batches: list[pb.Batch]) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("batch", "state", "total", "done", "failed", "created (UTC)"):
        table.add_column(name, justify="right" if name in ("total", "done", "failed") else "left")
    for batch in batches:
        counts = batch.counts
        created = batch.create_time.ToDatetime().strftime("%Y-%m-%d %H:%M:%S")
        done = counts.completed + counts.failed
        table.add_row(batch.id, _state(batch), str(counts.total), str(done), str(counts.failed), created)
    return table


def _state(batch: pb.Batch) -> str:
    return pb.BatchState.Name(batch.state).removeprefix("BATCH_STATE_").lower()


def _wait(client: Client, batch_id: str, output: Path | None) -> NoReturn:
    with errors(batch_id):
        batch = _follow(client, batch_id)
        if output is not None:
            _write_results(client, batch_id, output, False, "RESULT_ORDER_INPUT")
    counts = batch.counts
    err.print(f"{batch_id} {_state(batch)}: {counts.completed} completed, {counts.failed} failed of {counts.total}")
    sys.exit(0 if batch.state == pb.BATCH_STATE_COMPLETED and not counts.failed else EXIT_FAILED)


def _follow(client: Client, batch_id: str) -> pb.Batch:
    """Shows a bar until the batch is terminal; on what is no terminal, a line for each tenth."""
    batch = pb.Batch()
    shown = -1
    with _bar(MofNCompleteColumn()) as progress:
        task = progress.add_task(batch_id, total=None)
        for batch in client.watch(batch_id):
            done, total = batch.counts.completed + batch.counts.failed, batch.counts.total
            progress.update(task, total=total, completed=done, description=f"{batch_id} {_state(batch)}")
            tenth = 10 * done // max(1, total)
            if not err.is_terminal and tenth != shown:
                shown = tenth
                err.print(f"{batch_id} {_state(batch)} {done}/{total}")
    return batch


def _bar(counts: Any) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        counts,
        TimeElapsedColumn(),
        console=err,
        disable=not err.is_terminal,
    )


@contextmanager
def _rewindable(file: BinaryIO) -> Iterator[tuple[BinaryIO, int]]:
    """The file and its size in bytes; what cannot be rewound is copied to a temporary file first."""
    if file.seekable():
        yield file, os.fstat(file.fileno()).st_size
        return
    with tempfile.TemporaryFile() as copy:
        shutil.copyfileobj(file, copy)
        yield copy, copy.tell()


def _write_results(client: Client, batch_id: str, output: Path | None, follow: bool, order: str) -> None:
    responses = client.results(batch_id, follow=follow, order=order)
    if output is None:
        for response in responses:
            click.echo(line(response.result))
        return
    # Whole or not at all: a file that is there can be trusted.
    part = output.with_name(output.name + ".part")
    try:
        with part.open("w", encoding="utf-8") as file:
            for response in responses:
                file.write(line(response.result) + "\n")
        part.replace(output)
    finally:
        part.unlink(missing_ok=True)
