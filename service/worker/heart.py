"""The heart: a thread that beats, renews leases, and holds the lock of the worker's identity, from start to end."""

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

import peewee

from service import logs, metrics
from service.db import batches, chunks, heartbeats
from service.db.connection import Unreachable, end_earlier_sessions, lock_worker
from service.db.deadlines import Deadlines
from service.db.heartbeats import Beat
from service.worker.life import Life

# How often it is looked whether there is something new to say before the next beat is due.
LOOK_INTERVAL_S = 1.0

log = logs.get("heart")


class IdentityTakenError(Exception):
    """Another process lives under this worker's identity."""


@dataclass
class Heart:
    """Beats every `interval_s` on a connection of its own, so that nothing else in the process can hold it up.

    The lock lives and dies with that connection. When it is lost with Postgres and another process has taken it,
    this one has no right to go on: `on_identity_taken` is called, once. `connection` has an application_name that
    nobody else uses, by which earlier sessions of this process are known.
    `beat` gives what to say; `held` the chunks to renew; `on_leases_lost` is told which are no longer ours.
    """

    connection: peewee.PostgresqlDatabase
    life: Life
    interval_s: float
    lease_s: float
    # Of all that is said to Postgres at one beat.
    timeout_s: float
    beat: Callable[[], Beat]
    held: Callable[[], list[int]]
    on_leases_lost: Callable[[Sequence[int]], None]
    on_identity_taken: Callable[[], None]

    _deadlines: Deadlines = field(default_factory=Deadlines)
    _has_lock: bool = False
    _said: str = ""
    _is_database_away: bool = False
    _wake: threading.Event = field(default_factory=threading.Event)
    _is_ending: bool = False
    _locked: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def start(self) -> None:
        """Starts to beat."""
        self._thread = threading.Thread(target=self._live, name="heart", daemon=True)
        self._thread.start()

    def wait_for_lock(self, timeout_s: float) -> bool:
        """Waits until the identity is ours. False: not within `timeout_s`."""
        return self._locked.wait(timeout_s)

    def hurry(self) -> None:
        """Beats now: there is something new to say."""
        self._wake.set()

    def stop(self, timeout_s: float) -> None:
        """Beats once more and ends."""
        self._is_ending = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join(timeout_s)

    def _live(self) -> None:
        while True:
            is_last = self._is_ending
            try:
                self._once()
                if self._is_database_away:
                    log.info("database_back")
                self._is_database_away = False
            except IdentityTakenError:
                # Before the first lock: an earlier life is still ending. Wait for it.
                if self._locked.is_set():
                    log.error("identity_taken", worker_id=self.life.worker_id)
                    self.on_identity_taken()
                    return
            except Unreachable as error:
                self._lose(error)
            except Exception as error:
                # A heart that dies of a statement that Postgres refused would cost the whole worker.
                log.exception("beat_failed")
                self._lose(error)
            if is_last:
                self.connection.close()
                return
            self._rest()

    def _rest(self) -> None:
        """Until the next beat is due, or there is something new to say."""
        due_s = time.monotonic() + (self.interval_s if self._has_lock else min(1.0, self.interval_s))
        while (left_s := due_s - time.monotonic()) > 0:
            if self._wake.wait(min(LOOK_INTERVAL_S, left_s)) or self.beat().phase != self._said:
                break
        self._wake.clear()

    def _once(self) -> None:
        with metrics.database_call("beat", Unreachable):
            if self.connection.is_closed():
                self.connection.connect()
            with self._deadlines.within(self.connection.connection(), self.timeout_s):
                self._speak()

    def _speak(self) -> None:
        if not self._has_lock:
            if not lock_worker(self.connection, self.life.worker_id):
                if end_earlier_sessions(self.connection):
                    log.info("earlier_session_ended", worker_id=self.life.worker_id)
                    return
                raise IdentityTakenError
            if not self._locked.is_set():
                burial = chunks.bury(self.connection, self.life.worker_id)
                log.info("identity_locked", worker_id=self.life.worker_id, **asdict(burial))
            self._has_lock = True
            self._locked.set()
        beat = self.beat()
        heartbeats.write(self.connection, beat)
        self._said = beat.phase
        held = self.held()
        if held:
            renewed = chunks.renew(self.connection, held, self.life.incarnation, self.lease_s)
            # A chunk may have been finished meanwhile: it is not lost, and telling so does no harm.
            lost = [chunk for chunk in held if chunk not in renewed]
            if lost:
                self.on_leases_lost(lost)
                chunks.drop_cancelled(self.connection, lost, self.life.incarnation)
        batches.settle_cancelled(self.connection)
        released = chunks.release_expired(self.connection, self.lease_s)
        if released:
            log.warning("expired_leases_released", chunks=released)

    def _lose(self, error: Exception) -> None:
        if not self._is_database_away:
            log.warning("database_away", cause=str(error).strip())
        self._is_database_away = True
        self._has_lock = False
        with contextlib.suppress(*Unreachable):
            self.connection.close()
