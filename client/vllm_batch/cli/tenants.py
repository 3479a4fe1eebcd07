"""`vllm-batch tenants`: who shares the service, what each has queued and used."""

from __future__ import annotations

from collections.abc import Iterable

import click
from rich.table import Table

from vllm_batch.cli.options import json_option
from vllm_batch.cli.terminal import errors, out, print_json
from vllm_batch.client import Client
from vllm_batch.v1 import batch_service_pb2 as pb


@click.command()
@json_option
@click.pass_obj
def tenants(client: Client, as_json: bool) -> None:
    """Show your tenant, or with the role operate all: share, queue, tokens used.

    The queue is shown with its limits: 3/100 batches are 3 of at most 100.

    \b
    Example:
      vllm-batch tenants --json | jq '{name, queued_requests}'
    """
    with errors():
        found = client.tenants()
    if as_json:
        for tenant in found:
            print_json(tenant)
    else:
        out.print(_table(found))


def _table(found: Iterable[pb.Tenant]) -> Table:
    made = Table(box=None, pad_edge=False)
    for name in ("tenant", "weight", "share", "batches", "requests", "tokens queued", "prompt used", "completion used"):
        made.add_column(name, justify="left" if name == "tenant" else "right")
    for tenant in found:
        made.add_row(
            tenant.name,
            f"{tenant.weight:g}",
            f"{tenant.share:.0%}",
            *(_of(tenant, name) for name in ("open_batches", "queued_requests", "queued_tokens")),
            str(tenant.usage.prompt_tokens),
            str(tenant.usage.completion_tokens),
        )
    return made


def _of(tenant: pb.Tenant, name: str) -> str:
    """What is in the queue, with its limit if there is one."""
    limit = f"/{getattr(tenant.limits, name)}" if tenant.limits.HasField(name) else ""
    return f"{getattr(tenant, name)}{limit}"
