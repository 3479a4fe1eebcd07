"""Hosts as messages of the API, with what is wrong with them in words. Pure."""

from collections.abc import Mapping, Sequence
from typing import Any

from service import announce
from service.db import heartbeats
from service.db.hosts import Host, Program, State
from service.db.losses import silence_s
from service.rpc.times import duration
from vllm_batch.v1 import host_service_pb2 as pb

# A reason may contain a whole traceback's last line.
MAX_REASON = 500
NOTHING: Mapping[str, str] = {}

STATES = {
    State.ALIVE: pb.HOST_STATE_ALIVE,
    State.STOPPED: pb.HOST_STATE_STOPPED,
    State.LOST: pb.HOST_STATE_LOST,
}


def host_message(
    host: Host, timeout_s: float, newest: int, network: str = "", unreached: Mapping[str, str] = NOTHING
) -> pb.Host:
    """Converts a host.

    `newest`: the schema version of this server; `network`: that in which it runs; `unreached`: why workers cannot be
    called from there, by their address.
    """
    detail = _watchdog_detail(host)
    guards = {str(guard["worker_id"]): guard for guard in detail.get("guards", ())}
    message = pb.Host(
        name=host.name,
        state=STATES[host.state(timeout_s)],
        age=duration(max(0.0, min(each.age_s for each in host.programs))),
        programs=_programs(host, detail, timeout_s),
        workers=[_worker(each, guards.get(each.id, {})) for each in host.programs if each.program == "worker"],
        gpus=[pb.Gpu(name=str(gpu["name"]), memory_bytes=int(gpu["memory_bytes"])) for gpu in detail.get("gpus", ())],
        drain=_drain(host, timeout_s),
    )
    notes = _notes(host, timeout_s, newest) + _notes_of_place(host, timeout_s, network)
    message.notes.extend(
        [*notes, *_notes_of_links(host, timeout_s, unreached), *_notes_of_workers(message), *_notes_of_drain(message)]
    )
    return message


def _watchdog_detail(host: Host) -> Mapping[str, Any]:
    return next((each.detail for each in host.programs if each.program == "watchdog"), {})


def _programs(host: Host, detail: Mapping[str, Any], timeout_s: float) -> list[pb.HostProgram]:
    """Those that supervisord runs, as the watchdog saw it, and those that report themselves."""
    found = {}
    for full_name, state in detail.get("programs", ()):
        # Of several processes supervisord's name is group:process; programs report themselves by their process alone.
        name = str(full_name).rpartition(":")[2]
        found[name] = pb.HostProgram(name=name, state=str(state))
    alive = {each.id for each in host.alive(timeout_s)}
    for each in host.programs:
        name = each.id.rpartition(":")[2]
        message = found.setdefault(name, pb.HostProgram(name=name))
        message.is_alive = each.id in alive
        message.address, message.version, message.schema_version = each.address, each.version, each.schema_version
        message.age.CopyFrom(duration(max(0.0, each.age_s)))
    return [found[name] for name in sorted(found)]


def _worker(program: Program, guard: Mapping[str, Any]) -> pb.HostWorker:
    return pb.HostWorker(
        worker_id=program.id,
        phase=program.phase,
        models=program.models,
        requests_held=program.queued,
        verdict=str(guard.get("verdict", "")).removeprefix("VERDICT_"),
        reason=str(guard.get("reason", ""))[:MAX_REASON],
        budget_left=int(guard.get("budget_left", 0)),
        budget_limit=int(guard.get("budget_limit", 0)),
        gave_up=bool(guard.get("gave_up", False)),
        cause=heartbeats.failure_in(program.detail)["cause"],
    )


def _drain(host: Host, timeout_s: float) -> pb.Drain | None:
    if host.drain_age_s is None:
        return None
    return pb.Drain(
        reason=host.drain_reason,
        age=duration(host.drain_age_s),
        is_complete=host.is_drained(timeout_s),
        held=host.held,
    )


def _notes(host: Host, timeout_s: float, newest: int) -> list[str]:
    alive, notes = host.alive(timeout_s), []
    state, age_s = host.state(timeout_s), min(each.age_s for each in host.programs)
    if state is State.LOST:
        notes.append(f"lost: last seen {age_s:.0f} s ago, and nothing said that it was stopped")
    watchdogs = [each for each in host.programs if each.program == "watchdog"]
    if state is State.ALIVE and any(each not in alive and not each.is_ended for each in watchdogs):
        notes.append(f"its watchdog is gone (last seen {watchdogs[0].age_s:.0f} s ago): nothing restarts its programs")
    workers = [each for each in alive if each.program == "worker"]
    if workers and (not watchdogs or watchdogs[0].is_ended):
        notes.append("no watchdog guards its workers")
    if host.drain_age_s is not None and (deaf := _deaf(workers)):
        notes.append(f"{', '.join(deaf)} is of a version that follows no order to drain: stop it with supervisorctl")
    return notes + _versions(alive, newest)


def _notes_of_place(host: Host, timeout_s: float, network: str) -> list[str]:
    """A line for programs of several machines, and one for workers at an address that only their own host knows."""
    alive, notes = host.alive(timeout_s), []
    machines = {each.machine: each for each in alive if each.machine}
    if len(machines) > 1:
        where = " and ".join(_where(each) for each in machines.values())
        notes.append(f"{len(machines)} machines have this name ({where}): give each host a name of its own (hostname)")
    for each in alive:
        if not announce.is_reachable(each.address, each.network, network):
            notes.append(
                f"its {_name(each)} announces {each.address}, which only that host reaches: correct BATCH_HOST"
            )
    return notes


def _notes_of_links(host: Host, timeout_s: float, unreached: Mapping[str, str]) -> list[str]:
    """A line for each worker that beats, and to which this server has no link."""
    return [
        f"its {_name(each)} reaches Postgres, but cannot be called from here, at {each.address}:"
        f" {unreached[each.address][:MAX_REASON]}"
        for each in host.alive(timeout_s)
        if each.program == "worker" and each.address in unreached and each.age_s < silence_s(each.detail)
    ]


def _name(program: Program) -> str:
    return program.id.rpartition(":")[2]


def _where(program: Program) -> str:
    address = program.address or program.detail.get("address", "")
    return f"{_name(program)} at {address}" if address else _name(program)


def _deaf(workers: Sequence[Program]) -> list[str]:
    """Workers of a version that does not know of orders: it does not report its version either."""
    return [each.id for each in workers if not each.schema_version]


def _versions(alive: Sequence[Program], newest: int) -> list[str]:
    """A line for programs that are older than this server, and one for those that are newer."""
    notes = []
    for word, those in (
        ("older", [each for each in alive if each.schema_version < newest]),
        ("newer", [each for each in alive if each.schema_version > newest]),
    ):
        if those:
            names = ", ".join(f"{each.id.rpartition(':')[2]} {each.version or '(unknown)'}" for each in those)
            notes.append(f"of a version {word} than this server: {names}")
    return notes


def _notes_of_workers(message: pb.Host) -> list[str]:
    notes = []
    for worker in message.workers:
        name = worker.worker_id.rpartition(":")[2]
        if worker.gave_up:
            notes.append(f"recovery gave up on its {name}: {worker.reason}")
        if worker.cause:
            notes.append(f"its {name} failed: {worker.cause}")
    return notes


def _notes_of_drain(message: pb.Host) -> list[str]:
    if not message.HasField("drain"):
        return []
    reason = f" ({message.drain.reason})" if message.drain.reason else ""
    if message.drain.is_complete:
        return [f"drained{reason}"]
    requests = sum(worker.requests_held for worker in message.workers)
    return [f"draining: {message.name} holds {requests} requests in {message.drain.held} chunks{reason}"]
