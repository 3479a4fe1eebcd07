"""The heart: a thread that beats, and with each beat renews the leases on chunks and on the worker's name."""

import contextlib
import functools
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

import peewee

from service import processes
from service.db import chunks, endings, heartbeats, identity, losses, sharing, suspects, turns
from service.db.availability import AvailabilityLog, DatabaseAwayError, database_away
from service.db.chunks import Holder
from service.db.connection import within
from service.db.database_clock import DatabaseClock
from service.db.deadlines import Deadlines
from service.db.heartbeats import Beat, SeenBeat
from service.processes import Leader
from service.telemetry import logs, metrics
from service.worker.ear import Ear

# How often to check whether the phase has changed before the next beat is due, and to look for workers that are lost.
LOOK_INTERVAL_S = 1.0
# Beats that may fail to come in time before it counts as an outage.
MISSED_BEATS = 3

log = logs.get("heart")


class IdentityTakenError(Exception):
    """Another process has this worker's name. `is_final`: waiting for it would be in vain."""

    def __init__(self, why: str, *, is_final: bool = False) -> None:
        super().__init__(why)
        self.is_final = is_final


@dataclass
class Heart:
    """Beats every `interval_s` on its own connection, so that nothing else in the process can hold it up.

    The first beat takes the worker's name, once its last holder is gone or has let its lease run out; that ends the
    holder's sessions. If another process takes it from us, this one must not continue: `on_identity_taken` is called
    once. The `application_name` of each session of this process ends with its incarnation. `beat` returns the
    heartbeat, `held` the chunks to renew; `on_leases_lost` receives those that are no longer ours. Between beats it
    listens to what other workers say.
    """

    connection: peewee.PostgresqlDatabase
    holder: Holder
    interval_s: float
    # For all statements of one beat together.
    timeout_s: float
    beat: Callable[[], Beat]
    held: Callable[[], list[int]]
    on_leases_lost: Callable[[Sequence[int]], None]
    on_identity_taken: Callable[[], None]
    # Puts back what a life held that ended in order; returns how many chunks.
    put_back: Callable[[peewee.PostgresqlDatabase], int] = lambda _: 0
    # Called after work of others became available.
    on_taken_over: Callable[[], None] = lambda: None
    # Receives what other workers say, in this thread.
    on_notice: Callable[[str], None] = lambda _: None

    _deadlines: Deadlines = field(default_factory=Deadlines)
    _clock: DatabaseClock = field(init=False)
    _is_connected: bool = False
    # The heartbeat of the life that had the name when we first looked.
    _holder: SeenBeat | None = None
    # Since when each answer of Postgres has been that another process has the name, and which one has it.
    _taken: tuple[float, str] | None = None
    # Why the name cannot be had; None: not known yet, "": it is ours.
    _refusal: str | None = None
    _is_steady: bool = False
    _said: str = ""
    # Chunks of cancelled batches that could not be deleted yet.
    _undropped: set[int] = field(default_factory=set)
    _availability: AvailabilityLog = field(default_factory=lambda: AvailabilityLog(log))
    _ear: Ear = field(default_factory=Ear)
    _is_ending: bool = False
    _settled: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def __post_init__(self) -> None:
        gap_s = MISSED_BEATS * max(LOOK_INTERVAL_S, self.interval_s)
        self._clock = DatabaseClock(self.holder.lease_s, gap_s)

    def start(self) -> None:
        """Starts the thread."""
        self._thread = threading.Thread(target=self._follow, name="heart", daemon=True)
        self._thread.start()

    def wait_for_identity(self, timeout_s: float) -> None:
        """Waits until the worker's name is ours, however long Postgres is away.

        Raises IdentityTakenError if another process still has it after `timeout_s`, counted while Postgres answers.
        """
        while not self._settled.wait(LOOK_INTERVAL_S):
            taken = self._taken
            if taken is not None and time.monotonic() - taken[0] > timeout_s:
                raise IdentityTakenError(taken[1])
        if self._refusal:
            raise IdentityTakenError(self._refusal)

    def hurry(self) -> None:
        """Triggers a beat now."""
        self._ear.wake()

    def stop(self, timeout_s: float) -> None:
        """Beats once more and stops; waits up to `timeout_s`."""
        self._is_ending = True
        self._ear.wake()
        if self._thread is not None:
            self._thread.join(timeout_s)

    def _follow(self) -> None:
        while True:
            is_last = self._is_ending
            if is_last and self._refusal is None:
                self.connection.close()
                self._settled.set()
                return
            try:
                self._once(functools.partial(self._speak, is_last))
                self._availability.back()
            except IdentityTakenError as error:
                if self._refusal == "":
                    log.error("identity_taken", worker_id=self.holder.worker_id, cause=str(error))
                    self.on_identity_taken()
                    return
                self._availability.back()
                self._taken = (self._taken[0] if self._taken else time.monotonic(), str(error))
                if error.is_final:
                    self._refusal = str(error)
                    self._settled.set()
                    is_last = True
            except DatabaseAwayError as error:
                self._lose(error)
            except Exception as error:
                # A statement that Postgres refuses must not end the thread, and with it the worker.
                if not self._availability.is_away:
                    log.exception("beat_failed")
                self._lose(error)
            if is_last:
                self.connection.close()
                return
            try:
                self._rest()
            except Exception:
                # As for a beat. The next one finds out whether Postgres is the cause; it comes no sooner than usual.
                log.exception("rest_failed")
                time.sleep(LOOK_INTERVAL_S)

    def _rest(self) -> None:
        """Waits until the next beat is due, or there is something new to report.

        Meanwhile listens to other workers, and takes over what is lost.
        """
        due_s = time.monotonic() + (self.interval_s if self._is_connected else min(1.0, self.interval_s))
        look_s = time.monotonic() + LOOK_INTERVAL_S
        connection = None if self.connection.is_closed() else self.connection.connection()
        while (now_s := time.monotonic()) < due_s:
            is_woken, notices = self._ear.wait(connection, max(0.0, min(look_s, due_s) - now_s))
            for notice in notices:
                self.on_notice(notice)
            if is_woken:
                break
            # Notices may come at any rate: they neither hold this up nor make it more frequent.
            if time.monotonic() < look_s:
                continue
            look_s = time.monotonic() + LOOK_INTERVAL_S
            if self.beat().phase != self._said:
                break
            if self._is_connected and self._is_steady:
                try:
                    self._once(self._take_over)
                except Exception as error:  # noqa: BLE001 - the next beat tells more
                    self._lose(error)
                    break

    def _drop(self) -> None:
        """Deletes what was lost because its batch was cancelled; with the next beat what is locked now."""
        if self._undropped:
            self._undropped = chunks.drop_cancelled(self.connection, self.holder, self._undropped)

    def _once(self, what: Callable[[], None]) -> None:
        with metrics.database_call("beat", DatabaseAwayError), database_away():
            if self.connection.is_closed():
                self.connection.connect()
            with within(self._deadlines, self.connection, self.timeout_s):
                what()

    def _speak(self, is_last: bool) -> None:
        beat, mine = self.beat(), str(self.holder.incarnation)
        if self._refusal is None:
            self._take(beat)
        else:
            if not self._is_connected and identity.end_sessions(self.connection, f"heart-{mine}"):
                # Postgres, frozen for a while, has not noticed that we are gone from an earlier connection.
                log.info("earlier_session_ended", worker_id=self.holder.worker_id)
            # With its last beat it gives the name back: the next life need not wait.
            lease_s = 0 if is_last else self.holder.lease_s
            if not (heartbeats.write(self.connection, beat, lease_s) or self._take_back(beat, lease_s)):
                raise IdentityTakenError("another process took the name")
        if not self._is_connected:
            sharing.listen(self.connection)
            self._is_connected = True
        self._said = beat.phase
        held = self.held()
        if held:
            renewed = chunks.renew(self.connection, self.holder, held)
            # A chunk finished in the meantime is reported as lost too, which does no harm.
            lost = [chunk for chunk in held if chunk not in renewed]
            if lost:
                self.on_leases_lost(lost)
                self._undropped.update(lost)
        self._drop()
        endings.settle_cancelled(self.connection)
        turns.settle_abandoned(self.connection)
        self._is_steady = self._clock.is_steady(chunks.time_s(self.connection), time.monotonic())
        if self._is_steady:
            expired = losses.release_expired(self.connection, self.holder.lease_s)
            if released := losses.released(expired):
                log.warning("expired_leases_released", chunks=released)
            self._take_over()

    def _take_over(self) -> None:
        for loss in losses.take_over(self.connection, self.holder.lease_s):
            log.warning("lost_worker_replaced", lost=loss.worker_id, life=loss.incarnation, **asdict(loss.burial))
            self.on_taken_over()

    def _take(self, beat: Beat) -> None:
        """Takes the worker's name and buries its last life. Raises IdentityTakenError while another has it."""
        before, sessions = next(iter(heartbeats.read(self.connection, beat.worker_id)), None), 0
        if before is not None and before.beat.incarnation != beat.incarnation:
            self._check_gone(before, beat)
            sessions = identity.end_sessions(self.connection, str(before.beat.incarnation))
        if not heartbeats.begin(self.connection, beat, self.holder.lease_s, before):
            raise IdentityTakenError("another process was faster")
        put_back = self.put_back(self.connection)
        burial = suspects.bury(self.connection, beat.worker_id, beat.incarnation)
        log.info(
            "identity_locked", worker_id=beat.worker_id, sessions_ended=sessions, put_back=put_back, **asdict(burial)
        )
        self._refusal = ""
        self._settled.set()

    def _take_back(self, beat: Beat, lease_s: float) -> bool:
        """Takes the name from a life before ours, whose heartbeat is there again: the database was restored.

        What that held is put back. Nobody has died since, so no request counts a death. False: the name is another's.
        """
        before = next(iter(heartbeats.read(self.connection, beat.worker_id)), None)
        if before is None:
            return False
        theirs = before.beat
        is_running = processes.is_running(Leader(theirs.pid, theirs.start_ticks))
        if not identity.is_earlier(before, beat.place, beat.start_ticks, is_running):
            return False
        # Both or nothing: with the name taken and its leases left to run out, its requests would count a death.
        with self.connection.atomic():
            if not heartbeats.begin(self.connection, beat, lease_s, before):
                return False
            put_back = chunks.release_life(self.connection, beat.worker_id, theirs.incarnation)
        log.warning("name_taken_back", worker_id=beat.worker_id, life=str(theirs.incarnation), put_back=put_back)
        return True

    def _check_gone(self, before: SeenBeat, beat: Beat) -> None:
        theirs, place = before.beat, beat.place
        is_running = processes.is_running(Leader(theirs.pid, theirs.start_ticks))
        if identity.is_free(before, place, is_running, identity.SILENT_BEATS * self.interval_s):
            return
        first = self._holder
        if first is None or first.beat.incarnation != theirs.incarnation:
            self._holder = first = before
        # On this machine it may still be draining; elsewhere one more beat proves that it will not go away.
        is_final = not identity.is_ours(before, place) and first.last_seen != before.last_seen
        raise IdentityTakenError(self._describe(theirs, f"seen {before.age_s:.1f} s ago"), is_final=is_final)

    def _describe(self, theirs: Beat, more: str) -> str:
        ours = self.beat()
        where = "another process" if theirs.place.machine == ours.place.machine else "another machine"
        return (
            f"{where} runs as {theirs.worker_id}, at {theirs.address} (pid {theirs.pid}, {more}); this one is at"
            f" {ours.address} (pid {ours.pid})"
        )

    def _lose(self, error: Exception) -> None:
        self._availability.away(error)
        self._clock.lost()
        self._taken = None
        self._is_connected = False
        with contextlib.suppress(DatabaseAwayError), database_away():
            self.connection.close()
