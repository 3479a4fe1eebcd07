"""`vllm-batch status`: everything on one screen, once."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import click
from google.protobuf.json_format import MessageToDict

from vllm_batch.cli.options import json_option, watchdog_option
from vllm_batch.cli.overview import Gateway, Watchdog, ask_gateway, ask_hosts, ask_watchdog
from vllm_batch.cli.recovery import event_line, print_worker
from vllm_batch.cli.tables import notes, table
from vllm_batch.cli.terminal import EXIT_UNAVAILABLE, errors, open_or_fail, out
from vllm_batch.client import Client
from vllm_batch.v1 import host_service_pb2 as hpb

BATCHES_SHOWN = 8
# Hosts named in each state; `vllm-batch hosts` shows all.
HOSTS_NAMED = 5

_as_dict = partial(MessageToDict, preserving_proto_field_name=True)


@click.command()
@watchdog_option
@json_option
@click.pass_obj
def status(client: Client, watchdog_target: str, as_json: bool) -> None:
    """Show gateway, workers, last recovery and batches on one screen; shows whatever is reachable.

    Workers are those of the watchdog that is asked. Of several hosts, operators see how many are there and which are
    lost.

    Exits with 4 if the gateway does not answer.

    \b
    Example:
      vllm-batch status --json | jq .gateway.accepts_new_work
    """
    with errors(), Client(client.target, patience_s=0) as quick, open_or_fail(watchdog_target) as channel:
        gateway = ask_gateway(quick, BATCHES_SHOWN)
        hosts = () if gateway.failure else ask_hosts(quick)
        if as_json:
            click.echo(json.dumps(_json(gateway, hosts, ask_watchdog(channel))))
        else:
            # At once: a watchdog that hangs must not delay it.
            _print_gateway(client.target, gateway)
            if len(hosts) > 1:
                out.print(f"hosts     {hosts_text(hosts)}")
            _print_watchdog(watchdog_target, ask_watchdog(channel))
            if not gateway.failure:
                out.print(table(gateway.batches) if gateway.batches else "batches: none")
                for line in notes(gateway.batches):
                    out.print(line)
    sys.exit(EXIT_UNAVAILABLE if gateway.failure else 0)


def _json(gateway: Gateway, hosts: Sequence[hpb.Host], watchdog: Watchdog) -> dict[str, Any]:
    accepts = not (gateway.failure or gateway.refusal)
    return {
        "gateway": {"accepts_new_work": accepts, "failure": gateway.failure, "refusal": gateway.refusal},
        "hosts": [_as_dict(host) for host in hosts],
        "watchdog": {"failure": watchdog.failure},
        "workers": [_as_dict(worker) for worker in watchdog.workers],
        "last_restart": _as_dict(watchdog.restarts[0]) if watchdog.restarts else None,
        "models": list(gateway.models),
        "batches": [_as_dict(batch) for batch in gateway.batches],
    }


def _print_gateway(target: str, gateway: Gateway) -> None:
    out.print(f"gateway   {target}  ", end="")
    if gateway.failure:
        out.print(gateway.failure, style="red")
    elif gateway.refusal:
        out.print(gateway.refusal, style="yellow")
    else:
        out.print("accepts new work", style="green")


def hosts_text(hosts: Sequence[hpb.Host]) -> str:
    """How many are there, and which are not."""
    there = sum(host.state == hpb.HOST_STATE_ALIVE for host in hosts)
    parts = [f"{there} of {len(hosts)} there"]
    for state, word in ((hpb.HOST_STATE_LOST, "lost"), (hpb.HOST_STATE_STOPPED, "stopped")):
        names = [host.name for host in hosts if host.state == state]
        if names:
            more = f" and {len(names) - HOSTS_NAMED} more" if len(names) > HOSTS_NAMED else ""
            parts.append(f"{word}: {', '.join(names[:HOSTS_NAMED])}{more}")
    return "; ".join(parts) + " (vllm-batch hosts)"


def _print_watchdog(target: str, watchdog: Watchdog) -> None:
    if watchdog.failure:
        out.print(f"watchdog  {target}  ", end="")
        out.print(watchdog.failure, style="red")
        return
    for worker in watchdog.workers:
        print_worker(worker)
    out.print(f"recovery  {event_line(watchdog.restarts[0]) if watchdog.restarts else 'none yet'}")
