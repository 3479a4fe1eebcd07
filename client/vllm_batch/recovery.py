"""`vllm-batch recovery`: what the watchdog sees and did, and what a person orders it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click
import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.json_format import MessageToDict

from vllm_batch.channel import open_channel
from vllm_batch.client import CallError
from vllm_batch.terminal import errors, out
from vllm_batch.v1 import recovery_service_pb2 as pb
from vllm_batch.v1 import recovery_service_pb2_grpc

TIMEOUT_S = 10

watchdog_option = click.option(
    "--watchdog-target",
    envvar="BATCH_WATCHDOG_TARGET",
    default="127.0.0.1:50053",
    show_default=True,
    help="Watchdog, host:port.",
)
worker_option = click.option("--worker", default="", help="Only this worker. Default: all.")


@contextmanager
def _watchdog(target: str) -> Iterator[Any]:
    """The watchdog's stub; errors of its calls are CallError."""
    with open_channel(target) as channel:
        try:
            yield recovery_service_pb2_grpc.RecoveryServiceStub(channel)
        except grpc.RpcError as error:
            raise CallError(error) from error


@click.group("recovery")
@watchdog_option
@click.pass_context
def group(context: click.Context, watchdog_target: str) -> None:
    """What the watchdog sees, did and may do."""
    context.obj = watchdog_target


@group.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
@click.pass_obj
def status(target: str, as_json: bool) -> None:
    """Verdict, evidence, budget, intent and pause of each worker."""
    with errors(), _watchdog(target) as stub:
        workers = stub.GetStatus(pb.GetStatusRequest(), timeout=TIMEOUT_S).workers
    for worker in workers:
        if as_json:
            click.echo(json.dumps(MessageToDict(worker, preserving_proto_field_name=True)))
            continue
        out.print(_worker_line(worker))
        out.print(f"          {_name(pb.Action, worker.action).lower()}: {worker.reason}", markup=False)
        if worker.HasField("intent"):
            out.print(f"          restart under way: {_event_line(worker.intent)}", markup=False)
        if worker.pause_reason:
            out.print(f"          paused until {_time(worker.pause_end_time)}: {worker.pause_reason}", markup=False)
        if worker.gave_up:
            out.print("          gave up: find the cause, then `vllm-batch recovery reset REASON`", style="red")


@group.command()
@worker_option
@click.option("--limit", type=click.IntRange(1, 1000), default=20, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line, with the evidence.")
@click.pass_obj
def events(target: str, worker: str, limit: int, as_json: bool) -> None:
    """The audit log, newest first."""
    with errors(), _watchdog(target) as stub:
        request = pb.ListEventsRequest(page_size=limit, worker_id=worker)
        found = stub.ListEvents(request, timeout=TIMEOUT_S).events
    for event in found:
        if as_json:
            click.echo(json.dumps(MessageToDict(event, preserving_proto_field_name=True)))
        else:
            out.print(f"{event.id:>6}  {_event_line(event)}", markup=False)


@group.command()
@click.argument("reason")
@click.option("--minutes", type=click.FloatRange(0, 1440, min_open=True), default=60, show_default=True)
@worker_option
@click.pass_obj
def pause(target: str, reason: str, minutes: float, worker: str) -> None:
    """Restart nothing for a while. It ends by itself, or with `resume`."""
    duration = Duration()
    duration.FromMilliseconds(round(minutes * 60_000))
    with errors(), _watchdog(target) as stub:
        request = pb.PauseRecoveryRequest(duration=duration, reason=reason, worker_id=worker)
        paused = stub.PauseRecovery(request, timeout=TIMEOUT_S)
    click.echo(f"paused until {_time(paused.end_time)}")


@group.command()
@worker_option
@click.pass_obj
def resume(target: str, worker: str) -> None:
    """End a pause."""
    with errors(), _watchdog(target) as stub:
        stub.ResumeRecovery(pb.ResumeRecoveryRequest(worker_id=worker), timeout=TIMEOUT_S)


@group.command()
@click.argument("reason")
@worker_option
@click.pass_obj
def reset(target: str, reason: str, worker: str) -> None:
    """Give back a spent budget of restarts, once the cause has been found."""
    with errors(), _watchdog(target) as stub:
        stub.ResetBudget(pb.ResetBudgetRequest(reason=reason, worker_id=worker), timeout=TIMEOUT_S)


def print_overview(target: str) -> None:
    """A line for each worker and one for the last restart; or why there is none."""
    try:
        with _watchdog(target) as stub:
            for worker in stub.GetStatus(pb.GetStatusRequest(), timeout=TIMEOUT_S).workers:
                out.print(_worker_line(worker))
            found = stub.ListEvents(pb.ListEventsRequest(page_size=20), timeout=TIMEOUT_S).events
    except CallError as error:
        out.print(f"watchdog  {target}  [red]{error.message}[/red]")
        return
    restart = next((event for event in found if event.kind == "restart"), None)
    out.print(f"recovery  {_event_line(restart) if restart is not None else 'none yet'}", markup=False)


def _worker_line(worker: pb.WorkerStatus) -> str:
    verdict = _name(pb.Verdict, worker.verdict)
    colour = "green" if worker.verdict == pb.VERDICT_HEALTHY else "yellow"
    beat = f"{_seconds(worker.heartbeat_age):.1f} s ago" if worker.HasField("heartbeat_age") else "none"
    return (
        f"worker    {worker.worker_id}  [{colour}]{verdict}[/{colour}]  {worker.process_state or 'supervisord away'}"
        f" pid {worker.pid}  health {worker.health or '-'}  heartbeat {beat}  phase {worker.phase or '-'}"
        f"  budget {worker.budget_left}/{worker.budget_limit}"
    )


def _event_line(event: pb.RecoveryEvent) -> str:
    took = ", ".join(f"{timing.phase} {_seconds(timing.duration):.1f} s" for timing in event.timings)
    what = f"{event.kind} {_name(pb.Verdict, event.verdict)}".rstrip()
    end = f" → {event.outcome}" if event.outcome else ""
    return f"{_time(event.start_time)}  {what}{end}  ({event.reason})  {took}".rstrip()


def _name(enum: Any, value: int) -> str:
    """A value of an enum without its prefix; empty for the unspecified one."""
    return str(enum.Name(value)).partition("_")[2] if value else ""


def _seconds(duration: Duration) -> float:
    return duration.ToMilliseconds() / 1000


def _time(timestamp: Any) -> str:
    return f"{timestamp.ToDatetime():%Y-%m-%d %H:%M:%S} UTC"
