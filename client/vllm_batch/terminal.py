"""What all commands have in common: where they write, what errors look like, exit codes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import click
import grpc
from rich.console import Console

from vllm_batch.calls import CallError

EXIT_FAILED = 1
EXIT_REFUSED = 3
EXIT_UNAVAILABLE = 4
EXIT_INTERRUPTED = 130

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)

json_option = click.option("--json", "as_json", is_flag=True, help="JSON, one object a line.")


@contextmanager
def errors(batch_id: str = "", *, interrupted: str = "") -> Iterator[None]:
    """Errors of calls as messages and exit codes; no traceback. Ctrl-C says how to come back to `batch_id`, or what
    `interrupted` says.
    """
    try:
        yield
    except CallError as error:
        unavailable = error.code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
        for field, description in error.violations:
            err.print(f"{field}: {description}", style="red", markup=False)
        if not error.violations:
            reason = f" ({error.reason})" if error.reason else ""
            err.print(f"{error.code.name}{reason}: {error.message}", style="red", markup=False)
        if unavailable and not error.reason:
            err.print("no answer from the server: is it running, and is this its address? (--help: --target)")
        sys.exit(EXIT_UNAVAILABLE if unavailable else EXIT_REFUSED)
    except KeyboardInterrupt:
        if batch_id:
            interrupted = f"{batch_id} goes on. Come back with: vllm-batch watch {batch_id}"
        err.print(f"\n{interrupted}".rstrip())
        sys.exit(EXIT_INTERRUPTED)
