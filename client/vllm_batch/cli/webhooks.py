"""`vllm-batch webhooks`: deliveries, a test of a target, events sent again."""

from __future__ import annotations

import sys
from collections.abc import Iterable

import click
from rich.table import Table

from vllm_batch.cli.options import json_option
from vllm_batch.cli.terminal import EXIT_FAILED, errors, out, print_json
from vllm_batch.client import Client
from vllm_batch.v1 import webhook_service_pb2 as pb

STATES = ("pending", "delivered", "given_up")


@click.group(invoke_without_command=True)
@click.option("--batch", default="", help="Only that of this batch.")
@click.option("--state", "states", type=click.Choice(STATES), multiple=True, help="Only in this state; repeatable.")
@click.option("--tenant", default="", help="Only of this tenant. Default: all that you may see.")
@click.option("--limit", type=click.IntRange(1), default=20, show_default=True, help="Show at most this many.")
@json_option
@click.pass_context
def webhooks(
    context: click.Context, batch: str, states: tuple[str, ...], tenant: str, limit: int, as_json: bool
) -> None:
    """List webhooks, newest first: state, tries, last error, next try. Test a target, or send one again.

    \b
    Examples:
      vllm-batch webhooks --state given_up
      vllm-batch webhooks --batch batch_1 --json | jq .last_error
    """
    if context.invoked_subcommand is not None:
        return
    client: Client = context.obj
    with errors():
        _show(client.deliveries([f"DELIVERY_STATE_{state.upper()}" for state in states], limit, batch, tenant), as_json)


@webhooks.command()
@click.argument("target", metavar="[URL|TENANT]", default="")
@json_option
@click.pass_obj
def test(client: Client, target: str, as_json: bool) -> None:
    """Send a test event to URL, or to the target of TENANT. Default: your tenant's.

    Exits with 1 if the target did not answer with 2xx.

    \b
    Examples:
      vllm-batch webhooks test
      vllm-batch webhooks test https://example.com/hook
    """
    is_url = "://" in target
    with errors():
        answer = client.test_webhook(url=target if is_url else "", tenant="" if is_url else target)
    if as_json:
        print_json(answer)
    else:
        told = answer.error or f"answered {answer.status}"
        out.print(f"{answer.url}: {told} ({answer.duration.ToMilliseconds() / 1000:.1f} s)")
    sys.exit(EXIT_FAILED if answer.error else 0)


@webhooks.command()
@click.argument("webhook", metavar="[ID]", default="")
@click.option("--batch", default="", help="That of this batch, instead of ID.")
@json_option
@click.pass_obj
def replay(client: Client, webhook: str, batch: str, as_json: bool) -> None:
    """Send the webhook ID again, or that of --batch. It keeps its id.

    \b
    Examples:
      vllm-batch webhooks replay evt_0b7d2c...
      vllm-batch webhooks replay --batch batch_1
    """
    if bool(webhook) == bool(batch):
        raise click.UsageError("give either ID or --batch")
    with errors():
        _show(client.replay_deliveries(delivery_id=webhook, batch_id=batch), as_json)


def _show(found: Iterable[pb.Delivery], as_json: bool) -> None:
    if as_json:
        for delivery in found:
            print_json(delivery)
    else:
        out.print(_table(found))


def _table(found: Iterable[pb.Delivery]) -> Table:
    made = Table(box=None, pad_edge=False)
    for name in ("webhook", "batch", "event", "state", "tries", "next try (UTC)", "target", "last error"):
        made.add_column(name, justify="right" if name == "tries" else "left", no_wrap=True)
    for each in found:
        made.add_row(
            each.id,
            each.batch_id,
            each.type,
            pb.DeliveryState.Name(each.state).removeprefix("DELIVERY_STATE_").lower(),
            str(each.tries),
            f"{each.next_try_time.ToDatetime():%Y-%m-%d %H:%M:%S}" if each.HasField("next_try_time") else "-",
            each.url,
            each.last_error,
        )
    return made
