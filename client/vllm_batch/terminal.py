"""What all commands have in common: where they write, what errors look like, exit codes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import grpc
from rich.console import Console

from vllm_batch.calls import CallError

EXIT_FAILED = 1
EXIT_REFUSED = 3
EXIT_UNAVAILABLE = 4
EXIT_INTERRUPTED = 130

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)


@contextmanager
def errors(batch_id: str = "") -> Iterator[None]:
    """Errors of calls as messages and exit codes; no traceback. Ctrl-C says how to come back to `batch_id`."""
    try:
        yield
    except CallError as error:
        if error.violations:
            for field, description in error.violations:
                err.print(f"{field}: {description}", style="red", markup=False)
        else:
            err.print(f"{error.code.name}: {error.message}", style="red", markup=False)
        unavailable = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
        sys.exit(EXIT_UNAVAILABLE if error.code in unavailable else EXIT_REFUSED)
    except KeyboardInterrupt:
        if batch_id:
            err.print(f"\n{batch_id} goes on. Come back with: vllm-batch watch {batch_id}")
        sys.exit(EXIT_INTERRUPTED)
