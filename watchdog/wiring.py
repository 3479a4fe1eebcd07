"""Builds guards from the settings and supervisord's process names."""

import threading
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field

from service import config, machine
from service.clock import Clock
from service.config import Settings
from service.db.connection import Database
from service.db.heartbeats import SeenBeat
from service.db.identity import SILENT_BEATS
from service.db.recoveries import Event
from service.machine import Place
from service.processes import Mark
from watchdog.act import evidence_folder
from watchdog.act.leftovers import Leftovers
from watchdog.act.restart import Restarter
from watchdog.alerts import Alerts
from watchdog.guard import Guard
from watchdog.observe.observer import Observer
from watchdog.observe.stall_detector import StallDetector
from watchdog.outages import Outage
from watchdog.policy import Limits, Verdict
from watchdog.record.audit_log import AuditLog
from watchdog.record.journal import Journal
from watchdog.supervisor import Supervisor

# supervisord's programs, or groups of programs: workers, and the servers of clients. With `numprocs` 1 the only process
# has the program's name, and the address of a worker is that of the settings.
GROUP = "worker"
SERVER_GROUPS = ("gateway", "http")


@dataclass(frozen=True)
class Pace:
    """A guard polls supervisord every `poll_s` between two checks, and asks for the health every `ask_s`."""

    poll_s: float
    ask_s: float


# supervisord restarts a server that exits; the watchdog is needed for one that runs and does not answer.
PACES = {GROUP: Pace(poll_s=0.5, ask_s=1.5), **dict.fromkeys(SERVER_GROUPS, Pace(poll_s=2.5, ask_s=5.0))}
# After its drain timeout a worker still has to stop its engine.
DRAIN_MARGIN_S = 15.0


def limits_of(settings: Settings) -> Limits:
    """Returns the limits that follow from the settings."""
    return Limits(
        max_restarts_per_hour=settings.max_restarts_per_hour,
        heartbeat_timeout_s=settings.heartbeat_timeout_s,
        check_interval_s=settings.check_interval_s,
        load_timeout_s=settings.load_timeout_s,
        # The worker's own timeout should fire first.
        drain_timeout_s=settings.drain_timeout_s + DRAIN_MARGIN_S,
        transition_timeout_s=settings.stop_timeout_s + 30,
        backoff_max_s=settings.restart_backoff_max_s,
        heartbeat_confirm_s=3 * settings.heartbeat_interval_s,
    )


def processes_of(supervisor: Supervisor, groups: Collection[str] = (GROUP,)) -> dict[str, str]:
    """Returns supervisord's full names, `group:process`, of this host's processes in these groups, by worker id.

    Raises SupervisorAwayError.
    """
    return {_worker_id(name): f"{group}:{name}" for group in groups for name in supervisor.processes(group)}


def journal_of(settings: Settings, process_name: str) -> Journal:
    """Returns the journal of a process of this host."""
    return Journal(settings.home / "recovery" / f"{process_name}.json")


def observer_of(
    settings: Settings,
    supervisor: Supervisor,
    database: Database,
    clock: Clock,
    stalls: StallDetector,
    name: str,
    on_change: Callable[[], None],
    place: Place,
) -> Observer:
    """Returns the observer of the process of this host that supervisord calls `name`, `group:process`."""
    group, process_name = name.split(":")
    socket_address = settings.probe_address(process_name)
    # The ports of several gateways are in no heartbeat, and this probe speaks no TLS: then there is the socket alone.
    has_port = group == GROUP and settings.server_cert is None
    address = settings.own_address(settings.worker_port) if process_name == group else None
    return Observer(
        name=name,
        worker_id=_worker_id(process_name),
        supervisor=supervisor,
        database=database,
        address=address if has_port else socket_address,
        socket_address=socket_address,
        place=place,
        silence_s=SILENT_BEATS * settings.heartbeat_interval_s,
        probe_timeout_s=settings.probe_timeout_s,
        database_timeout_s=settings.database_timeout_s,
        clock=clock,
        stalls=stalls,
        on_change=on_change,
        settings=config.fingerprint_now,
        ask_interval_s=PACES[group].ask_s,
        beats=group == GROUP,
    )


@dataclass(frozen=True)
class GuardFactory:
    """What the guards of this host share. They call `on_change` from their threads after a new decision."""

    settings: Settings
    limits: Limits
    supervisor: Supervisor
    database: Database
    clock: Clock
    stalls: StallDetector
    on_change: Callable[[], None]
    alerts: Alerts
    outages: Mapping[Verdict, Outage] = field(
        default_factory=lambda: {Verdict.DATABASE_AWAY: Outage(), Verdict.SUPERVISOR_AWAY: Outage()}
    )

    def make(self, name: str) -> Guard:
        """Makes a guard, not started yet, for the process that supervisord calls `name`, `group:process`."""
        group, process_name = name.split(":")
        settings, worker_id, woken = self.settings, _worker_id(process_name), threading.Event()
        place, journal = machine.settle(settings.home), journal_of(settings, process_name)
        observer = observer_of(
            settings, self.supervisor, self.database, self.clock, self.stalls, name, woken.set, place
        )
        mark = Mark(settings.home, process_name)
        restarter = Restarter(
            name=name,
            mark=mark,
            leftovers=Leftovers(mark),
            supervisor=self.supervisor,
            stop_timeout_s=settings.stop_timeout_s,
            clock=self.clock,
            ending=threading.Event(),
        )
        return Guard(
            worker_id,
            observer,
            AuditLog(self.database, journal, worker_id, place.machine, self.clock, machine.boot_id()),
            restarter,
            self.limits,
            self.clock,
            woken,
            self.on_change,
            lambda intent: self._keep_evidence(process_name, intent, observer.seen),
            self.alerts,
            self.outages,
            PACES[group].poll_s,
        )

    def _keep_evidence(self, process_name: str, intent: Event, seen: SeenBeat | None) -> None:
        home = self.settings.home
        log_files = [home / "log" / f"{name}.log" for name in (process_name, "watchdog", "supervisord")]
        event = str(intent.id or intent.key)
        heartbeat = asdict(seen) if seen is not None else None
        mark = Mark(home, process_name)
        evidence_folder.keep(home, mark, self.clock.now(), event, asdict(intent), heartbeat, log_files)


def _worker_id(process_name: str) -> str:
    return f"{machine.host_name()}:{process_name}"
