"""What is to be seen of one worker. What cannot be seen is evidence too, not an error."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import peewee

from service import processes
from service.clock import Clock
from service.db import heartbeats, recoveries
from service.db.connection import Database
from service.db.heartbeats import SeenBeat
from service.processes import Leader
from watchdog.awake import Awake
from watchdog.health import Probe
from watchdog.policy import Evidence, Health, Heartbeat, Process, State
from watchdog.record import AWAY
from watchdog.supervisor import RefusedError, Supervisor, SupervisorAwayError


class Observer:
    """Looks at one worker: supervisord, health, heartbeat, each with a deadline. Used by one thread."""

    def __init__(
        self,
        name: str,
        worker_id: str,
        supervisor: Supervisor,
        database: Database,
        address: str | None,
        probe_timeout_s: float,
        database_timeout_s: float,
        clock: Clock,
        awake: Awake,
        on_change: Callable[[], None],
    ) -> None:
        """`name` as `group:process`; `address` is asked as long as the heartbeat does not name another, or always
        if it is a Unix socket.

        `on_change` is called from another thread when the worker's health changes.
        """
        # The first process of the worker's present or last life, as far as it was seen.
        self.leader: Leader | None = None
        # Its heartbeat row, as it was read last.
        self.seen: SeenBeat | None = None
        self._name = name
        self._worker_id = worker_id
        self._supervisor = supervisor
        self._database = database
        self._address = address
        self._has_socket = address is not None and address.startswith("unix:")
        self._probe_timeout_s = probe_timeout_s
        self._database_timeout_s = database_timeout_s
        self._clock = clock
        self._awake = awake
        self._on_change = on_change
        self._probe: Probe | None = None
        # A frozen Postgres holds up who asks it for long: not us, who have a worker to look at.
        self._reader = ThreadPoolExecutor(1, thread_name_prefix=f"read-{worker_id}")
        self._reading: Future[tuple[float, SeenBeat | None]] | None = None
        self._is_database_away = False
        self._database_since_s: float | None = None

    def process(self) -> Process | None:
        """The process as supervisord has it; None when supervisord is away."""
        try:
            info = self._supervisor.info(self._name)
        except (SupervisorAwayError, RefusedError):
            return None
        if not info.pid:
            return Process(info.state)
        leader = processes.leader(info.pid)
        if leader is not None:
            self.leader = leader
        return Process(info.state, info.pid, leader.age_s if leader else 0.0)

    def observe(self) -> Evidence:
        """Everything, without what only the guard knows: intent and pause."""
        process = self.process()
        up_s, seen = self._look_into_database()
        heartbeat = None
        if seen is not None:
            self.seen = seen
            beat = seen.beat
            pid = process.pid if process else 0
            is_current = bool(pid) and (beat.pid == pid or processes.is_in_group(beat.pid, pid))
            heartbeat = Heartbeat(seen.age_s, beat.phase, is_current, str(beat.incarnation))
            if is_current and not self._has_socket:
                self._address = beat.address
        health = self._ask() if process is not None and process.state is State.RUNNING else Health.NOT_PROBED
        awake_since_s = self._awake.since_s()
        return Evidence(self._clock.monotonic(), process, health, up_s, heartbeat, awake_since_s=awake_since_s)

    def close(self) -> None:
        """Ends watching."""
        self._reader.shutdown(wait=False, cancel_futures=True)
        self._close_probe()

    def _close_probe(self) -> None:
        if self._probe is not None:
            self._probe.close()

    def _ask(self) -> Health:
        if self._address is None:
            return Health.NOT_PROBED
        if self._probe is None or self._probe.address != self._address:
            self._close_probe()
            self._probe = Probe(self._address, self._on_change)
        return self._probe.check(self._probe_timeout_s)

    def _look_into_database(self) -> tuple[float | None, SeenBeat | None]:
        """How long Postgres has been there for us, and the heartbeat."""
        try:
            up_s, seen = self._read()
        except (*AWAY, TimeoutError):
            self._is_database_away = True
            return None, None
        if self._is_database_away:
            self._is_database_away = False
            self._database_since_s = self._clock.monotonic()
        if self._database_since_s is not None:
            up_s = min(up_s, self._clock.monotonic() - self._database_since_s)
        return up_s, seen

    def _read(self) -> tuple[float, SeenBeat | None]:
        """Raises TimeoutError: at once, as long as an earlier question is still waiting for its answer."""
        if self._reading is not None and not self._reading.done():
            raise TimeoutError
        self._reading = self._reader.submit(self._database.call, _read, self._worker_id)
        return self._reading.result(self._database_timeout_s)


def _read(db: peewee.PostgresqlDatabase, worker_id: str) -> tuple[float, SeenBeat | None]:
    return recoveries.uptime_s(db), next(iter(heartbeats.read(db, worker_id)), None)
