"""The `vllm-batch` command."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import click
from click.shell_completion import get_completion_class
from google.protobuf.json_format import MessageToDict
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from vllm_batch import __version__, recovery
from vllm_batch.calls import DEFAULT_TARGET, PATIENCE_S, CallError
from vllm_batch.channel import open_channel
from vllm_batch.client import Client
from vllm_batch.output import details, json_line, line, state_name, summary, table
from vllm_batch.overview import ask_gateway, ask_watchdog
from vllm_batch.terminal import EXIT_FAILED, EXIT_UNAVAILABLE, err, errors, json_option, out
from vllm_batch.v1 import batch_service_pb2 as pb

EPILOG = """\b
A first batch:
  vllm-batch status
  vllm-batch submit batch.jsonl --wait -o results.jsonl
\b
Exit codes:
  0    done; with --wait: and every request was answered with 2xx
  1    the batch ended with failed requests, or was not completed
  2    wrong usage
  3    refused by the server: each wrong line and field is printed
  4    no worker (or no gateway, or no database) for as long as --patience
  130  Ctrl-C; a batch that was stored goes on
\b
Data goes to stdout, all else to stderr. --target and --patience come before the command; BATCH_TARGET stands for
the first, BATCH_WATCHDOG_TARGET for the watchdog's.
"""
# What may run unattended; who asks for the rest sits there and waits.
PATIENT = ("submit", "watch", "results", "retry")
HASTE_S = 10.0
FILE = click.Path(exists=True, dir_okay=False)
STATES = [name.removeprefix("BATCH_STATE_").lower() for name in pb.BatchState.keys()[1:]]


@click.group(epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--target", envvar="BATCH_TARGET", default=DEFAULT_TARGET, show_default=True, help="Gateway, host:port.")
@click.option(
    "--patience",
    type=click.FloatRange(0),
    help=f"Seconds to retry UNAVAILABLE.  [default: {PATIENCE_S:.0f} for {', '.join(PATIENT)}; else {HASTE_S:.0f}]",
)
@click.option("--tls-ca", envvar="BATCH_TLS_CA", type=FILE, help="Authorities that know the server: TLS is used.")
@click.option("--tls-cert", envvar="BATCH_TLS_CERT", type=FILE, help="Certificate of this client.")
@click.option("--tls-key", envvar="BATCH_TLS_KEY", type=FILE, help="Key of that certificate.")
@click.option("--tls-server-name", envvar="BATCH_TLS_SERVER_NAME", help="Name in the server's certificate.")
@click.option("--token-file", envvar="BATCH_TOKEN_FILE", type=FILE, help="Holds the token, unless BATCH_TOKEN is set.")
@click.version_option(__version__)
@click.pass_context
def main(context: click.Context, /, target: str, patience: float | None, **security: str | None) -> None:
    """Batches of inference requests, run by vLLM, each answered exactly once."""
    if patience is None:
        patience = PATIENCE_S if context.invoked_subcommand in PATIENT else HASTE_S
    # Where all that opens a channel looks, the watchdog's among them. A token itself is never an argument: those are
    # seen by everybody on the machine.
    os.environ.update({f"BATCH_{name.upper()}": value for name, value in security.items() if value})
    try:
        context.obj = Client(target, patience, _tell_retry)
    except (OSError, ValueError) as error:
        raise click.UsageError(str(error)) from None
    context.call_on_close(context.obj.close)


def _tell_retry(error: CallError, delay_s: float) -> None:
    err.print(f"{error.message}; trying again in {delay_s:.0f} s", style="yellow", markup=False)


def _pairs(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    for value in values:
        if "=" not in value:
            raise click.BadParameter(f"{value!r} is not KEY=VALUE")
    return dict(value.split("=", 1) for value in values)


@main.command()
@click.argument("files", type=click.File("rb"), nargs=-1, required=True, metavar="FILE...")
@click.option("--wait", is_flag=True, help="Wait until the batch is done.")
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="With --wait: results, as JSONL.")
@click.option("--request-id", default="", help="Submitting again under the same name gives the same batch.")
@click.option("-m", "--metadata", multiple=True, callback=_pairs, metavar="KEY=VALUE", help="Kept with the batch.")
@click.option("--priority", type=click.IntRange(-100, 100), default=0, show_default=True, help="Higher runs first.")
@click.option("--window", type=click.FloatRange(min=0, min_open=True), help="Seconds until it expires. Default: never.")
@json_option
@click.pass_obj
def submit(
    client: Client,
    files: tuple[BinaryIO, ...],
    wait: bool,
    output: Path | None,
    request_id: str,
    metadata: dict[str, str],
    priority: int,
    window: float | None,
    as_json: bool,
) -> None:
    """Submit FILE, requests in OpenAI's batch format, one a line. `-` reads stdin. Prints the id of the batch.

    Several files are several batches.

    \b
    Examples:
      vllm-batch submit batch.jsonl --wait -o results.jsonl
      vllm-batch submit monday.jsonl tuesday.jsonl --priority -10 -m team=search
      make-requests | vllm-batch submit - --request-id "nightly-$(date +%F)"
    """
    if output is not None and not wait:
        raise click.UsageError("--output goes with --wait; later: vllm-batch results BATCH -o FILE")
    if len(files) > 1 and (output is not None or request_id):
        raise click.UsageError("--output and --request-id are for one file")
    stored = []
    for file in files:
        with errors(interrupted="interrupted; `vllm-batch list` shows whether it was stored"):
            stored.append(_upload(client, file, request_id, metadata, priority, window))
        # Flushed: whoever reads this through a pipe needs it now.
        click.echo(json_line(stored[-1]) if as_json else stored[-1].id)
        sys.stdout.flush()
    if wait:
        # All are waited for, also after one that failed.
        good = [_wait(client, batch.id, output, as_json) for batch in stored]
        sys.exit(0 if all(good) else EXIT_FAILED)


def _upload(
    client: Client, file: BinaryIO, request_id: str, metadata: dict[str, str], priority: int, window: float | None
) -> pb.Batch:
    with _rewindable(file) as (source, size), _bar(DownloadColumn()) as progress:
        task = progress.add_task(f"uploading {file.name}", total=size)
        return client.submit(
            source,
            request_id=request_id,
            metadata=metadata,
            priority=priority,
            completion_window_s=window,
            on_sent=lambda sent: progress.update(task, completed=sent),
        )


@main.command()
@click.argument("batch")
@json_option
@click.pass_obj
def watch(client: Client, batch: str, as_json: bool) -> None:
    """Wait until BATCH is done, with a progress bar. Ctrl-C leaves it running.

    With --json: the batch whenever it changes.

    \b
    Example:
      vllm-batch watch batch_1 && echo all well
    """
    sys.exit(0 if _wait(client, batch, None, as_json, print_json if as_json else _ignore) else EXIT_FAILED)


@main.command()
@click.argument("batch")
@json_option
@click.pass_obj
def get(client: Client, batch: str, as_json: bool) -> None:
    """How BATCH stands: state, counts, tokens, times.

    \b
    Example:
      vllm-batch get batch_1 --json | jq .counts
    """
    with errors():
        found = client.get(batch)
    if as_json:
        print_json(found)
    else:
        out.print(details(found), markup=False)


@main.command()
@click.argument("batch")
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="Default: stdout.")
@click.option("--follow", is_flag=True, help="Go on until the batch is done.")
@click.option(
    "--order",
    type=click.Choice(["input", "finished"]),
    default="input",
    show_default=True,
    help="Of the requests, or as they were finished.",
)
@click.option("--json", "as_json", is_flag=True, help="As the contract's Result, with index and finish_time.")
@click.pass_obj
def results(client: Client, batch: str, output: Path | None, follow: bool, order: str, as_json: bool) -> None:
    """The results of BATCH so far, in OpenAI's batch output format, one a line.

    \b
    Examples:
      vllm-batch results batch_1 -o results.jsonl
      vllm-batch results batch_1 --follow --order finished | jq .custom_id
    """
    with errors(batch):
        _write_results(client, batch, output, follow, order, as_json)


@main.command()
@click.argument("batch")
@click.argument("custom_id")
@click.option("--json", "as_json", is_flag=True, help="As the contract's Result, with index and finish_time.")
@click.pass_obj
def result(client: Client, batch: str, custom_id: str, as_json: bool) -> None:
    """The result of one request of BATCH, in OpenAI's batch output format. Refused until it has one.

    \b
    Example:
      vllm-batch result batch_1 summarise-03-0 | jq .response.body
    """
    with errors():
        found = client.result(batch, custom_id)
    click.echo(json_line(found) if as_json else line(found))


@main.command("list")
@click.option("--state", multiple=True, type=click.Choice(STATES), help="Only these; may be repeated.")
@click.option("--limit", type=click.IntRange(1), default=20, show_default=True, help="At most this many.")
@json_option
@click.pass_obj
def list_(client: Client, state: tuple[str, ...], limit: int, as_json: bool) -> None:
    """Batches, newest first.

    \b
    Example:
      vllm-batch list --state in_progress --json | jq -r .id
    """
    states = [f"BATCH_STATE_{name.upper()}" for name in state]
    with errors():
        batches = list(client.list(states, limit))
    if as_json:
        for batch in batches:
            print_json(batch)
    elif batches:
        out.print(table(batches))
    else:
        err.print("no batches")


@main.command()
@click.argument("batch")
@json_option
@click.pass_obj
def cancel(client: Client, batch: str, as_json: bool) -> None:
    """Stop BATCH. Finished results stay. Prints its state.

    \b
    Example:
      vllm-batch cancel batch_1
    """
    with errors():
        cancelled = client.cancel(batch)
    click.echo(json_line(cancelled) if as_json else state_name(cancelled))


@main.command()
@click.argument("batch")
@click.option("--request-id", default="", help="Retrying again under the same name gives the same batch.")
@json_option
@click.pass_obj
def retry(client: Client, batch: str, request_id: str, as_json: bool) -> None:
    """Run the failed requests of BATCH again, as a new batch. Prints its id.

    \b
    Example:
      vllm-batch watch "$(vllm-batch retry batch_1)"
    """
    with errors():
        made = client.retry(batch, request_id)
    click.echo(json_line(made) if as_json else made.id)


@main.command()
@click.argument("batch")
@click.pass_obj
def delete(client: Client, batch: str) -> None:
    """Delete BATCH, which has ended, with its requests and results. Prints nothing.

    \b
    Example:
      vllm-batch delete batch_1
    """
    with errors():
        client.delete(batch)


main.add_command(recovery.group)


@main.command()
@recovery.watchdog_option
@json_option
@click.pass_obj
def status(client: Client, watchdog_target: str, as_json: bool) -> None:
    """Gateway, workers, last recovery and batches, on one screen; whatever of it is up. Exit code 4: no gateway.

    \b
    Example:
      vllm-batch status --json | jq .gateway.accepts_new_work
    """
    with errors(), Client(client.target, patience_s=0) as quick:
        gateway = ask_gateway(quick, 8)
        if as_json:
            with open_channel(watchdog_target) as channel:
                watchdog = ask_watchdog(channel)
            accepts = not (gateway.failure or gateway.refusal)
            as_dict = partial(MessageToDict, preserving_proto_field_name=True)
            state = {
                "gateway": {"accepts_new_work": accepts, "failure": gateway.failure, "refusal": gateway.refusal},
                "watchdog": {"failure": watchdog.failure},
                "workers": [as_dict(worker) for worker in watchdog.workers],
                "last_restart": as_dict(watchdog.restarts[0]) if watchdog.restarts else None,
                "batches": [as_dict(batch) for batch in gateway.batches],
            }
            click.echo(json.dumps(state))
        else:
            out.print(f"gateway   {client.target}  ", end="")
            if gateway.failure:
                out.print(gateway.failure, style="red", markup=False)
            elif gateway.refusal:
                out.print(gateway.refusal, style="yellow", markup=False)
            else:
                out.print("accepts new work", style="green")
            recovery.print_overview(watchdog_target)
            if not gateway.failure:
                out.print(table(gateway.batches) if gateway.batches else "batches: none")
    sys.exit(EXIT_UNAVAILABLE if gateway.failure else 0)


@main.command()
@recovery.watchdog_option
@click.pass_obj
def top(client: Client, watchdog_target: str) -> None:
    """The operator's screen, live: workers with both signals, batches, speed, last restarts. q or Ctrl-C ends it.

    \b
    Example:
      vllm-batch --target gpu-box:50051 top --watchdog-target gpu-box:50053
    """
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise click.UsageError("needs a terminal; for scripts: vllm-batch status --json")
    # Here, as it needs a Unix terminal and the other commands do not.
    from vllm_batch.top import run

    run(client.target, watchdog_target, out)


@main.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print what makes SHELL complete commands and options.

    \b
    Examples:
      eval "$(vllm-batch completion bash)"      # in ~/.bashrc
      eval "$(vllm-batch completion zsh)"       # in ~/.zshrc, after compinit
      vllm-batch completion fish > ~/.config/fish/completions/vllm-batch.fish
    """
    complete = get_completion_class(shell)
    assert complete is not None
    click.echo(complete(main, {}, "vllm-batch", "_VLLM_BATCH_COMPLETE").source())


def print_json(batch: pb.Batch) -> None:
    """One line, which whoever reads through a pipe has at once."""
    click.echo(json_line(batch))
    sys.stdout.flush()


def _ignore(batch: pb.Batch) -> None:
    pass


def _wait(
    client: Client,
    batch_id: str,
    output: Path | None,
    as_json: bool,
    on_progress: Callable[[pb.Batch], None] = _ignore,
) -> bool:
    """Waits with a bar, then writes the results; true when every request was answered well."""
    with errors(batch_id):
        batch = _follow(client, batch_id, on_progress)
        if output is not None:
            _write_results(client, batch_id, output)
    if as_json and on_progress is _ignore:
        print_json(batch)
    err.print(summary(batch))
    return batch.state == pb.BATCH_STATE_COMPLETED and not batch.counts.failed


def _follow(client: Client, batch_id: str, on_progress: Callable[[pb.Batch], None]) -> pb.Batch:
    """Shows a bar until the batch is terminal; on what is no terminal, a line for each tenth."""
    shown = -1
    with _bar(MofNCompleteColumn()) as progress:
        task = progress.add_task(batch_id, total=None)

        def show(batch: pb.Batch) -> None:
            nonlocal shown
            on_progress(batch)
            done, total = batch.counts.completed + batch.counts.failed, batch.counts.total
            progress.update(task, total=total, completed=done, description=f"{batch_id} {state_name(batch)}")
            tenth = 10 * done // max(1, total)
            if not err.is_terminal and tenth != shown:
                shown = tenth
                err.print(f"{batch_id} {state_name(batch)} {done}/{total}")

        return client.wait(batch_id, show)


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


def _write_results(
    client: Client,
    batch_id: str,
    output: Path | None,
    follow: bool = False,
    order: str = "input",
    as_json: bool = False,
) -> None:
    asked: dict[str, Any] = {"follow": follow, "order": f"RESULT_ORDER_{order.upper()}"}
    lines = (
        (f"{json_line(result)}\n".encode() for result in client.results(batch_id, **asked))
        if as_json
        else client.result_lines(batch_id, **asked)
    )
    if output is None:
        for some in lines:
            click.echo(some, nl=False)
        return
    # Whole or not at all: a file that is there can be trusted.
    part = output.with_name(output.name + ".part")
    try:
        with part.open("wb") as file:
            file.writelines(lines)
        part.replace(output)
    finally:
        part.unlink(missing_ok=True)
