"""The watchdog process: `python -m watchdog`; `HELP` below is what users read."""

import asyncio
import contextlib
import os
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

from service import config, machine, processes, programs
from service.clock import SystemClock
from service.config import Settings
from service.db import schema, sessions
from service.db.availability import DATABASE_ERRORS, AvailabilityLog, DatabaseUnfitError, first_line
from service.db.connection import Database, migrate
from service.rpc import access
from service.rpc import server as rpc_server
from service.rpc.services import RECOVERY_SERVICE
from service.telemetry import logs, metrics
from vllm_batch.v1 import recovery_service_pb2_grpc
from watchdog import dry_run
from watchdog.act import gpu
from watchdog.alerts import Alerts
from watchdog.host import Host
from watchdog.metrics import WatchdogCollector
from watchdog.neighbours import Neighbours
from watchdog.observe.stall_detector import StallDetector
from watchdog.orders import INTERVAL_S as ORDERS_INTERVAL_S
from watchdog.orders import Orders
from watchdog.self_report import Report
from watchdog.servicer import RecoveryServicer
from watchdog.supervisor import Supervisor, SupervisorAwayError
from watchdog.wiring import GROUP, SERVER_GROUPS, GuardFactory, limits_of, processes_of

SUPERVISOR_TIMEOUT_S = 5.0
DISCOVER_INTERVAL_S = 5.0
SCHEMA_RETRY_S = 1.0
# Other hosts are looked at once in so many heartbeats.
LOOK_BEATS = 3
# To Postgres, at most.
CONNECTIONS = 2
# How long open calls, and then each thread, may take to finish at shutdown.
GRACE_S = 0.5
END_TIMEOUT_S = 0.5
# How long it may take to tell the others that this watchdog was stopped.
SAY_TIMEOUT_S = 2.0

HELP = """\
Settings are read from the environment and from .env; conf/example.env lists them all. The main ones:
  BATCH_MAX_RESTARTS_PER_HOUR  restart budget of each worker, gateway and http (10)
  BATCH_HEARTBEAT_TIMEOUT_S    age from which a heartbeat counts as lost (60)
  BATCH_CHECK_INTERVAL_S       longest time between two checks (30); changes trigger one at once
  BATCH_WATCHDOG_PORT          port of the RecoveryService API (50053)
  SENTRY_DSN                   where alerts go; none are sent by default

supervisord starts the watchdog (scripts/start-all.sh). The log is JSON lines on stderr.
Exit status: 0 stopped as asked, or --check found no problem; 1 the port cannot be opened, this version is too old
for the database, or --check could not use Postgres or supervisord; 2 invalid settings.
"""

log = logs.get("watchdog")


def check(settings: Settings) -> list[str]:
    """Returns what would keep the watchdog from working, one line each."""
    wrong = []
    try:
        groups = [group for group in (GROUP, *SERVER_GROUPS) if group in settings.runs]
        supervisor = Supervisor(settings.supervisor_url, SUPERVISOR_TIMEOUT_S)
        for group in (group for group in groups if not supervisor.processes(group)):
            wrong.append(f"supervisord at {settings.supervisor_url} has no process in group {group!r}")
    except SupervisorAwayError as error:
        wrong.append(f"supervisord at {settings.supervisor_url} is not available: {error}")
    database = Database(
        settings.postgres_url, "watchdog-check", settings.database_timeout_s, 1, settings.synchronous_commit
    )
    try:
        database.call(sessions.check)
        database.call(schema.check_version)
    except DatabaseUnfitError as error:
        wrong.append(f"Postgres cannot be used: {error}")
    except DATABASE_ERRORS as error:
        wrong.append(f"Postgres does not answer: {first_line(error)}")
    finally:
        database.close()
    return wrong


async def guard(settings: Settings, stalls: StallDetector) -> int:
    """Guards every worker and server of clients in a thread of its own and serves RecoveryService until told to stop.

    Returns the exit status.
    """
    loop, stop = asyncio.get_running_loop(), processes.told_to_end()
    database = Database(settings.postgres_url, "watchdog", settings.database_timeout_s, CONNECTIONS)
    # One, so that clients' reads never hold up the guards.
    reading = database.apart(1)
    supervisor = Supervisor(settings.supervisor_url, SUPERVISOR_TIMEOUT_S)
    if why := _too_old(database):
        # Before any guard acts: what it cannot read it would take for failures.
        log.error("start_failed", cause=why)
        return 1
    alerts, changed, too_old = Alerts(settings), asyncio.Event(), asyncio.Event()
    # What others read in Postgres is not as it is any more.
    news = threading.Event()

    def on_change() -> None:
        loop.call_soon_threadsafe(changed.set)
        news.set()

    def on_too_old() -> None:
        loop.call_soon_threadsafe(too_old.set)

    factory = GuardFactory(
        settings, limits_of(settings), supervisor, database, SystemClock(), stalls, on_change, alerts
    )

    def guarding(*groups: str) -> Host:
        run = [group for group in groups if group in settings.runs]
        return Host(supervisor, factory.make, lambda supervisor: processes_of(supervisor, run))

    workers, servers = guarding(GROUP), guarding(*SERVER_GROUPS)
    place = machine.settle(settings.home)
    report = Report(
        supervisor,
        workers,
        servers,
        settings.max_restarts_per_hour,
        gpu.devices,
        place.network,
        settings.advertised_host,
    )
    neighbours = Neighbours(
        database,
        machine.host_name(),
        place.machine,
        report,
        settings.heartbeat_timeout_s,
        settings.host_forgotten_s,
        LOOK_BEATS * settings.heartbeat_interval_s,
        SystemClock(),
        alerts,
        on_too_old,
    )
    servicer = RecoveryServicer(workers, servers, reading, settings.max_restarts_per_hour)
    orders = Orders(database, workers, servers)
    try:
        server = await rpc_server.serve(
            settings,
            settings.watchdog_port,
            lambda grpc_server: recovery_service_pb2_grpc.add_RecoveryServiceServicer_to_server(servicer, grpc_server),
            (RECOVERY_SERVICE,),
            access.of(settings, SystemClock()),
        )
    except RuntimeError as error:
        log.error("port_not_free", port=settings.watchdog_port, cause=str(error))
        return 1
    log.info("watchdog_started", address=server.address)

    def keep_home() -> None:
        # On a full disk it is tried again.
        with contextlib.suppress(OSError):
            # Without it supervisord starts nothing, and stops reading what a program writes once a log is full: then
            # that program stands still.
            settings.log_dir.mkdir(0o700, exist_ok=True)
            machine.keep(settings.home, place.machine)

    collector = WatchdogCollector((workers, servers), settings.home, neighbours)
    metrics.serve(settings.metrics_host, settings.watchdog_metrics_port, collector)
    ending = threading.Event()
    threads = [
        threading.Thread(target=_bring_schema, args=(database, ending), name="schema", daemon=True),
        *(
            threading.Thread(target=_repeat, args=(*each, ending, alerts), name=each[0], daemon=True)
            for each in (
                ("discover", workers.discover, DISCOVER_INTERVAL_S, None),
                ("discover-servers", servers.discover, DISCOVER_INTERVAL_S, None),
                ("heartbeat", neighbours.beat, settings.heartbeat_interval_s, news),
                ("neighbours", neighbours.look, neighbours.interval_s, None),
                ("orders", orders.take, ORDERS_INTERVAL_S, None),
                ("home", keep_home, settings.heartbeat_interval_s, None),
            )
        ),
    ]
    for thread in threads:
        thread.start()
    telling = asyncio.create_task(_tell_health(server, (workers, servers), changed))
    await _first(telling, asyncio.create_task(stop.wait()), asyncio.create_task(too_old.wait()))
    telling.cancel()
    await server.end(GRACE_S)
    ending.set()
    news.set()
    for thread in threads:
        thread.join(END_TIMEOUT_S)
    for host in (workers, servers):
        host.stop()
    # Postgres may be away, and nobody waits for that.
    saying = threading.Thread(target=neighbours.end, name="end", daemon=True)
    saying.start()
    saying.join(SAY_TIMEOUT_S)
    alerts.close()
    log.info("watchdog_ended")
    return 1 if too_old.is_set() else 0


async def look_on(settings: Settings, stalls: StallDetector) -> int:
    """Logs what the watchdog would decide until told to stop. Returns the exit status."""
    stop = processes.told_to_end()
    database = Database(settings.postgres_url, "watchdog-dry-run", settings.database_timeout_s, CONNECTIONS)
    supervisor = Supervisor(settings.supervisor_url, SUPERVISOR_TIMEOUT_S)
    watching = asyncio.to_thread(
        dry_run.watch, settings, limits_of(settings), supervisor, database, SystemClock(), stalls
    )
    await _first(asyncio.create_task(watching), asyncio.create_task(stop.wait()))
    return 0


async def _first(*tasks: asyncio.Task[Any]) -> None:
    """Waits for the first task to finish and raises its exception, if any."""
    done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in done:
        task.result()


def _too_old(database: Database) -> str:
    """Returns why this version must not work with the schema; empty if it may, and while Postgres is away."""
    try:
        database.call(schema.check_version)
    except schema.TooOldError as error:
        return str(error)
    except DATABASE_ERRORS:
        pass
    return ""


async def _tell_health(server: rpc_server.Server, hosts: tuple[Host, ...], changed: asyncio.Event) -> None:
    """Keeps the health status current: NOT_SERVING once a guard has given up."""
    while True:
        changed.clear()
        for name in ("", RECOVERY_SERVICE):
            await server.set_health(name, not any(host.has_given_up() for host in hosts))
        await changed.wait()


def _bring_schema(database: Database, ending: threading.Event) -> None:
    """Migrates the schema as soon as Postgres answers; until then the guards treat Postgres as away."""
    availability = AvailabilityLog(log)
    while not ending.is_set():
        try:
            database.call(migrate)
        except DATABASE_ERRORS as error:
            availability.away(error)
        except Exception:
            log.exception("schema_failed")
        else:
            availability.back()
            return
        ending.wait(SCHEMA_RETRY_S)


def _repeat(
    name: str,
    task: Callable[[], None],
    interval_s: float,
    woken: threading.Event | None,
    ending: threading.Event,
    alerts: Alerts,
) -> None:
    """Runs a task periodically, and whenever `woken` is set.

    A failure is logged and, if it is the first in a row, alerted.
    """
    has_failed = False
    while not ending.is_set():
        try:
            task()
            has_failed = False
        except Exception as error:
            log.exception("task_failed", task=name)
            if not has_failed:
                alerts.fault(name, error)
            has_failed = True
        (woken or ending).wait(interval_s)
        if woken is not None:
            woken.clear()


def main(arguments: Sequence[str]) -> int:
    """Runs the command line. Returns the exit status."""
    description = (
        "Watches this host's workers, gateway and http, restarts what fails and serves the RecoveryService API."
    )
    parser = programs.parser("watchdog", description, HELP)
    parser.add_argument("--check", action="store_true", help="check settings, Postgres and supervisord, and exit")
    parser.add_argument(
        "--dry-run", action="store_true", help="log decisions without acting; safe beside a running watchdog"
    )
    options = parser.parse_args(arguments)
    settings = config.load(is_check=options.check)
    if options.check:
        wrong = check(settings)
        sys.stderr.write("".join(f"{line}\n" for line in wrong))
        return 1 if wrong else 0
    if not options.dry_run:
        processes.die_with_parent()
    logs.configure("watchdog", settings.log_level)
    stalls = StallDetector(SystemClock())
    stalls.start()
    # Not closed: that would wait for the threads that are still running.
    runner = asyncio.Runner()
    try:
        status = runner.run((look_on if options.dry_run else guard)(settings, stalls))
    except Exception as error:
        log.exception("program_failed", cause=repr(error))
        status = 1
    sys.stderr.flush()
    # Exit even if a probe or a statement is still waiting for its deadline.
    os._exit(status)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
