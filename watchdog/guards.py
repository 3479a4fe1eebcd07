"""One guard for each worker of this host, as supervisord's configuration has them."""

import socket
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field

from service import logs
from service.clock import Clock
from service.config import Settings
from service.db.connection import Database
from service.db.heartbeats import SeenBeat
from service.db.recoveries import Event
from service.processes import Mark
from watchdog import evidence_folder
from watchdog.act import Restarter
from watchdog.alerts import Alerts
from watchdog.awake import Awake
from watchdog.guard import Guard
from watchdog.journal import Journal
from watchdog.observe import Observer
from watchdog.outages import Outage
from watchdog.policy import Limits, Verdict
from watchdog.record import Record
from watchdog.remains import Remains
from watchdog.supervisor import Supervisor, SupervisorAwayError

# supervisord's program of the workers, and its one process where `numprocs` is 1.
GROUP = "worker"
DEFAULT_WORKER = "worker"
STOP_TIMEOUT_S = 2.0
# A worker that gave up draining still has its engine to end.
DRAIN_MARGIN_S = 15.0

log = logs.get("guards")


def limits_of(settings: Settings) -> Limits:
    """The limits that a person can set, with what depends on them."""
    return Limits(
        max_restarts_per_hour=settings.max_restarts_per_hour,
        heartbeat_timeout_s=settings.heartbeat_timeout_s,
        check_interval_s=settings.check_interval_s,
        load_timeout_s=settings.load_timeout_s,
        # The worker's own comes first.
        drain_timeout_s=settings.drain_timeout_s + DRAIN_MARGIN_S,
        transition_timeout_s=settings.stop_timeout_s + 30,
        backoff_max_s=settings.restart_backoff_max_s,
        heartbeat_confirm_s=3 * settings.heartbeat_interval_s,
    )


def workers_of(supervisor: Supervisor) -> dict[str, str]:
    """supervisord's names of this host's workers, by worker id. Raises SupervisorAwayError."""
    return {f"{socket.gethostname()}:{name}": name for name in supervisor.processes(GROUP)}


def journal_of(settings: Settings, process_name: str) -> Journal:
    """Where the events of a worker are kept on this host."""
    return Journal(settings.home / "recovery" / f"{process_name}.json")


def observer_of(
    settings: Settings,
    supervisor: Supervisor,
    database: Database,
    clock: Clock,
    awake: Awake,
    process_name: str,
    on_change: Callable[[], None],
) -> Observer:
    """What looks at one worker of this host."""
    address = f"{settings.own_host}:{settings.worker_port}" if process_name == DEFAULT_WORKER else None
    return Observer(
        name=f"{GROUP}:{process_name}",
        worker_id=f"{socket.gethostname()}:{process_name}",
        supervisor=supervisor,
        database=database,
        address=settings.probe_address(process_name) if settings.probe_sockets else address,
        probe_timeout_s=settings.probe_timeout_s,
        database_timeout_s=settings.database_timeout_s,
        clock=clock,
        awake=awake,
        on_change=on_change,
    )


@dataclass
class Guards:
    """The guards by worker id. `on_change` is called from their threads when a verdict or an action changed."""

    settings: Settings
    limits: Limits
    supervisor: Supervisor
    database: Database
    clock: Clock
    awake: Awake
    on_change: Callable[[], None]
    alerts: Alerts
    by_worker: dict[str, Guard] = field(default_factory=dict)
    _outages: Mapping[Verdict, Outage] = field(
        default_factory=lambda: {Verdict.DATABASE_AWAY: Outage(), Verdict.SUPERVISOR_AWAY: Outage()}
    )

    def discover(self) -> None:
        """Guards workers that are new, lets go of those that are gone. With supervisord away nothing changes."""
        try:
            wanted = workers_of(self.supervisor)
        except SupervisorAwayError as error:
            log.warning("workers_not_found", cause=str(error))
            return
        for worker_id in self.by_worker.keys() - wanted.keys():
            log.info("worker_gone", worker_id=worker_id)
            self._without(worker_id).stop(STOP_TIMEOUT_S)
        for worker_id in wanted.keys() - self.by_worker.keys():
            log.info("worker_found", worker_id=worker_id)
            guard = self._guard(worker_id, wanted[worker_id])
            self.by_worker = {**self.by_worker, worker_id: guard}
            guard.start()

    def has_given_up(self) -> bool:
        """True when a person is needed for one of the workers."""
        return any(guard.snapshot.gave_up for guard in self.by_worker.values() if guard.snapshot is not None)

    def stop(self) -> None:
        """Ends all guards, without waiting long for any."""
        for guard in self.by_worker.values():
            guard.stop(0)
        for guard in self.by_worker.values():
            guard.stop(STOP_TIMEOUT_S)

    def _without(self, worker_id: str) -> Guard:
        guard = self.by_worker[worker_id]
        self.by_worker = {other: kept for other, kept in self.by_worker.items() if other != worker_id}
        return guard

    def _guard(self, worker_id: str, process_name: str) -> Guard:
        settings, name = self.settings, f"{GROUP}:{process_name}"
        woken = threading.Event()
        observer = observer_of(
            settings, self.supervisor, self.database, self.clock, self.awake, process_name, woken.set
        )
        mark = Mark(settings.home, process_name)
        restarter = Restarter(
            name=name,
            mark=mark,
            remains=Remains(mark),
            supervisor=self.supervisor,
            stop_timeout_s=settings.stop_timeout_s,
            clock=self.clock,
            ending=threading.Event(),
        )
        return Guard(
            worker_id,
            observer,
            Record(self.database, journal_of(settings, process_name), worker_id, self.clock),
            restarter,
            self.limits,
            self.clock,
            woken,
            self.on_change,
            lambda intent: self._keep_evidence(process_name, intent, observer.seen),
            self.alerts,
            self._outages,
        )

    def _keep_evidence(self, process_name: str, intent: Event, seen: SeenBeat | None) -> None:
        home = self.settings.home
        log_files = [home / "log" / f"{name}.log" for name in (process_name, "watchdog", "supervisord")]
        event = str(intent.id or intent.key)
        heartbeat = asdict(seen) if seen is not None else None
        mark = Mark(home, process_name)
        evidence_folder.keep(home, mark, self.clock.now(), event, asdict(intent), heartbeat, log_files)
