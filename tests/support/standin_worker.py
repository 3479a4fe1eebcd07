"""A worker for the watchdog's tests: beats and serves health like the real one, and fails as files tell it to.

It polls for files in `BATCH_HOME/faults`: `crash` makes it exit with status 3 at its start, `loading` keeps it loading,
`no_heartbeat` stops its heartbeat, `no_rpc` closes its port, `orphans` makes it start children that outlive it,
`shared_memory` makes it map files in /dev/shm. Each incarnation adds a line to `BATCH_HOME/lives`: its id, its pid, and
the earlier incarnations' children that it found alive.
"""

import json
import mmap
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from uuid import uuid4

import grpc
import peewee
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from service import config, machine
from service.db import heartbeats
from service.db.availability import DatabaseAwayError
from service.db.connection import Database
from service.db.heartbeats import Beat

SETTINGS = config.load()
FAULTS = SETTINGS.home / "faults"
LIVES = SETTINGS.home / "lives"
CHILDREN = SETTINGS.home / "children"

incarnation = uuid4()
address = f"127.0.0.1:{SETTINGS.worker_port}"


def has(fault: str) -> bool:
    return (FAULTS / fault).exists()


def beat(phase: str) -> Beat:
    return Beat(SETTINGS.worker_id, incarnation, address, phase, os.getpid(), place=machine.settle(SETTINGS.home))


def write(db: peewee.PostgresqlDatabase, phase: str) -> None:
    """Beats, in the place of whatever life was before."""
    if not heartbeats.write(db, beat(phase)):
        [before] = heartbeats.read(db, SETTINGS.worker_id)
        assert heartbeats.begin(db, beat(phase), 60, before)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def open_port(servicer: health.HealthServicer) -> grpc.Server:
    options = (("grpc.so_reuseport", 0), ("grpc.http2.min_ping_interval_without_data_ms", 4000))
    server = grpc.server(ThreadPoolExecutor(4), options=options)
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    server.add_insecure_port(address)
    server.start()
    return server


def leave_orphans() -> None:
    """Starts the three kinds of orphans that vLLM leaves: in the group, there without environment, and outside it."""
    command = ["sleep", "1000"]
    children = [
        subprocess.Popen(command),
        subprocess.Popen(command, env={}),
        subprocess.Popen(command, start_new_session=True),
    ]
    with CHILDREN.open("a") as file:
        file.write("".join(f"{child.pid}\n" for child in children))


def map_shared_memory() -> list[mmap.mmap]:
    """Maps two files for writing and one for reading, and never removes them. Lists them in `BATCH_HOME/mapped`."""
    kinds = {"a": mmap.ACCESS_WRITE, "b": mmap.ACCESS_WRITE, "c": mmap.ACCESS_READ}
    maps = []
    paths = [Path(f"/dev/shm/vbw-{incarnation}-{kind}") for kind in kinds]
    for path, access in zip(paths, kinds.values(), strict=True):
        path.write_bytes(b"x" * 4096)
        path.chmod(0o600)
        with path.open("r+b") as file:
            maps.append(mmap.mmap(file.fileno(), 0, access=access))
    (SETTINGS.home / "mapped").write_text("".join(f"{path}\n" for path in paths))
    return maps


def main() -> None:
    before = [int(pid) for pid in CHILDREN.read_text().split()] if CHILDREN.exists() else []
    state = {"incarnation": str(incarnation), "pid": os.getpid(), "orphans": [pid for pid in before if is_alive(pid)]}
    with LIVES.open("a") as lives:
        lives.write(json.dumps(state) + "\n")
    if has("crash"):
        raise SystemExit(3)
    if has("orphans"):
        leave_orphans()
    maps = map_shared_memory() if has("shared_memory") else []
    # Exit immediately: after a SIGSTOP, threads of gRPC and Postgres may be in any state.
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda *_: os._exit(0))

    database = Database(SETTINGS.postgres_url, "standin", timeout_s=2, connections=1)
    servicer = health.HealthServicer()
    servicer.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
    server: grpc.Server | None = None
    is_serving, due_s, last = False, 0.0, ""
    while True:
        if has("no_rpc") and server is not None:
            server.stop(None)
            server = None
        elif not has("no_rpc") and server is None:
            server = open_port(servicer)
        phase = "loading" if has("loading") else "ready"
        if (time.monotonic() > due_s or phase != last) and not has("no_heartbeat"):
            try:
                database.call(write, phase)
            except DatabaseAwayError as error:
                sys.stderr.write(f"no heartbeat: {error}\n")
            due_s, last = time.monotonic() + SETTINGS.heartbeat_interval_s, phase
        if phase == "ready" and not is_serving:
            servicer.set("", health_pb2.HealthCheckResponse.SERVING)
            is_serving = True
        time.sleep(0.02)
        assert not any(each.closed for each in maps)


if __name__ == "__main__":
    main()
