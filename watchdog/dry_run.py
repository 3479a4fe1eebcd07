"""What the watchdog would do, in the log alone: no orders to supervisord, no rows, no files, no alerts, no port."""

import threading
from dataclasses import replace

from service import logs
from service.clock import Clock
from service.config import Settings
from service.db import recoveries
from service.db.connection import Database
from service.db.recoveries import Event
from watchdog.awake import Awake
from watchdog.guards import journal_of, observer_of, workers_of
from watchdog.observe import Observer
from watchdog.past import past_of
from watchdog.policy import Action, Decision, Intent, Limits, Memory, Step, decide
from watchdog.record import AWAY, past_since
from watchdog.supervisor import Supervisor, SupervisorAwayError

LOOK_INTERVAL_S = 0.5

log = logs.get("dry_run")


def watch(
    settings: Settings,
    limits: Limits,
    supervisor: Supervisor,
    database: Database,
    clock: Clock,
    awake: Awake,
    ending: threading.Event,
    woken: threading.Event,
) -> None:
    """Looks at all workers until `ending` is set, and logs each change of what would be decided."""
    observers: dict[str, Observer] = {}
    memories: dict[str, Memory] = {}
    said: dict[str, Decision] = {}
    log.info("dry_run_started")
    while not ending.is_set():
        try:
            names = workers_of(supervisor)
        except SupervisorAwayError as error:
            log.warning("workers_not_found", cause=str(error))
            names = {}
        for worker_id, name in names.items():
            if worker_id not in observers:
                observers[worker_id] = observer_of(settings, supervisor, database, clock, awake, name, woken.set)
            evidence = observers[worker_id].observe()
            past = past_of(_events(settings, database, clock, worker_id, name), clock.now())
            intent = Intent(str(past.intent.key), Step(past.intent.step)) if past.intent else None
            evidence = replace(evidence, intent=intent, pause_left_s=past.pause_left_s)
            memory = memories.get(worker_id, Memory()).with_past(
                past.restart_ages_s, past.has_given_up, evidence.time_s, limits
            )
            decision, memory = decide(evidence, memory, limits)
            if decision.action is not Action.RESTART:
                # What is not made is not counted either.
                memories[worker_id] = memory
            before = said.get(worker_id)
            if before is None or (before.verdict, before.action) != (decision.verdict, decision.action):
                would = {"verdict": decision.verdict, "action": decision.action, "reason": decision.reason}
                log.warning("would_decide", worker_id=worker_id, **would)
            said[worker_id] = decision
        woken.wait(LOOK_INTERVAL_S)
        woken.clear()


def _events(settings: Settings, database: Database, clock: Clock, worker_id: str, name: str) -> list[Event]:
    try:
        return database.call(recoveries.of_note, worker_id, past_since(clock))
    except AWAY:
        return [entry.event for entry in journal_of(settings, name).read() or []]
