"""What the watchdog writes down before and after it acts, and finds again when it starts."""

import threading
from dataclasses import asdict, replace
from datetime import datetime, timedelta
from uuid import UUID, uuid4

import peewee

from service import logs
from service.clock import Clock
from service.db import recoveries
from service.db.connection import Database, Unreachable
from service.db.recoveries import OPEN, Event
from watchdog.journal import Entry, Journal
from watchdog.past import Past, is_of_note, past_of
from watchdog.policy import HOUR_S, Decision, Evidence, Step

# A schema that is not there yet is as good as no database.
AWAY = (*Unreachable, peewee.ProgrammingError)
# Changes of verdict that wait for Postgres: what is older is of no interest when it comes back after so many.
KEPT_VERDICTS = 100

log = logs.get("record")


class UnrecordedError(Exception):
    """Neither Postgres nor the journal takes it, or what was done before is not known yet: nothing may be done."""


def past_since(clock: Clock) -> datetime:
    """From when on restarts count."""
    return clock.now() - timedelta(seconds=HOUR_S)


class Record:
    """The events of one worker: written into the journal first and then into Postgres, which has all of them for good.

    What decisions are made of is known from the journal alone; where there is none, Postgres has to be reached once.
    """

    def __init__(self, database: Database, journal: Journal, worker_id: str, clock: Clock) -> None:
        self._database = database
        self._journal = journal
        self._worker_id = worker_id
        self._clock = clock
        self._lock = threading.Lock()
        self._storing = threading.Lock()
        # None: not known yet.
        self._entries = journal.read()
        self._is_away = True
        self._has_read_database = False

    def sync(self, is_reachable: bool) -> bool:
        """Brings Postgres up to date, if it can be reached. Returns True when more of the past is known than before."""
        self._is_away = not is_reachable
        if count := self._store():
            log.info("journal_merged", worker_id=self._worker_id, events=count)
        if self._is_away or self._has_read_database:
            return False
        try:
            found = self._database.call(recoveries.of_note, self._worker_id, past_since(self._clock))
        except AWAY:
            self._is_away = True
            return False
        with self._lock:
            keys = {event.key for event in found}
            # Of a Postgres that lost something, as one that was restored, what we know still counts.
            ours = [entry for entry in self._entries or [] if not entry.is_stored or entry.event.key not in keys]
            unstored = {entry.event.key for entry in ours if not entry.is_stored}
            theirs = [Entry(event, is_stored=True) for event in found if event.key not in unstored]
            stored = [entry for entry in ours if entry.is_stored]
            self._entries = stored + theirs + [entry for entry in ours if not entry.is_stored]
            self._save()
        self._has_read_database = True
        return True

    def past(self) -> Past | None:
        """What follows from the events so far; None while they are not known."""
        with self._lock:
            return None if self._entries is None else past_of(self._events(), self._clock.now())

    def begin(self, evidence: Evidence, decision: Decision, timings: dict[str, float]) -> Event:
        """Writes the intent to restart, before anything is done. Raises UnrecordedError."""
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
        """Writes how far the restart has come, now or when it can be. Returns the intent as it is then."""
        return self._put(replace(intent, step=str(step), timings=timings))[0]

    def close(self, intent: Event, outcome: str, timings: dict[str, float], incarnation: UUID | None) -> None:
        """Writes how the restart ended, and which incarnation came of it, now or when it can be."""
        end_time = self._clock.now()
        self._put(replace(intent, outcome=outcome, timings=timings, new_incarnation=incarnation, end_time=end_time))

    def add(self, kind: str, decision: Decision, evidence: Evidence) -> None:
        """Writes an event that is no restart, now or when it can be."""
        event = self._new(kind, str(decision.verdict), decision.reason)
        self._put(replace(event, evidence=asdict(evidence)))

    def order(self, kind: str, verdict: str, reason: str, lasts_s: float) -> datetime:
        """Writes what a person orders. Returns when it ends: now, or after `lasts_s`. Raises UnrecordedError."""
        event = self._new(kind, verdict, reason)
        end_time = event.start_time + timedelta(seconds=lasts_s)
        self._put_surely(replace(event, end_time=end_time))
        return end_time

    def _new(self, kind: str, verdict: str, reason: str) -> Event:
        now = self._clock.now()
        return Event(0, uuid4(), self._worker_id, kind, verdict, reason, {}, "", "", {}, now, now, None, None)

    def _put_surely(self, event: Event) -> Event:
        if self._entries is None:
            raise UnrecordedError("what was done before is not known: Postgres has to be reached first")
        event, is_sure = self._put(event)
        if not is_sure:
            with self._lock:
                self._entries = [entry for entry in self._entries if entry.event.key != event.key]
            raise UnrecordedError("Postgres is away, and the journal cannot be written")
        return event

    def _put(self, event: Event) -> tuple[Event, bool]:
        """Returns the event with its id, and whether it is safe from the death of this process."""
        with self._lock:
            if self._entries is None:
                return event, False
            before = [other.event.key for other in self._entries]
            if event.key in before:
                place = before.index(event.key)
                entry = Entry(replace(event, id=self._entries[place].event.id), is_stored=False)
                self._entries[place] = entry
            else:
                entry = Entry(event, is_stored=False)
                self._entries.append(entry)
            is_journaled = self._save()
        self._store()
        with self._lock:
            entry = next((other for other in self._entries if other.event.key == event.key), entry)
        return entry.event, is_journaled or entry.is_stored

    def _store(self) -> int:
        """Writes into Postgres what it does not have, oldest first, as long as it is there. Returns how much it was."""
        if self._is_away:
            # Whoever still waits for it is not waited for.
            return 0
        count = 0
        with self._storing:
            while not self._is_away and (entry := self._next_unstored()) is not None:
                try:
                    event = replace(entry.event, id=self._database.call(recoveries.put, entry.event))
                except AWAY as error:
                    self._is_away = True
                    log.warning("event_only_in_journal", worker_id=self._worker_id, cause=str(error).strip())
                    break
                except peewee.DatabaseError:
                    # What it refuses once it always will, and would keep the others from it.
                    log.exception("event_refused", worker_id=self._worker_id, key=str(entry.event.key))
                    event = entry.event
                count += 1
                with self._lock:
                    # Not what has changed meanwhile: that is written once more.
                    self._entries = [
                        Entry(event, is_stored=True) if other is entry else other for other in self._entries or []
                    ]
        if count:
            with self._lock:
                self._save()
        return count

    def _next_unstored(self) -> Entry | None:
        with self._lock:
            return next((entry for entry in self._entries or [] if not entry.is_stored), None)

    def _save(self) -> bool:
        """Writes the journal, without what nothing follows from any more. False: it cannot be written."""
        events, now = self._events(), self._clock.now()
        waiting = [entry for entry in self._entries or [] if not entry.is_stored and entry.event.kind == "verdict"]
        dropped = waiting[:-KEPT_VERDICTS]
        self._entries = [
            entry
            for entry in self._entries or []
            if entry not in dropped and (not entry.is_stored or is_of_note(entry.event, events, now))
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
        return [entry.event for entry in self._entries or []]
