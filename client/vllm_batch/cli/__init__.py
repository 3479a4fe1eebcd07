"""The `vllm-batch` command: its common options here, each subject's commands in a file of its own."""

from __future__ import annotations

import os
import sys
from typing import Any

import click

from vllm_batch import __version__
from vllm_batch.channel import DEFAULT_TARGET
from vllm_batch.cli import (
    batch_errors,
    batches,
    completion,
    hosts,
    recovery,
    results,
    status,
    submit,
    tenants,
    top,
    watch,
    webhooks,
)
from vllm_batch.cli.options import Number
from vllm_batch.cli.terminal import EXIT_INTERRUPTED, err, file_errors, restore_streams
from vllm_batch.client import Client
from vllm_batch.errors import CallError
from vllm_batch.retries import PATIENCE_S

EPILOG = """\b
Your first batch:
  vllm-batch status
  vllm-batch submit batch.jsonl --wait -o results.jsonl
\b
Exit codes:
  0    success; with --wait: every request was answered with 2xx
  1    the batch has failed requests or did not complete
  2    usage error
  3    rejected by the server; every wrong line and field is printed
  4    no worker, gateway or database within --patience seconds
  5    a file could not be read or written, stdout included
  130  Ctrl-C; a stored batch keeps running
\b
Data goes to stdout, everything else to stderr. Options such as --target and
--patience come before the command. BATCH_TARGET and BATCH_WATCHDOG_TARGET
replace the default addresses.
"""
# Commands that may run unattended. For all others somebody is waiting.
PATIENT = ("submit", "watch", "results", "retry")
INTERACTIVE_PATIENCE_S = 10.0
FILE = click.Path(exists=True, dir_okay=False)


class _Commands(click.Group):
    """Turns the file errors of any command into one line, also where the shell has closed a standard stream.

    Arguments that are not UTF-8 are a usage error, except for names of files.
    """

    def invoke(self, ctx: click.Context) -> Any:
        """Runs the command. Ctrl-C outside of any call ends it as one within a call does; click would make it a 1."""
        try:
            try:
                return super().invoke(ctx)
            finally:
                # click would close it out of reach.
                ctx.close()
        except KeyboardInterrupt:
            sys.exit(EXIT_INTERRUPTED)

    def main(self, *args: Any, **kwargs: Any) -> Any:
        restore_streams()
        try:
            with file_errors():
                return super().main(*args, **kwargs)
        except UnicodeEncodeError as error:
            # Everything that is sent is UTF-8.
            err.print(f"Error: {error.object!r} is not UTF-8", style="red")
            sys.exit(2)


@click.group(cls=_Commands, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--target", envvar="BATCH_TARGET", default=DEFAULT_TARGET, show_default=True, help="Gateway address, host:port."
)
@click.option(
    "--patience",
    type=Number(0),
    help="Seconds to retry while the service is unavailable.  "
    f"[default: {PATIENCE_S:.0f} for {', '.join(PATIENT)}; else {INTERACTIVE_PATIENCE_S:.0f}]",
)
@click.option("--tls-ca", envvar="BATCH_TLS_CA", type=FILE, help="CA bundle used to verify the server; enables TLS.")
@click.option("--tls-cert", envvar="BATCH_TLS_CERT", type=FILE, help="Client certificate.")
@click.option("--tls-key", envvar="BATCH_TLS_KEY", type=FILE, help="Private key of the client certificate.")
@click.option(
    "--tls-server-name",
    envvar="BATCH_TLS_SERVER_NAME",
    help="Name in the server's certificate, if not the target's.",
)
@click.option(
    "--token-file", envvar="BATCH_TOKEN_FILE", type=FILE, help="File with the bearer token; BATCH_TOKEN overrides it."
)
@click.version_option(__version__)
@click.pass_context
def main(context: click.Context, /, target: str, patience: float | None, **security: str | None) -> None:
    """Run batches of inference requests on vLLM; each request is answered exactly once."""
    if patience is None:
        patience = PATIENCE_S if context.invoked_subcommand in PATIENT else INTERACTIVE_PATIENCE_S
    # In the environment every channel finds them, those to the watchdog included. There is no option for the token
    # itself: everybody on the machine can read the arguments of a process.
    os.environ.update({f"BATCH_{name.upper()}": value for name, value in security.items() if value})
    try:
        context.obj = Client(target, patience, _print_retry)
    except (OSError, ValueError) as error:
        raise click.UsageError(str(error)) from None
    context.call_on_close(context.obj.close)


def _print_retry(error: CallError, delay_s: float) -> None:
    err.print(f"{error.message}; trying again in {delay_s:.0f} s", style="yellow")


for command in (
    submit.submit,
    watch.watch,
    results.results,
    results.result,
    batch_errors.errors_,
    *batches.commands,
    tenants.tenants,
    webhooks.webhooks,
    status.status,
    top.top,
    recovery.recovery,
    hosts.hosts,
    completion.completion,
):
    main.add_command(command)
