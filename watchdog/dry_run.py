"""Dry run: only logs what the watchdog would do. No orders to supervisord, no rows, no files, no alerts, no port."""

import threading

from service import machine
from service.clock import Clock
from service.config import Settings
from service.db import recoveries
from service.db.availability import DATABASE_ERRORS
from service.db.connection import Database
from service.db.recoveries import Event
from service.machine import Place
from service.telemetry import logs
from watchdog.judge import judge, recall
from watchdog.observe.observer import Observer
from watchdog.observe.stall_detector import StallDetector
from watchdog.policy import Action, Decision, Evidence, Limits, Memory
from watchdog.record.audit_log import counted_since
from watchdog.record.history import History, history_of
from watchdog.supervisor import Supervisor, SupervisorAwayError
from watchdog.wiring import GROUP, SERVER_GROUPS, journal_of, observer_of, processes_of

LOOK_INTERVAL_S = 0.5

log = logs.get("dry_run")


class Bystander:
    """Decides as the guard of one worker would, given that only others act."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._memory = Memory()
        self._known: History | None = None

    def decide(self, evidence: Evidence, history: History) -> Decision:
        """Returns what a guard would decide on this evidence and history."""
        memory = recall(self._memory, self._known, history, evidence.time_s, self._limits, is_more_known=True)
        _, decision, after = judge(evidence, history, history.intent, memory, self._limits)
        # We make no restart, so do not count it.
        self._memory = memory if decision.action is Action.RESTART else after
        self._known = history
        return decision


def watch(
    settings: Settings,
    limits: Limits,
    supervisor: Supervisor,
    database: Database,
    clock: Clock,
    stalls: StallDetector,
) -> None:
    """Observes all workers, gateways and OpenAI's doors for ever and logs every change of decision."""
    woken = threading.Event()
    observers: dict[str, Observer] = {}
    bystanders: dict[str, Bystander] = {}
    said: dict[str, Decision] = {}
    groups = [GROUP, *(group for group in SERVER_GROUPS if group in settings.runs)]
    place = machine.here()
    log.info("dry_run_started")
    while True:
        if not place.machine:
            # Its first server gives a home its machine's id, perhaps only after we started.
            place = machine.here(settings.home)
            if place.machine:
                for observer in observers.values():
                    observer.close()
                observers.clear()
        try:
            found = processes_of(supervisor, groups)
        except SupervisorAwayError as error:
            log.warning("workers_not_found", cause=str(error))
            found = {}
        for worker_id, name in found.items():
            if worker_id not in observers:
                observers[worker_id] = observer_of(
                    settings, supervisor, database, clock, stalls, name, woken.set, place
                )
                bystanders[worker_id] = Bystander(limits)
            history = history_of(_events(settings, database, clock, place, worker_id, name), clock.now())
            decision = bystanders[worker_id].decide(observers[worker_id].observe(), history)
            before = said.get(worker_id)
            if before is None or (before.verdict, before.action) != (decision.verdict, decision.action):
                would = {"verdict": decision.verdict, "action": decision.action, "reason": decision.reason}
                log.warning("would_decide", worker_id=worker_id, **would)
            said[worker_id] = decision
        woken.wait(LOOK_INTERVAL_S)
        woken.clear()


def _events(
    settings: Settings, database: Database, clock: Clock, place: Place, worker_id: str, name: str
) -> list[Event]:
    try:
        return database.call(recoveries.of_note, worker_id, place.machine, counted_since(clock))
    except DATABASE_ERRORS:
        return [entry.event for entry in journal_of(settings, name.rpartition(":")[2]).read() or []]
