"""`vllm-batch hosts`: the hosts of a fleet, and orders about them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

import click
from rich.table import Table
from rich.text import Text

from vllm_batch.cli.options import Number, json_option
from vllm_batch.cli.terminal import EXIT_UNAVAILABLE, err, errors, out, print_json
from vllm_batch.client import Client
from vllm_batch.v1 import host_service_pb2 as pb

POLL_S = 1.0
COLOURS = {pb.HOST_STATE_ALIVE: "green", pb.HOST_STATE_STOPPED: "dim", pb.HOST_STATE_LOST: "red"}

name_argument = click.argument("name")


@click.group(invoke_without_command=True)
@json_option
@click.pass_context
def hosts(context: click.Context, as_json: bool) -> None:
    """Show all hosts; drain, resume or forget one. Needs the role operate.

    Shows programs, versions, models, GPUs, verdicts and restart budgets of every host, from any gateway.

    \b
    Example:
      vllm-batch hosts --json | jq '{name, state}'
    """
    if context.invoked_subcommand is not None:
        return
    client: Client = context.obj
    with errors():
        found = list(client.hosts())
    if as_json:
        for host in found:
            print_json(host)
        return
    out.print(table(found) if found else "hosts: none")
    for host in found:
        for note in host.notes:
            out.print(f"{host.name}: {note}", style="yellow")


@hosts.command()
@name_argument
@click.option("--reason", default="", help="Why, for the audit log.")
@click.option("--wait", "waits", is_flag=True, help="Return once its workers hold nothing.")
@click.option("--timeout", "timeout_s", type=Number(0, min_open=True), help="Seconds to --wait.  [default: no limit]")
@click.pass_obj
def drain(client: Client, name: str, reason: str, waits: bool, timeout_s: float | None) -> None:
    """Give a host no new work; its workers finish what is in their engines, and the rest runs elsewhere.

    Its programs go on running. The order holds, also across restarts, until `hosts resume`. Exits with 4 if --timeout
    passes first; the order holds all the same.

    \b
    Example:
      vllm-batch hosts drain gpu-3 --wait --reason "new driver"
    """
    with errors():
        client.drain_host(name, reason)
    if not waits:
        return
    with errors(interrupted=f"the order holds; `vllm-batch hosts resume {name}` takes it back"):
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        said = ""
        while True:
            [host] = list(client.hosts(name)) or [pb.Host()]
            if host.drain.is_complete or not host.name:
                return
            if not host.HasField("drain"):
                raise click.ClickException(f"somebody gave {name} work again")
            if (text := _left(host)) != said:
                err.print(text)
                said = text
            if deadline_s is not None and time.monotonic() > deadline_s:
                err.print(f"{name} is not drained after {timeout_s:.0f} s; the order holds", style="red")
                raise SystemExit(EXIT_UNAVAILABLE)
            time.sleep(POLL_S)


@hosts.command()
@name_argument
@click.pass_obj
def resume(client: Client, name: str) -> None:
    """Give a drained host work again.

    \b
    Example:
      vllm-batch hosts resume gpu-3
    """
    with errors():
        client.resume_host(name)


@hosts.command()
@name_argument
@click.pass_obj
def forget(client: Client, name: str) -> None:
    """Remove what is stored about a host that is gone for good. Refused while one of its programs is alive.

    \b
    Example:
      vllm-batch hosts forget gpu-3
    """
    with errors():
        client.forget_host(name)


def table(found: Iterable[pb.Host]) -> Table:
    """One row per host."""
    made = Table(box=None, pad_edge=False)
    for column in ("host", "state", "seen", "programs", "version", "workers", "models", "GPUs"):
        made.add_column(column)
    for host in found:
        models = sorted({model for worker in host.workers for model in worker.models})
        made.add_row(
            host.name,
            Text(_state(host), COLOURS.get(host.state, "yellow")),
            f"{host.age.ToMilliseconds() / 1000:.0f} s ago",
            ", ".join(program.name for program in host.programs),
            ", ".join(sorted({program.version for program in host.programs if program.version})),
            ", ".join(_worker(worker) for worker in host.workers),
            ", ".join(models),
            _gpus(host.gpus),
        )
    return made


def _state(host: pb.Host) -> str:
    name = pb.HostState.Name(host.state).removeprefix("HOST_STATE_").lower()
    if host.state == pb.HOST_STATE_ALIVE and host.HasField("drain"):
        return "drained" if host.drain.is_complete else "draining"
    return name


def _worker(worker: pb.HostWorker) -> str:
    name = worker.worker_id.rpartition(":")[2]
    budget = f" {worker.budget_left}/{worker.budget_limit}" if worker.budget_limit else ""
    return f"{name} {worker.phase} {worker.verdict}{budget}".replace("  ", " ")


def _gpus(gpus: Sequence[pb.Gpu]) -> str:
    names = [gpu.name for gpu in gpus]
    return ", ".join(f"{names.count(name)} × {name}" for name in dict.fromkeys(names))


def _left(host: pb.Host) -> str:
    requests = sum(worker.requests_held for worker in host.workers)
    return f"draining: {host.name} holds {requests} requests in {host.drain.held} chunks"
