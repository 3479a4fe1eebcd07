"""`vllm-batch recovery`: what the watchdog sees and did, and orders to it."""

from __future__ import annotations

from typing import Any

import click
from google.protobuf.duration_pb2 import Duration

from vllm_batch.cli.options import Number, json_option, watchdog_option
from vllm_batch.cli.terminal import calls, errors, out, print_json
from vllm_batch.output import json_line
from vllm_batch.v1 import recovery_service_pb2 as pb
from vllm_batch.v1.recovery_service_pb2_grpc import RecoveryServiceStub

TIMEOUT_S = 10

worker_option = click.option("--worker", default="", help="Only this worker. Default: all.")


@click.group()
@watchdog_option
@click.pass_context
def recovery(context: click.Context, watchdog_target: str) -> None:
    """Show what the watchdog sees and did; pause, resume or reset recovery."""
    context.obj = watchdog_target


@recovery.command()
@json_option
@click.pass_obj
def status(target: str, as_json: bool) -> None:
    """Show each worker's verdict, evidence, budget, intent and pause.

    \b
    Example:
      vllm-batch recovery status --json | jq .verdict
    """
    with errors(), calls(target, RecoveryServiceStub) as stub:
        answer = stub.GetStatus(pb.GetStatusRequest(), timeout=TIMEOUT_S)
    for worker in (*answer.workers, *answer.gateways):
        if as_json:
            print_json(worker)
            continue
        print_worker(worker)
        out.print(f"          {_name(pb.Action, worker.action).lower()}: {worker.reason}")
        if worker.HasField("intent"):
            out.print(f"          restart under way: {event_line(worker.intent)}")
        if worker.pause_reason:
            out.print(f"          paused until {_time(worker.pause_end_time)}: {worker.pause_reason}")
        if worker.gave_up:
            out.print("          gave up: find the cause, then `vllm-batch recovery reset REASON`", style="red")


@recovery.command()
@worker_option
@click.option("--limit", type=click.IntRange(1, 1000), default=20, show_default=True, help="Show at most this many.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, one object per line, with the evidence.")
@click.pass_obj
def events(target: str, worker: str, limit: int, as_json: bool) -> None:
    """Show the audit log, newest first.

    \b
    Example:
      vllm-batch recovery events --limit 5
    """
    with errors(), calls(target, RecoveryServiceStub) as stub:
        request = pb.ListEventsRequest(page_size=limit, worker_id=worker)
        found = stub.ListEvents(request, timeout=TIMEOUT_S).events
    for event in found:
        if as_json:
            print_json(event)
        else:
            out.print(f"{event.id:>6}  {event_line(event)}")


@recovery.command()
@click.argument("reason")
@click.option(
    "--minutes",
    type=Number(0, 1440, min_open=True),
    default=60,
    show_default=True,
    help="Length of the pause in minutes.",
)
@worker_option
@json_option
@click.pass_obj
def pause(target: str, reason: str, minutes: float, worker: str, as_json: bool) -> None:
    """Pause restarts for --minutes. `resume` ends the pause early.

    \b
    Example:
      vllm-batch recovery pause "driver upgrade" --minutes 30
    """
    duration = Duration()
    duration.FromMilliseconds(round(minutes * 60_000))
    with errors(), calls(target, RecoveryServiceStub) as stub:
        request = pb.PauseRecoveryRequest(duration=duration, reason=reason, worker_id=worker)
        paused = stub.PauseRecovery(request, timeout=TIMEOUT_S)
    click.echo(json_line(paused) if as_json else f"paused until {_time(paused.end_time)}")


@recovery.command()
@worker_option
@click.pass_obj
def resume(target: str, worker: str) -> None:
    """End a pause.

    \b
    Example:
      vllm-batch recovery resume
    """
    with errors(), calls(target, RecoveryServiceStub) as stub:
        stub.ResumeRecovery(pb.ResumeRecoveryRequest(worker_id=worker), timeout=TIMEOUT_S)


@recovery.command()
@click.argument("reason")
@worker_option
@click.pass_obj
def reset(target: str, reason: str, worker: str) -> None:
    """Restore a spent restart budget once the cause has been found.

    \b
    Example:
      vllm-batch recovery reset "replaced the GPU"
    """
    with errors(), calls(target, RecoveryServiceStub) as stub:
        stub.ResetBudget(pb.ResetBudgetRequest(reason=reason, worker_id=worker), timeout=TIMEOUT_S)


def print_worker(worker: pb.WorkerStatus) -> None:
    """Prints verdict, both signals and budget on one line, then why the engine failed, if it did."""
    verdict = _name(pb.Verdict, worker.verdict)
    colour = "green" if worker.verdict == pb.VERDICT_HEALTHY else "yellow"
    beat = f"{_seconds(worker.heartbeat_age):.1f} s ago" if worker.HasField("heartbeat_age") else "none"
    out.print(f"worker    {worker.worker_id}  ", end="")
    out.print(verdict, style=colour, end="")
    out.print(
        f"  {worker.process_state or 'supervisord away'}"
        f" pid {worker.pid}  health {worker.health or '-'}  heartbeat {beat}  phase {worker.phase or '-'}"
        f"  budget {worker.budget_left}/{worker.budget_limit}"
    )
    for name, text in (("cause", worker.cause), ("advice", worker.advice)):
        if text:
            out.print(f"{name:<10}{text}", style="yellow")


def event_line(event: pb.RecoveryEvent) -> str:
    """An event in one line: when, of which worker, host or model, what, outcome, why, how long each phase took."""
    took = ", ".join(f"{timing.phase} {_seconds(timing.duration):.1f} s" for timing in event.timings)
    what = f"{event.kind} {_name(pb.Verdict, event.verdict)}".rstrip()
    end = f" → {event.outcome}" if event.outcome else ""
    return f"{_time(event.start_time)}  {event.worker_id}  {what}{end}  ({event.reason})  {took}".rstrip()


def _name(enum: Any, value: int) -> str:
    """An enum value without its prefix; empty for the unspecified one."""
    return str(enum.Name(value)).partition("_")[2] if value else ""


def _seconds(duration: Duration) -> float:
    return duration.ToMilliseconds() / 1000


def _time(timestamp: Any) -> str:
    return f"{timestamp.ToDatetime():%Y-%m-%d %H:%M:%S} UTC"
