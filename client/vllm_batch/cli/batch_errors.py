"""`vllm-batch errors`: what went wrong in a batch, by kind."""

from __future__ import annotations

import click

from vllm_batch.cli.options import json_option
from vllm_batch.cli.terminal import err, errors, out, print_json
from vllm_batch.client import Client
from vllm_batch.v1 import batch_service_pb2 as pb


@click.command("errors")
@click.argument("batch")
@json_option
@click.pass_obj
def errors_(client: Client, batch: str, as_json: bool) -> None:
    """Show each kind of failure in BATCH, with its count and one example.

    Failures are of one kind if they differ in nothing but numbers and quoted texts.

    \b
    Examples:
      vllm-batch errors batch_1
      vllm-batch results batch_1 --only failed | jq -r .custom_id
    """
    with errors():
        found = client.errors(batch)
    if as_json:
        print_json(found)
        return
    for kind in found.kinds:
        out.print(f"{kind.count:>8}  {title(kind)}")
        out.print(f"          {kind.message}")
        out.print(f"          e.g. {kind.example_custom_id}: {kind.example_message}")
    if found.other_count:
        out.print(f"{found.other_count:>8}  of other kinds")
    if not found.kinds:
        err.print("no failures")
    if found.is_partial:
        counted = sum(kind.count for kind in found.kinds) + found.other_count
        err.print(f"only the first {counted:,} failures are counted", style="yellow")


def title(kind: pb.ErrorKind) -> str:
    """The code of an error, or the status and type of a response."""
    return kind.code or f"HTTP {kind.status_code} {kind.type}".rstrip()
