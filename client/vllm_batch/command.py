"""Where the `vllm-batch` command begins."""

from __future__ import annotations

import signal
import sys


def main() -> None:
    """Runs it. Ctrl-C while its modules are imported, for up to a second, ends it at once and without a traceback."""
    before = signal.getsignal(signal.SIGINT)
    # Ignored, as under nohup, it stays ignored.
    if before is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from vllm_batch.cli import main as command

    try:
        signal.signal(signal.SIGINT, before)
        command()
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        # While the interpreter ends, too.
        if before is signal.default_int_handler:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
