"""The watchdog process: `python -m watchdog`.

`--check` says whether it could work, and ends. `--dry-run` logs what it would do, and does nothing: beside another
watchdog, to see what other settings would lead to, or on a host where nothing may be touched.

Exit status of `--check`: 0 all is well; 1 Postgres or supervisord does not answer; 2 the settings are wrong.
"""

import argparse
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress

from service import access, config, logs, metrics, processes
from service.clock import SystemClock
from service.config import Settings
from service.db import watchdogs
from service.db.connection import Database, Unreachable, migrate
from watchdog import dry_run
from watchdog.alerts import Alerts
from watchdog.awake import Awake
from watchdog.guards import GROUP, Guards, limits_of
from watchdog.metrics import WatchdogCollector
from watchdog.record import AWAY
from watchdog.service import RecoveryServicer, Server
from watchdog.supervisor import Supervisor, SupervisorAwayError

SUPERVISOR_TIMEOUT_S = 5.0
# How often supervisord is asked for workers, and Postgres until it has answered.
DISCOVER_INTERVAL_S = 5.0
SCHEMA_RETRY_S = 1.0
# More than one for each thread that may ask at once: calls, and a guard per worker.
CONNECTIONS = 16
END_TIMEOUT_S = 0.5

log = logs.get("watchdog")


def check(settings: Settings) -> list[str]:
    """What keeps the watchdog from working, one line each."""
    wrong = []
    try:
        if not Supervisor(settings.supervisor_url, SUPERVISOR_TIMEOUT_S).processes(GROUP):
            wrong.append(f"supervisord at {settings.supervisor_url} has no process in the group {GROUP!r}")
    except SupervisorAwayError as error:
        wrong.append(f"supervisord at {settings.supervisor_url} does not answer: {error}")
    database = Database(settings.postgres_url, "watchdog-check", settings.database_timeout_s, connections=1)
    try:
        database.call(lambda db: db.execute_sql("SELECT 1"))
    except Unreachable as error:
        wrong.append(f"Postgres does not answer: {str(error).strip()}")
    finally:
        database.close()
    return wrong


def guard(settings: Settings, awake: Awake, ending: threading.Event, changed: threading.Event) -> int:
    """Guards all workers until `ending` is set; `changed` wakes it. Returns the exit status."""
    database = Database(settings.postgres_url, "watchdog", settings.database_timeout_s, CONNECTIONS)
    supervisor = Supervisor(settings.supervisor_url, SUPERVISOR_TIMEOUT_S)
    alerts = Alerts(settings)
    guards = Guards(settings, limits_of(settings), supervisor, database, SystemClock(), awake, changed.set, alerts)
    try:
        server = Server(settings, RecoveryServicer(guards, database), access.of(settings, SystemClock()))
    except RuntimeError as error:
        log.error("port_not_free", port=settings.watchdog_port, cause=str(error))
        return 1
    log.info("watchdog_started", port=server.port)
    metrics.serve(settings.metrics_host, settings.watchdog_metrics_port, WatchdogCollector(guards, settings.home))
    threads = [
        threading.Thread(target=_bring_schema, args=(database, ending), name="schema", daemon=True),
        *(
            threading.Thread(target=_repeat, args=(name, task, interval_s, ending, alerts), name=name, daemon=True)
            for name, task, interval_s in (
                ("discover", guards.discover, DISCOVER_INTERVAL_S),
                ("heartbeat", lambda: _beat(database), settings.heartbeat_interval_s),
            )
        ),
    ]
    for thread in threads:
        thread.start()
    while not ending.is_set():
        server.set_serving(not guards.has_given_up())
        changed.wait()
        changed.clear()
    server.stop()
    for thread in threads:
        thread.join(END_TIMEOUT_S)
    guards.stop()
    alerts.close()
    log.info("watchdog_ended")
    return 0


def _bring_schema(database: Database, ending: threading.Event) -> None:
    """Brings the schema up to date as soon as Postgres is there; until then the guards take it for away."""
    is_waiting = False
    while not ending.is_set():
        try:
            database.call(migrate)
        except Unreachable as error:
            if not is_waiting:
                log.warning("waiting_for_database", cause=str(error).strip())
            is_waiting = True
        except Exception:
            log.exception("schema_failed")
        else:
            return
        ending.wait(SCHEMA_RETRY_S)


def _repeat(name: str, task: Callable[[], None], interval_s: float, ending: threading.Event, alerts: Alerts) -> None:
    """Does a task over and over, also after it failed by a fault of ours."""
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
        ending.wait(interval_s)


def _beat(database: Database) -> None:
    """Has Postgres say when this watchdog was seen last, for when it is gone."""
    # With Postgres away nobody could read it either: who needs to know that, the guards tell.
    with suppress(*AWAY):
        database.call(watchdogs.write, socket.gethostname(), os.getpid())


def main(arguments: Sequence[str]) -> int:
    """Checks the settings, then guards."""
    parser = argparse.ArgumentParser(prog="python -m watchdog", description=__doc__)
    parser.add_argument("--check", action="store_true", help="say whether it could work, and end")
    parser.add_argument("--dry-run", action="store_true", help="log what it would do, and do nothing")
    options = parser.parse_args(arguments)
    settings = config.load()
    if options.check:
        wrong = check(settings)
        sys.stderr.write("".join(f"{line}\n" for line in wrong))
        return 1 if wrong else 0
    if not options.dry_run:
        processes.die_with_parent()
    logs.configure("watchdog", settings.log_level)
    ending, changed = threading.Event(), threading.Event()

    def end(_: int, __: object) -> None:
        ending.set()
        changed.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    awake = Awake(SystemClock())
    awake.start()
    if options.dry_run:
        database = Database(settings.postgres_url, "watchdog-dry-run", settings.database_timeout_s)
        supervisor = Supervisor(settings.supervisor_url, SUPERVISOR_TIMEOUT_S)
        dry_run.watch(settings, limits_of(settings), supervisor, database, SystemClock(), awake, ending, changed)
        status = 0
    else:
        status = guard(settings, awake, ending, changed)
    sys.stderr.flush()
    # A probe or a statement that is still waiting for its deadline must not hold up the end.
    os._exit(status)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
