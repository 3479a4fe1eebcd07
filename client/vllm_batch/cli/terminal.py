"""What all commands share: where they write, how they print errors, their exit codes."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import click
import grpc
from google.protobuf.message import Message
from rich.console import Console, ConsoleDimensions
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from vllm_batch.channel import check_target, open_channel
from vllm_batch.errors import CallError
from vllm_batch.output import json_line
from vllm_batch.v1 import batch_service_pb2 as pb

EXIT_FAILED = 1
EXIT_REFUSED = 3
EXIT_UNAVAILABLE = 4
EXIT_OUTPUT = 5
EXIT_INTERRUPTED = 130

# Wider than any table.
WIDE = 10_000
# All control characters but the line break and the tab.
_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(9), *range(11, 32), *range(127, 160))}


class Terminal(Console):
    """A console that prints text as it is: people's texts, and those of models, may be anything.

    Control characters, with which a text could take over the terminal, are escaped. A pipe gets whole ids and names,
    whatever COLUMNS says.
    """

    def __init__(self, **how: Any) -> None:
        super().__init__(highlight=False, soft_wrap=True, markup=False, emoji=False, **how)

    @property  # type: ignore[misc]  # Nobody sets it.
    def size(self) -> ConsoleDimensions:
        """Of what is no terminal the width is unlimited."""
        found = super().size
        return found if self.is_terminal else ConsoleDimensions(WIDE, found.height)

    def render_str(self, text: str, **how: Any) -> Text:
        """Text of a string, in a cell of a table too."""
        return super().render_str(printable(text), **how)


def printable(text: str) -> str:
    """The text with its control characters escaped, except line breaks and tabs."""
    return text.translate(_CONTROLS)


out = Terminal()
err = Terminal(stderr=True)


def restore_streams() -> None:
    """Opens what was closed of stdin, stdout and stderr, so that no file or connection gets its number.

    Otherwise gRPC would log into that file. Reading such a stdin and writing to such a stdout fails, rather than being
    as good as an empty file and silence. Characters that an open stdout does not have are escaped, as those of stderr.
    """
    for name, flags, mode in (
        ("stdin", os.O_WRONLY, "rb"),
        ("stdout", os.O_RDONLY, "wb"),
        ("stderr", os.O_WRONLY, "wb"),
    ):
        if getattr(sys, name) is None:
            # Without buffers: nothing that could not be written is left for the interpreter's end.
            raw = os.fdopen(os.open(os.devnull, flags), mode, buffering=0)
            setattr(sys, name, io.TextIOWrapper(raw, write_through=True))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


@contextmanager
def errors(batch_id: str = "", *, interrupted: str = "", unanswered: str = "") -> Iterator[None]:
    """Turns a CallError into a message and an exit code, without a traceback.

    Ctrl-C prints how to come back to `batch_id`, or else the text `interrupted`; a call that nobody answered prints
    `unanswered`.
    """
    try:
        yield
    except CallError as error:
        unavailable = error.code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
        for field, description in error.violations:
            err.print(f"{field}: {description}", style="red")
        if not error.violations:
            reason = f" ({error.reason})" if error.reason else ""
            err.print(f"{error.code.name}{reason}: {error.message}", style="red")
        if unavailable and not error.reason:
            err.print(
                "no answer from the server: is it running, is --target its address, and does it require TLS"
                " (--tls-ca) or a client certificate (--tls-cert)?"
            )
            if unanswered:
                err.print(unanswered)
        if error.code is grpc.StatusCode.UNIMPLEMENTED:
            err.print("the server there has no such call: is --target the address of a gateway, and of this version?")
        sys.exit(EXIT_UNAVAILABLE if unavailable else EXIT_REFUSED)
    except KeyboardInterrupt:
        if batch_id:
            interrupted = f"{batch_id} goes on. Come back with: vllm-batch watch {batch_id}"
        err.print(f"\n{interrupted}".rstrip())
        sys.exit(EXIT_INTERRUPTED)


def unsure(what: str, request_id: str) -> AbstractContextManager[None]:
    """`errors` around a call that stores `what`: if its answer does not come, prints how to store it once all the
    same."""
    again = f"{what} may or may not be stored: repeat it with --request-id {request_id}, which never stores it twice"
    return errors(interrupted=f"interrupted; {again}", unanswered=again)


@contextmanager
def file_errors(hint: str = "") -> Iterator[None]:
    """Turns the OSError of a file, stdout included, into one line and an exit code. A closed pipe is for click."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        name = f"{error.filename}: " if error.filename else ""
        err.print(f"{name}{error.strerror or error}{hint}", style="red")
        _finish_stdout()
        sys.exit(EXIT_OUTPUT)


def _finish_stdout() -> None:
    """Writes what is left in the buffer of stdout, or drops it: the interpreter would end with status 120."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def open_or_fail(target: str) -> grpc.Channel:
    """A channel to `target`. Contradictory TLS or token settings are a usage error."""
    try:
        check_target(target)
        return open_channel(target)
    except (OSError, ValueError) as error:
        raise click.UsageError(str(error)) from None


@contextmanager
def calls(target: str, stub: Callable[[grpc.Channel], object]) -> Iterator[Any]:
    """A service at `target`, by its stub. Its calls raise CallError."""
    with open_or_fail(target) as channel:
        try:
            yield stub(channel)
        except grpc.RpcError as error:
            raise CallError(error) from error


def print_json(message: Message) -> None:
    """Prints a line of JSON, flushed so that a reader of the pipe has it at once."""
    click.echo(json_line(message))
    sys.stdout.flush()


def print_batch(batch: pb.Batch, text: str, as_json: bool) -> None:
    """Prints a batch as JSON or as `text`, flushed as well."""
    if as_json:
        print_json(batch)
    else:
        click.echo(text)
        sys.stdout.flush()


def progress_bar(counts: ProgressColumn) -> Progress:
    """A bar on stderr; nothing where that is no terminal."""
    return Progress(
        # A name of a file may look like markup.
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        counts,
        TimeElapsedColumn(),
        console=err,
        disable=not err.is_terminal,
    )
