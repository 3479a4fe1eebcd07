"""What a host that does not run everything waits for at its start: that its own programs work."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import grpc
import peewee
from grpc_health.v1 import health_pb2, health_pb2_grpc

from service.config import Settings
from service.db import heartbeats, recoveries
from service.db.availability import DATABASE_ERRORS, first_line
from service.db.chunks import host_of
from service.db.connection import Database
from vllm_batch.channel import open_channel

CALL_TIMEOUT_S = 5.0
INTERVAL_S = 0.5

USAGE = """
The programs of this host are running: {programs}. Those of all hosts, at any gateway:

  .venv/bin/vllm-batch --target GATEWAY hosts

Show the status of this one: scripts/status.sh. Stop it: scripts/stop-all.sh
"""


@dataclass(frozen=True)
class Missing:
    """What does not work yet. `gave_up`: the watchdog does not restart a worker any more."""

    text: str
    gave_up: bool = False


def missing(settings: Settings, states: Mapping[str, str], database: Database) -> Missing | None:
    """Returns the first thing that does not work yet; None once all does. `states` are those in supervisord."""
    for program in settings.programs.split(","):
        those = {name: state for name, state in states.items() if name.partition(":")[0] == program}
        for name, state in (those or {program: "unknown to supervisord"}).items():
            if state != "RUNNING":
                return Missing(f"{name} is {state}")
    if "gateway" in settings.runs and not _answers(settings.own_address(settings.gateway_port)):
        return Missing("the gateway does not answer yet")
    if "worker" not in settings.runs:
        return None
    host = host_of(settings.worker_id)
    ids = [f"{host}:{name.rpartition(':')[2]}" for name in states if name.partition(":")[0] == "worker"]
    try:
        return database.call(_workers, ids, settings.heartbeat_timeout_s)
    except DATABASE_ERRORS as error:
        return Missing(f"database unavailable: {first_line(error)}")


def _workers(db: peewee.PostgresqlDatabase, worker_ids: list[str], timeout_s: float) -> Missing | None:
    given_up = recoveries.given_up(db, worker_ids)
    for worker_id in worker_ids:
        found = heartbeats.read(db, worker_id)
        phase = found[0].beat.phase if found and found[0].age_s <= timeout_s else "not there yet"
        if phase != heartbeats.Phase.READY:
            return Missing(f"worker {worker_id} is {phase}", worker_id in given_up)
    return None


def is_serving(channel: grpc.Channel, service: str = "") -> bool | None:
    """Returns whether a server says that it serves this, None if it does not answer."""
    try:
        request = health_pb2.HealthCheckRequest(service=service)
        answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=CALL_TIMEOUT_S)
    except grpc.RpcError:
        return None
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def _answers(target: str) -> bool:
    with open_channel(target) as channel:
        return bool(is_serving(channel))


def wait(
    settings: Settings, states: Callable[[], Mapping[str, str]], is_over: Callable[[float, Missing, bool], bool]
) -> Missing | None:
    """Waits until the programs work. Returns what is missing when `is_over(time, missing, is_silent)` ends it."""
    database = Database(settings.postgres_url, "start", CALL_TIMEOUT_S, connections=1)
    said, begin_s = "", time.monotonic()
    try:
        while (found := missing(settings, states(), database)) is not None:
            now_s = time.monotonic()
            if is_over(now_s, found, found.text.startswith("the gateway")):
                return found
            if found.text != said:
                print(f"start: waiting for {now_s - begin_s:.0f} s: {found.text[:200]}", flush=True)
                said = found.text
            time.sleep(INTERVAL_S)
    finally:
        database.close()
    print(f"start: the programs of this host work after {time.monotonic() - begin_s:.0f} s", flush=True)
    print(USAGE.format(programs=settings.programs.replace(",", ", ")), flush=True)
    return None
