"""Other hosts: what is gone there is reported by one of those that are left, once, since it cannot report itself."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from uuid import uuid4

import peewee

from service import processes
from service.clock import Clock
from service.db import chunks, hosts, losses, recoveries, schema, watchdogs
from service.db.availability import DATABASE_ERRORS
from service.db.connection import Database, lock_hosts
from service.db.database_clock import DatabaseClock
from service.db.hosts import Loss, Survey
from service.db.recoveries import Event
from service.db.schema import TooOldError
from service.telemetry import logs
from watchdog.alerts import Alerts
from watchdog.self_report import Report

# Events of hosts that are forgotten are removed this often, so many at a time; and what gateways saw of lost lives.
PRUNE_INTERVAL_S = 3600.0
PRUNED = 10_000
# A watchdog that is gone has left its name to others by then.
NAMESAKE_S = 15.0
# The events of what is gone, and of what is there again.
LOST = {"host": "host_lost", "watchdog": "watchdog_lost", "model": "model_lost"}
BACK = {"host": "host_back", "watchdog": "watchdog_back", "model": "model_back"}

log = logs.get("neighbours")


@dataclass
class Neighbours:
    """Reports this watchdog and its host to the others with each `beat`, and looks at what they report.

    A host that was not seen for `timeout_s` is gone. Events of hosts that are forgotten are kept for `kept_s`.
    """

    database: Database
    host: str
    machine: str
    report: Report
    timeout_s: float
    kept_s: float
    # Between two calls of `look`.
    interval_s: float
    clock: Clock
    alerts: Alerts
    # Called once this watchdog is too old for the schema: it must not act on what it cannot read.
    on_too_old: Callable[[], None]
    # As last looked at, for metrics.
    survey: Survey = field(default_factory=Survey)
    # Since when another machine's watchdog has our name, as far as that was not told.
    _namesake_since_s: float | None = None
    _prune_at_s: float = 0.0
    _database_clock: DatabaseClock = field(init=False)

    def __post_init__(self) -> None:
        self._database_clock = DatabaseClock(self.timeout_s, max(self.timeout_s, 2 * self.interval_s))

    def beat(self) -> None:
        """Writes this watchdog's heartbeat with what it knows about its host."""
        try:
            self.database.call(schema.check_version)
            detail = {**self.report.detail(), "time": self.clock.now().isoformat()}
            is_ours = self.database.call(watchdogs.write, self.host, os.getpid(), self.machine, detail)
        except TooOldError as error:
            log.error("too_old", cause=str(error))
            self.on_too_old()
            return
        except DATABASE_ERRORS:
            # While Postgres is away nobody could read it, and the guards already report that.
            self._database_clock.lost()
            return
        # Where a worker's name is taken too, its guard tells.
        is_told = any(str(guard.get("verdict", "")).endswith("NAME_TAKEN") for guard in detail["guards"])
        self._note_namesake(is_ours or is_told)

    def _note_namesake(self, is_ours: bool) -> None:
        """Says once that another machine's watchdog has our name, when that one can no longer be gone."""
        now_s = self.clock.monotonic()
        if is_ours:
            self._namesake_since_s = None
        elif self._namesake_since_s is None:
            self._namesake_since_s = now_s
        elif now_s - self._namesake_since_s > watchdogs.GONE_S + NAMESAKE_S:
            # Not again before it was gone.
            self._namesake_since_s = float("inf")
            message = f"the watchdog of another machine reports as {self.host}: give each host a name of its own"
            log.error("name_taken", host=self.host, cause=message)
            self.alerts.tell("name_taken", "NAME_TAKEN", self.host, "error", message, {})

    def end(self) -> None:
        """Says that this watchdog was stopped, so that nobody looks for it; not if it ends because supervisord died."""
        if processes.has_lost_parent():
            return
        try:
            self.database.call(watchdogs.end, self.host, os.getpid(), self.machine)
        except DATABASE_ERRORS as error:
            log.info("end_not_stored", cause=str(error))

    def look(self) -> None:
        """Looks at all hosts; reports what is gone or back unless another watchdog has done so.

        After an outage of Postgres, or once its clock was set, all heartbeats are old: it waits until every host had
        time for another one.
        """
        try:
            self.survey = self.database.call(hosts.survey, self.timeout_s)
            for event in self.database.call(self._report):
                level = log.warning if event.kind in LOST.values() else log.info
                level(event.kind, subject=event.worker_id, reason=event.reason)
                if event.kind in LOST.values():
                    message = f"{event.worker_id}: {event.kind.replace('_', ' ')}: {event.reason}"
                    self.alerts.tell(event.kind, event.kind, event.worker_id, "error", message, {})
            if (now_s := self.clock.monotonic()) >= self._prune_at_s:
                self.database.call(hosts.prune_events, self.kept_s, PRUNED)
                self.database.call(losses.prune)
                self._prune_at_s = now_s + PRUNE_INTERVAL_S
        except DATABASE_ERRORS:
            self._database_clock.lost()
            self.survey = Survey()

    def _report(self, db: peewee.PostgresqlDatabase) -> list[Event]:
        """Adds to the audit log what is gone or back and was not reported yet. Returns those events."""
        with db.atomic():
            # One at a time. Postgres that has just started, or stood still, may have missed the beats of all.
            is_steady = self._database_clock.is_steady(chunks.time_s(db), self.clock.monotonic())
            if not (is_steady and lock_hosts(db)) or recoveries.uptime_s(db) < self.timeout_s:
                return []
            lost, back = hosts.begin_losses(db, self.timeout_s), hosts.end_losses(db, self.timeout_s)
            events = [self._event(LOST[loss.kind], loss, _lost) for loss in lost]
            events += [self._event(BACK[loss.kind], loss, _back) for loss in back]
            for event in events:
                recoveries.put(db, event)
        return events

    def _event(self, kind: str, loss: Loss, words: Callable[[Loss], str]) -> Event:
        now, reason = self.clock.now(), f"{words(loss)}; reported by the watchdog of {self.host}"
        return Event(0, uuid4(), loss.subject, kind, "", reason, {}, "", "", {}, now, now, None, None)


def _lost(loss: Loss) -> str:
    seen = f"last seen {loss.age_s:.0f} s ago"
    what = {
        "host": f"none of its programs reports any more, and none was stopped ({seen})",
        "watchdog": f"it does not report any more ({seen}), so nothing restarts the programs of its host",
        "model": f"the last host that served it is gone ({seen})",
    }
    return what[loss.kind]


def _back(loss: Loss) -> str:
    return f"it is back, {loss.age_s:.0f} s after that was reported"
