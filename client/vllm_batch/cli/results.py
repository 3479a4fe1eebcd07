"""`vllm-batch results` and `result`: results to stdout or a file."""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import click

from vllm_batch.cli.options import OUTPUT_FILE, STDOUT, is_stdout, part_of, result_json_option
from vllm_batch.cli.terminal import errors, file_errors
from vllm_batch.client import Client
from vllm_batch.output import json_line, line


@click.command()
@click.argument("batch")
@click.option("-o", "--output", type=OUTPUT_FILE, help="Write to this file. Default: stdout.")
@click.option("--follow", is_flag=True, help="Keep going until the batch has ended.")
@click.option(
    "--order",
    type=click.Choice(["input", "finished"]),
    default="input",
    show_default=True,
    help="Input order, or order of completion.",
)
@click.option("--only", type=click.Choice(["succeeded", "failed"]), help="Only these results.")
@result_json_option
@click.pass_obj
def results(
    client: Client, batch: str, output: Path | None, follow: bool, order: str, only: str | None, as_json: bool
) -> None:
    """Print the results of BATCH so far, in OpenAI's batch output format, one per line.

    \b
    Examples:
      vllm-batch results batch_1 -o results.jsonl
      vllm-batch results batch_1 --follow --order finished | jq .custom_id
      vllm-batch results batch_1 --only failed | jq -r .custom_id
    """
    write_results(client, batch, output, follow, order, as_json, only)


@click.command()
@click.argument("batch")
@click.argument("custom_id")
@result_json_option
@click.pass_obj
def result(client: Client, batch: str, custom_id: str, as_json: bool) -> None:
    """Print the result of one request of BATCH, in OpenAI's batch output format.

    Fails with NOT_FOUND until the request has finished.

    \b
    Example:
      vllm-batch result batch_1 summarise-03-0 | jq .response.body
    """
    with errors():
        found = client.result(batch, custom_id)
        if as_json or not found.response.omitted_body_bytes:
            # Bytes, as all results: in UTF-8 whatever the locale.
            click.echo((json_line(found) if as_json else line(found)).encode())
            return
        for piece in client.result_line(batch, found):
            click.echo(piece, nl=False)


def write_results(
    client: Client,
    batch_id: str,
    output: Path | None,
    follow: bool = False,
    order: str = "input",
    as_json: bool = False,
    only: str | None = None,
) -> None:
    """Writes the results to `output`, completely or not at all; None: to stdout as they come."""
    asked: dict[str, Any] = {"follow": follow, "order": f"RESULT_ORDER_{order.upper()}"}
    if only:
        asked["filter"] = f"RESULT_FILTER_{only.upper()}"
    lines = (
        (f"{json_line(result)}\n".encode() for result in client.results(batch_id, **asked))
        if as_json
        else client.result_bytes(batch_id, **asked)
    )
    again = f"the results stay stored: vllm-batch results {batch_id} -o FILE"
    with errors(interrupted=f"interrupted; {again}"), file_errors(f"; {again}"):
        if output is None:
            for some in lines:
                click.echo(some, nl=False)
        else:
            _write_file(output, lines)


def _write_file(output: Path, lines: Iterable[bytes]) -> None:
    """A file that exists under its name can be trusted to be complete."""
    part = part_of(output)
    if part is None:
        # Opened again, a file behind stdout would lose what it has.
        with os.fdopen(os.dup(STDOUT), "wb") if is_stdout(output) else output.open("wb") as file:
            file.writelines(lines)
        return
    try:
        with _ended_by_signals(), part.open("wb") as file:
            with contextlib.suppress(FileNotFoundError):
                # Whoever may not read the older file may not read this one.
                part.chmod(stat.S_IMODE(output.stat().st_mode))
            file.writelines(lines)
            file.flush()
            # A disk may report a failed write only now.
            os.fsync(file.fileno())
        part.replace(output)
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """SIGTERM, as of `timeout` or a scheduler, and a closed terminal end this as Ctrl-C does: nothing is left behind.

    Where they are ignored, as under nohup, they stay so.
    """

    def end(number: int, _: object) -> None:
        sys.exit(128 + number)

    # Python gives signals to the main thread alone; Windows has no SIGHUP.
    is_main = threading.current_thread() is threading.main_thread()
    known = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    numbers = [number for number in known if is_main and signal.getsignal(number) is signal.SIG_DFL]
    for number in numbers:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)
