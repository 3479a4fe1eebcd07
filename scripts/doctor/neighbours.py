"""Checks name and address of this host against the other hosts that use the same Postgres."""

import socket
from collections.abc import Sequence

from scripts.doctor.database import TIMEOUT_S
from scripts.prerequisites import Finding
from service import announce, machine, processes
from service.config import Settings
from service.db import heartbeats, identity, watchdogs
from service.db.availability import DATABASE_ERRORS
from service.db.connection import Database
from service.db.heartbeats import SeenBeat
from service.db.watchdogs import SeenWatchdog
from service.machine import Place
from service.processes import Leader

OWN_NAME = "give each host a name of its own (hostname)"


def judge(
    settings: Settings, host_name: str, beats: Sequence[SeenBeat], place: Place, dogs: Sequence[SeenWatchdog] = ()
) -> list[Finding]:
    """Compares what this host would be called, and what it would announce, with workers and watchdogs that beat now."""
    findings = []
    for seen in beats:
        is_running = processes.is_running(Leader(seen.beat.pid, seen.beat.start_ticks))
        silence_s = identity.SILENT_BEATS * settings.heartbeat_interval_s
        taken = identity.taken_by(seen, place, is_running, silence_s)
        if taken and seen.beat.worker_id.startswith(f"{host_name}:"):
            problem = f"{taken}; this one is at {settings.advertised_address(settings.worker_port)}"
            findings.append(Finding("name", problem=problem, fix=OWN_NAME))
            break
    else:
        # One of the two may run no worker.
        for dog in dogs:
            is_namesake = dog.watchdog_id == host_name and dog.machine not in ("", place.machine)
            if is_namesake and dog.is_alive and announce.is_elsewhere(dog.network, place.network):
                problem = f"another machine runs as {host_name}, at {dog.address} (its watchdog reports)"
                findings.append(
                    Finding("name", problem=f"{problem}; this one is at {settings.advertised_host}", fix=OWN_NAME)
                )
    if why := announce.problem(settings.advertised_loopback, host_name, place, beats, dogs):
        findings.append(Finding("address", problem=why, fix=announce.ADVICE))
    for beat in (seen.beat for seen in beats if seen.lease_left_s > 0):
        if announce.is_reachable(beat.address, beat.place.network, place.network):
            continue
        problem = f"{beat.worker_id} on another host announces {beat.address}, which only that host reaches"
        findings.append(Finding("address", problem=problem, fix="correct BATCH_HOST there", is_blocking=False))
    return findings or [Finding("hosts", "name and address clash with no other host")]


def check(settings: Settings) -> list[Finding]:
    """Returns the findings; none without a Postgres that others may share, or while it cannot be read."""
    if settings.database_url is None:
        return []
    database = Database(settings.postgres_url, "doctor", TIMEOUT_S, connections=1)
    try:
        beats, dogs = database.call(heartbeats.read), database.call(watchdogs.read)
    except DATABASE_ERRORS:
        # Postgres is away, which has a finding of its own, or empty yet.
        return []
    finally:
        database.close()
    return judge(settings, socket.gethostname(), beats, machine.here(settings.home), dogs)
