"""`vllm-batch submit`: from files to batches and, with --wait, to results."""

from __future__ import annotations

import errno
import os
import shutil
import sys
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Literal, cast

import click
from rich.progress import DownloadColumn

from vllm_batch.cli.options import INPUT_FILE, OUTPUT_FILE, STDIN, Number, json_option
from vllm_batch.cli.terminal import EXIT_FAILED, err, file_errors, print_batch, print_json, progress_bar, unsure
from vllm_batch.cli.watch import is_success, wait_for
from vllm_batch.client import Client
from vllm_batch.v1 import batch_service_pb2 as pb

# What writing raises, and reading does not.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# The most that the server takes.
MAX_WINDOW_S = 366 * 86_400.0


def _pairs(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    for value in values:
        if "=" not in value:
            raise click.BadParameter(f"{value!r} is not KEY=VALUE")
    return dict(value.split("=", 1) for value in values)


@click.command()
@click.argument("files", type=INPUT_FILE, nargs=-1, required=True, metavar="FILE...")
@click.option("--wait", is_flag=True, help="Wait until the batch has ended.")
@click.option("-o", "--output", type=OUTPUT_FILE, help="With --wait: write the results to this file, as JSONL.")
@click.option("--request-id", default="", help="Idempotency key: submitting again with it returns the same batch.")
@click.option(
    "-m", "--metadata", multiple=True, callback=_pairs, metavar="KEY=VALUE", help="Stored with the batch; repeatable."
)
@click.option("--priority", type=click.IntRange(-100, 100), default=0, show_default=True, help="Higher runs first.")
@click.option(
    "--window", type=Number(0, MAX_WINDOW_S, min_open=True), help="Seconds until the batch expires. Default: never."
)
@click.option(
    "--order",
    type=click.Choice(["prefix", "input"]),
    default="prefix",
    show_default=True,
    help="Order in which requests run: by shared prefixes, which spares computing them again, or as in FILE.",
)
@click.option("--webhook", default="", metavar="URL", help="Notify this URL of its end. Default: your tenant's.")
@click.option("--require-live", is_flag=True, help="Refuse FILE if it names a model that no worker serves.")
@json_option
@click.pass_obj
def submit(
    client: Client,
    files: tuple[str, ...],
    wait: bool,
    output: Path | None,
    request_id: str,
    metadata: dict[str, str],
    priority: int,
    window: float | None,
    order: Literal["prefix", "input"],
    webhook: str,
    require_live: bool,
    as_json: bool,
) -> None:
    """Submit FILE: requests in the OpenAI batch format, one per line. `-` reads stdin. Prints the batch id.

    Each file becomes a batch of its own.

    \b
    Examples:
      vllm-batch submit batch.jsonl --wait -o results.jsonl
      vllm-batch submit monday.jsonl tuesday.jsonl --priority -10 -m team=search
      make-requests | vllm-batch submit - --request-id "nightly-$(date +%F)"
    """
    if output is not None and not wait:
        raise click.UsageError("--output needs --wait; to get results later: vllm-batch results BATCH -o FILE")
    if len(files) > 1 and (output is not None or request_id):
        raise click.UsageError("--output and --request-id allow only one FILE")
    if output is not None and _is_one_of(output, files):
        raise click.UsageError(f"--output is the file that is submitted, and would replace it: {output}")
    stored: list[pb.Batch] = []
    try:
        for name in files:
            key = request_id or str(uuid.uuid4())
            with (
                unsure("stdin" if name == "-" else name, key),
                file_errors(),
                _naming(name),
                cast(BinaryIO, click.open_file(name, "rb")) as file,
            ):
                stored.append(_upload(client, file, key, metadata, priority, window, order, webhook, require_live))
            with file_errors(f"; the batch is stored: {stored[-1].id}"):
                print_batch(stored[-1], stored[-1].id, as_json)
    except SystemExit:
        if len(files) > 1:
            err.print(f"{len(stored)} of {len(files)} files are stored for certain; those after {name} were not sent")
        raise
    if wait:
        # Waits for all, also after one has failed.
        ended = [_wait(client, batch.id, output, as_json) for batch in stored]
        sys.exit(0 if all(map(is_success, ended)) else EXIT_FAILED)


def _is_one_of(output: Path, files: tuple[str, ...]) -> bool:
    """Whether an output is a file that is read, by whichever name."""
    if not output.is_file():
        # A terminal or a pipe may be both.
        return False
    found = output.stat()
    return any(os.path.samestat(found, os.stat(STDIN if name == "-" else name)) for name in files)


def _upload(
    client: Client,
    file: BinaryIO,
    request_id: str,
    metadata: dict[str, str],
    priority: int,
    window: float | None,
    order: Literal["prefix", "input"],
    webhook: str,
    require_live: bool,
) -> pb.Batch:
    with _seekable(file) as (source, size), progress_bar(DownloadColumn()) as progress:
        task = progress.add_task(f"uploading {file.name}", total=size)
        return client.submit(
            source,
            request_id=request_id,
            metadata=metadata,
            priority=priority,
            completion_window_s=window,
            order=order,
            webhook=webhook,
            require_live=require_live,
            on_sent=lambda sent: progress.update(task, completed=sent),
        )


def _wait(client: Client, batch_id: str, output: Path | None, as_json: bool) -> pb.Batch:
    batch = wait_for(client, batch_id, output=output)
    if as_json:
        print_json(batch)
    return batch


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Names the file in what reading it raises."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or name
        raise


@contextmanager
def _seekable(file: BinaryIO) -> Iterator[tuple[BinaryIO, int]]:
    """The file and its size in bytes; a pipe is copied to a temporary file first.

    So is a stdin of which another command has read the beginning: each attempt begins at the first byte.
    """
    if file.seekable() and not file.tell():
        yield file, os.fstat(file.fileno()).st_size
        return
    with tempfile.TemporaryFile() as copy:
        try:
            shutil.copyfileobj(file, copy)
            copy.flush()
        except OSError as error:
            if error.errno in FULL:
                error.filename = tempfile.gettempdir()
                error.strerror = f"{error.strerror}: {file.name} is copied there first; TMPDIR can name another folder"
            raise
        yield copy, copy.tell()
