"""Collects the evidence on one worker. A source that cannot be reached is evidence, not an error."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from urllib.parse import unquote

import peewee

from service import processes
from service.clock import Clock
from service.db import heartbeats, identity, recoveries, schema
from service.db.availability import DATABASE_ERRORS
from service.db.connection import Database
from service.db.heartbeats import SeenBeat
from service.machine import Place
from service.processes import Leader
from watchdog.observe.failed_start import failed_start
from watchdog.observe.probe import Probe
from watchdog.observe.stall_detector import StallDetector
from watchdog.policy import Evidence, Heartbeat, ProbeAnswer, Process, State
from watchdog.supervisor import RefusedError, Supervisor, SupervisorAwayError

# Does and undoes what a heartbeat takes: a transaction id, the rights to write its row, and its lock and triggers. Sent
# as one, so that a watchdog that is frozen in between keeps no lock. A guard that waits for one holds up the watchdog's
# own heartbeat.
CAN_BEAT = """
BEGIN; SET LOCAL lock_timeout = '3s'; SELECT pg_current_xact_id();
INSERT INTO heartbeats SELECT * FROM heartbeats WHERE worker_id = %s
ON CONFLICT (worker_id) DO UPDATE SET pid = EXCLUDED.pid; ROLLBACK
"""


class Observer:
    """Queries supervisord, health and heartbeat of one worker, each with a deadline. For use by one thread."""

    def __init__(
        self,
        name: str,
        worker_id: str,
        supervisor: Supervisor,
        database: Database,
        address: str | None,
        socket_address: str,
        place: Place,
        silence_s: float,
        probe_timeout_s: float,
        database_timeout_s: float,
        clock: Clock,
        stalls: StallDetector,
        on_change: Callable[[], None],
        settings: Callable[[], str] = lambda: "",
        *,
        ask_interval_s: float,
        beats: bool = True,
    ) -> None:
        """`name` is `group:process`. Probes the Unix socket `socket_address`, and, while that is not there, `address`,
        until the heartbeat gives another one: a worker from before it had a socket is not to be taken for dead.

        `place`: where this watchdog, and so its worker, runs. A machine from which nothing was heard for `silence_s`
        does not run any more if it was booted since.

        `on_change` is called from another thread when the worker's health changes. `settings` returns the fingerprint
        of the settings that a worker started now would get, "" if they cannot be read. `ask_interval_s` is the time
        between two requests for its health. `beats` is False for a program without a heartbeat.
        """
        # The last process seen that supervisord started for this worker.
        self.leader: Leader | None = None
        # The heartbeat row as last read.
        self.seen: SeenBeat | None = None
        self._name = name
        self._worker_id = worker_id
        self._supervisor = supervisor
        self._database = database
        self._address = address
        self._socket_address = socket_address
        self._socket = Path(unquote(socket_address.removeprefix("unix:")))
        self._has_port = address != socket_address
        self._place = place
        self._silence_s = silence_s
        self._probe_timeout_s = probe_timeout_s
        self._database_timeout_s = database_timeout_s
        self._clock = clock
        self._stalls = stalls
        self._on_change = on_change
        self._settings = settings
        self._ask_interval_s = ask_interval_s
        self._beats = beats
        # Incarnation of the last process that supervisord had.
        self._incarnation = ""
        self._probe: Probe | None = None
        # Reads run in a thread, so that a frozen Postgres does not hold up the guard.
        self._reader = ThreadPoolExecutor(1, thread_name_prefix=f"read-{worker_id}")
        self._reading: Future[tuple[float, SeenBeat | None]] | None = None
        self._is_database_away = False
        self._database_since_s: float | None = None
        self._is_schema_there = False

    def process(self) -> Process | None:
        """Returns the process as supervisord reports it; None when supervisord is away."""
        try:
            info = self._supervisor.info(self._name)
        except (SupervisorAwayError, RefusedError):
            return None
        if not info.pid:
            return Process(info.state, cause=info.cause, exit_status=info.exit_status)
        leader = processes.leader(info.pid)
        if leader is not None:
            self.leader = leader
        return Process(info.state, info.pid, leader.age_s if leader else 0.0)

    def observe(self) -> Evidence:
        """Returns all evidence but intent and pause, which only the guard knows."""
        process = self.process()
        up_s, seen = self._look_into_database()
        heartbeat, failed, has_served, taken_by = None, None, False, ""
        if seen is not None:
            self.seen = seen
            beat = seen.beat
            pid = process.pid if process else 0
            is_running = processes.is_running(Leader(beat.pid, beat.start_ticks))
            # The process itself is proof, whatever has become of the file with the machine's id.
            is_here = bool(is_running) and beat.place.pid_space == self._place.pid_space != ""
            is_ours = is_here or identity.is_ours(seen, self._place)
            is_current = is_ours and bool(pid) and (beat.pid == pid or processes.is_in_group(beat.pid, pid))
            if not is_current:
                taken_by = identity.taken_by(seen, self._place, is_running, self._silence_s)
            heartbeat = Heartbeat(
                seen.age_s, beat.phase, is_current, str(beat.incarnation), *heartbeats.failure(beat).values()
            )
            if is_current:
                self._incarnation = heartbeat.incarnation
            if is_current and self._has_port:
                self._address = beat.address
            is_last = is_ours and process is not None and not pid and self._is_last(heartbeat.incarnation, beat.pid)
            if is_current or is_last:
                failed, has_served = failed_start(seen, has_ended=not is_current), seen.has_served
        health = self._ask() if process is not None and process.state is State.RUNNING else ProbeAnswer.NOT_PROBED
        stalled_until_s = self._stalls.since_s()
        return Evidence(
            self._clock.monotonic(),
            process,
            health,
            up_s,
            heartbeat,
            beats=self._beats,
            failed_start=failed,
            has_served=has_served,
            settings=self._settings(),
            stalled_until_s=stalled_until_s,
            name_taken_by=taken_by,
        )

    def _is_last(self, incarnation: str, pid: int) -> bool:
        """True for a heartbeat of the process that has just ended, rather than of one before it."""
        return incarnation == self._incarnation or (self.leader is not None and pid == self.leader.pid)

    def close(self) -> None:
        """Stops the probe and the reader."""
        self._reader.shutdown(wait=False, cancel_futures=True)
        self._close_probe()

    def _close_probe(self) -> None:
        if self._probe is not None:
            self._probe.close()

    def _ask(self) -> ProbeAnswer:
        address = self._socket_address if self._socket.exists() else self._address
        if address is None:
            return ProbeAnswer.NOT_PROBED
        if self._probe is None or self._probe.address != address:
            self._close_probe()
            self._probe = Probe(address, self._on_change, self._ask_interval_s)
        return self._probe.check(self._probe_timeout_s)

    def _look_into_database(self) -> tuple[float | None, SeenBeat | None]:
        """Returns how long Postgres has been reachable (None: it is away), and the heartbeat."""
        try:
            up_s, seen = self._read()
        except (*DATABASE_ERRORS, TimeoutError):
            self._is_database_away = True
            return None, None
        if self._is_database_away:
            self._is_database_away = False
            self._database_since_s = self._clock.monotonic()
        if self._database_since_s is not None:
            up_s = min(up_s, self._clock.monotonic() - self._database_since_s)
        return up_s, seen

    def _read(self) -> tuple[float, SeenBeat | None]:
        """Reads uptime and heartbeat. Raises TimeoutError, at once while an earlier read is still waiting."""
        if self._reading is not None and not self._reading.done():
            raise TimeoutError
        self._reading = self._reader.submit(self._look_in)
        return self._reading.result(self._database_timeout_s)

    def _look_in(self) -> tuple[float, SeenBeat | None]:
        """What `_look` returns. Fails too if the worker, which may have lost its session, would get no other."""
        up_s, seen = self._database.call(self._look)
        if self._beats and (seen is None or seen.age_s > self._silence_s):
            self._database.check_new()
        return up_s, seen

    def _look(self, db: peewee.PostgresqlDatabase) -> tuple[float, SeenBeat | None]:
        """Uptime and heartbeat. Fails if the worker cannot beat either: Postgres accepts no writes, a right is missing,
        a migration runs, which may take minutes, or somebody has locked the row.
        """
        if not self._is_schema_there:
            schema.check(db)
            self._is_schema_there = True
        db.execute_sql(CAN_BEAT, (self._worker_id,))
        return recoveries.uptime_s(db), next(iter(heartbeats.read(db, self._worker_id)), None)
