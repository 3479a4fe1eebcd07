"""The audit log: what the watchdog records before and after it acts, and reads again when it starts."""

import threading
from dataclasses import asdict, replace
from datetime import datetime, timedelta
from uuid import UUID, uuid4

import peewee

from service.clock import Clock
from service.db import recoveries
from service.db.availability import DATABASE_ERRORS, DatabaseAwayError
from service.db.connection import Database
from service.db.recoveries import OPEN, Event
from service.telemetry import logs
from watchdog.policy import HOUR_S, Decision, Evidence, Step
from watchdog.record.history import History, history_of, is_of_note
from watchdog.record.journal import Entry, Journal
from watchdog.record.moment import Moment, dated

# Changes of verdict kept for Postgres while it is away; older ones are dropped.
KEPT_VERDICTS = 100

log = logs.get("record")


class UnrecordedError(Exception):
    """Neither Postgres nor the journal took the event, or earlier events are unknown: do not act."""


def counted_since(clock: Clock) -> datetime:
    """Returns the time from which restarts count against the budget."""
    return clock.now() - timedelta(seconds=HOUR_S)


class AuditLog:
    """The events of one worker, written first to the journal and then to Postgres, which keeps all of them.

    The journal alone is enough to decide; without one, Postgres must be reached once. `boot` is the id of the
    machine's boot: within one, setting the clock changes no event's age. Events of another `machine` do not count, even
    if its worker has the same name: it has a budget of its own.
    """

    def __init__(
        self, database: Database, journal: Journal, worker_id: str, machine: str, clock: Clock, boot: str
    ) -> None:
        self._database = database
        self._journal = journal
        self._worker_id = worker_id
        self._machine = machine
        self._clock = clock
        self._boot = boot
        self._lock = threading.Lock()
        self._storing = threading.Lock()
        # None: not known yet.
        self._entries = self._own(journal.read())
        self._is_away = True
        self._has_read_database = False

    def sync(self, is_reachable: bool) -> bool:
        """Writes outstanding events to Postgres if it is reachable. Returns True when it learned earlier events."""
        self._is_away = not is_reachable
        if count := self._store():
            log.info("journal_merged", worker_id=self._worker_id, events=count)
        if self._is_away or self._has_read_database:
            return False
        try:
            since, known = counted_since(self._clock), [entry.event.key for entry in self._entries or []]
            found = self._database.call(recoveries.of_note, self._worker_id, self._machine, since, known)
        except DATABASE_ERRORS:
            self._is_away = True
            return False
        with self._lock:
            keys = {event.key for event in found}
            # After a restore Postgres may lack events; the journal's still count.
            ours = [entry for entry in self._entries or [] if not entry.is_stored or entry.event.key not in keys]
            unstored = {entry.event.key for entry in ours if not entry.is_stored}
            began = {entry.event.key: entry.began for entry in self._entries or []}
            theirs = [Entry(event, True, began.get(event.key)) for event in found if event.key not in unstored]
            stored = [entry for entry in ours if entry.is_stored]
            self._entries = stored + theirs + [entry for entry in ours if not entry.is_stored]
            self._save()
        self._has_read_database = True
        return True

    def history(self) -> History | None:
        """Returns what the events so far amount to; None while they are unknown."""
        with self._lock:
            return None if self._entries is None else history_of(self._events(), self._clock.now())

    def begin(self, evidence: Evidence, decision: Decision, timings: dict[str, float]) -> Event:
        """Records the intent to restart, before anything is done. Raises UnrecordedError."""
        incarnation = UUID(evidence.heartbeat.incarnation) if evidence.heartbeat else None
        intent = self._new("restart", str(decision.verdict), decision.reason)
        return self._put_surely(
            replace(
                intent,
                evidence=asdict(evidence),
                step=str(Step.STOPPING),
                outcome=OPEN,
                timings=timings,
                end_time=None,
                old_incarnation=incarnation,
            )
        )

    def advance(self, intent: Event, step: Step, timings: dict[str, float]) -> Event:
        """Records how far the restart has come, now or as soon as possible. Returns the updated intent."""
        return self._put(replace(intent, step=str(step), timings=timings))[0]

    def close(self, intent: Event, outcome: str, timings: dict[str, float], incarnation: UUID | None) -> None:
        """Records the restart's outcome and new incarnation, now or as soon as possible."""
        end_time = self._clock.now()
        self._put(replace(intent, outcome=outcome, timings=timings, new_incarnation=incarnation, end_time=end_time))

    def add(self, kind: str, decision: Decision, evidence: Evidence) -> None:
        """Records an event other than a restart, now or as soon as possible."""
        event = self._new(kind, str(decision.verdict), decision.reason)
        self._put(replace(event, evidence=asdict(evidence)))

    def order(self, kind: str, verdict: str, reason: str, lasts_s: float) -> datetime:
        """Records an operator's order. Returns when it ends: now, or after `lasts_s`. Raises UnrecordedError."""
        event = self._new(kind, verdict, reason)
        end_time = event.start_time + timedelta(seconds=lasts_s)
        self._put_surely(replace(event, end_time=end_time))
        return end_time

    def _new(self, kind: str, verdict: str, reason: str) -> Event:
        now = self._clock.now()
        event = Event(0, uuid4(), self._worker_id, kind, verdict, reason, {}, "", "", {}, now, now, None, None)
        return replace(event, machine=self._machine)

    def _own(self, entries: list[Entry] | None) -> list[Entry] | None:
        """The journal's entries without those of the machine from which this home was copied, or of another name."""
        if entries is None:
            return None
        machines = (self._machine, "")
        own = [
            entry for entry in entries if entry.event.machine in machines and entry.event.worker_id == self._worker_id
        ]
        # Of a journal in which nothing is ours it is not known what happened here.
        return own if own or not entries else None

    def _put_surely(self, event: Event) -> Event:
        if self._entries is None:
            raise UnrecordedError("earlier events are unknown until Postgres has been reached")
        event, is_sure = self._put(event)
        if not is_sure:
            with self._lock:
                self._entries = [entry for entry in self._entries if entry.event.key != event.key]
            raise UnrecordedError("Postgres is away, and the journal cannot be written")
        return event

    def _put(self, event: Event) -> tuple[Event, bool]:
        """Returns the event with its id, and whether it survives the death of this process."""
        with self._lock:
            if self._entries is None:
                return event, False
            before = [other.event.key for other in self._entries]
            if event.key in before:
                place = before.index(event.key)
                known = self._entries[place]
                entry = replace(known, event=replace(event, id=known.event.id), is_stored=False)
                self._entries[place] = entry
            else:
                entry = Entry(event, is_stored=False, began=self._present())
                self._entries.append(entry)
            is_journaled = self._save()
        self._store()
        with self._lock:
            entry = next((other for other in self._entries if other.event.key == event.key), entry)
        return entry.event, is_journaled or entry.is_stored

    def _store(self) -> int:
        """Writes outstanding events to Postgres, oldest first, until it is away. Returns how many."""
        if self._is_away:
            # Do not queue behind a thread that is still waiting for Postgres.
            return 0
        count = 0
        with self._storing:
            while not self._is_away and (entry := self._next_unstored()) is not None:
                try:
                    event = replace(entry.event, id=self._database.call(recoveries.put, entry.event))
                except DatabaseAwayError as error:
                    self._is_away = True
                    log.warning("event_only_in_journal", worker_id=self._worker_id, cause=str(error).strip())
                    break
                except peewee.DatabaseError:
                    # Postgres would refuse it every time and block the events behind it: count it as stored.
                    log.exception("event_refused", worker_id=self._worker_id, key=str(entry.event.key))
                    event = entry.event
                count += 1
                with self._lock:
                    # Mark only this version as stored; if the event changed meanwhile, it is written again.
                    self._entries = [
                        replace(entry, event=event, is_stored=True) if other is entry else other
                        for other in self._entries or []
                    ]
        if count:
            with self._lock:
                self._save()
        return count

    def _next_unstored(self) -> Entry | None:
        with self._lock:
            return next((entry for entry in self._entries or [] if not entry.is_stored), None)

    def _save(self) -> bool:
        """Writes the journal without events that no longer matter. Returns False if it cannot be written."""
        events, now = self._events(), self._clock.now()
        waiting = [entry for entry in self._entries or [] if not entry.is_stored and entry.event.kind == "verdict"]
        dropped = waiting[:-KEPT_VERDICTS]
        self._entries = [
            entry
            for entry, event in zip(self._entries or [], events, strict=True)
            if entry not in dropped and (not entry.is_stored or is_of_note(event, events, now))
        ]
        try:
            self._journal.write(self._entries)
        except OSError as error:
            log.error("journal_not_written", worker_id=self._worker_id, cause=str(error))
            if all(entry.is_stored for entry in self._entries):
                self._journal.remove()
            return False
        return True

    def _events(self) -> list[Event]:
        now, present = self._clock.now(), self._present()
        return [dated(entry.event, entry.began, now, present) for entry in self._entries or []]

    def _present(self) -> Moment:
        return Moment(self._boot, self._clock.monotonic())
