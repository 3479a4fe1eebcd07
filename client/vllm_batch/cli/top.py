"""`vllm-batch top`: the operator's screen, until somebody quits it."""

from __future__ import annotations

import sys

import click

from vllm_batch.cli.options import watchdog_option
from vllm_batch.cli.terminal import out
from vllm_batch.client import Client


@click.command()
@watchdog_option
@click.pass_obj
def top(client: Client, watchdog_target: str) -> None:
    """Live operator screen: workers with both signals, batches, throughput, last restarts. q or Ctrl-C quits.

    \b
    Example:
      vllm-batch --target gpu-box:50051 top --watchdog-target gpu-box:50053
    """
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise click.UsageError("needs a terminal; for scripts: vllm-batch status --json")
    # Imported here, as only this command needs a Unix terminal.
    from vllm_batch.cli.live import run

    run(client.target, watchdog_target, out)
