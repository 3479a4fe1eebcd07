"""The commands on stored batches: list, get, cancel, retry, delete."""

from __future__ import annotations

import uuid

import click

from vllm_batch.cli.options import json_option
from vllm_batch.cli.tables import details, notes, table
from vllm_batch.cli.terminal import err, errors, out, print_batch, print_json, unsure
from vllm_batch.client import Client
from vllm_batch.output import state_name
from vllm_batch.v1 import batch_service_pb2 as pb

STATES = [name.removeprefix("BATCH_STATE_").lower() for name in pb.BatchState.keys()[1:]]


@click.command("list")
@click.option("--state", multiple=True, type=click.Choice(STATES), help="Only batches in this state; repeatable.")
@click.option("--limit", type=click.IntRange(1), default=20, show_default=True, help="Show at most this many.")
@click.option("--tenant", default="", help="Only batches of this tenant; another's needs the role operate.")
@json_option
@click.pass_obj
def list_(client: Client, state: tuple[str, ...], limit: int, tenant: str, as_json: bool) -> None:
    """List batches, newest first.

    \b
    Example:
      vllm-batch list --state in_progress --json | jq -r .id
    """
    states = [f"BATCH_STATE_{name.upper()}" for name in state]
    with errors():
        batches = list(client.list(states, limit, tenant))
    if as_json:
        for batch in batches:
            print_json(batch)
    elif batches:
        out.print(table(batches))
        for line in notes(batches):
            out.print(line)
    else:
        err.print("no batches")


@click.command()
@click.argument("batch")
@json_option
@click.pass_obj
def get(client: Client, batch: str, as_json: bool) -> None:
    """Show BATCH: state, counts, tokens, times; when it will end, or why it does not move and what to do.

    \b
    Example:
      vllm-batch get batch_1 --json | jq .counts
    """
    with errors():
        found = client.get(batch)
    if as_json:
        print_json(found)
    else:
        out.print(details(found))


@click.command()
@click.argument("batch")
@json_option
@click.pass_obj
def cancel(client: Client, batch: str, as_json: bool) -> None:
    """Cancel BATCH. Finished results are kept. Prints its new state.

    \b
    Example:
      vllm-batch cancel batch_1
    """
    with errors():
        cancelled = client.cancel(batch)
    print_batch(cancelled, state_name(cancelled), as_json)


@click.command()
@click.argument("batch")
@click.option("--request-id", default="", help="Idempotency key: retrying again with it returns the same batch.")
@json_option
@click.pass_obj
def retry(client: Client, batch: str, request_id: str, as_json: bool) -> None:
    """Rerun the requests of BATCH that failed or have no result, as a new batch. Prints its id.

    \b
    Example:
      vllm-batch watch "$(vllm-batch retry batch_1)"
    """
    key = request_id or str(uuid.uuid4())
    with unsure("the new batch", key):
        created = client.retry(batch, key)
    print_batch(created, created.id, as_json)


@click.command()
@click.argument("batch")
@click.pass_obj
def delete(client: Client, batch: str) -> None:
    """Delete BATCH with its requests and results. It must have ended. Prints nothing.

    \b
    Example:
      vllm-batch delete batch_1
    """
    with errors():
        client.delete(batch)


commands = (list_, get, cancel, retry, delete)
