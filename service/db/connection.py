"""Connections to Postgres: pooled, each with deadlines, and the calls that run on them."""

import asyncio
import select
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import peewee
import psycopg2
from playhouse.migrations import Runner
from playhouse.pool import PooledPostgresqlDatabase

from service import metrics
from service.db.deadlines import Deadlines, extend

P = ParamSpec("P")
T = TypeVar("T")

# What says that Postgres is away, as against a statement that it refused.
Unreachable = (peewee.OperationalError, peewee.InterfaceError, psycopg2.OperationalError, psycopg2.InterfaceError)

# Any number that no other program takes as an advisory lock in the same database.
MIGRATION_LOCK = 0x76626174
WORKER_LOCKS = 0x76626175
HOUSEKEEPING_LOCK = 0x76626176


# A call is several statements, each of which has the timeout.
CALL_FACTOR = 3
# What a new version does to old tables may take its time.
MIGRATION_TIMEOUT_S = 600.0


class _Pool(PooledPostgresqlDatabase):  # type: ignore[misc]
    """Hands out no connection that the server has closed while it lay idle, without asking the server each time."""

    _failure: BaseException | None = None
    _failed_s = 0.0

    def _is_closed(self, conn: Any) -> bool:
        if conn.closed:
            return True
        # An idle connection has nothing to read, unless the server said goodbye or the socket is gone. Not select():
        # that takes no descriptor over 1023, of which a gateway with as many clients has some.
        poll = select.poll()
        poll.register(conn, select.POLLIN)
        return bool(poll.poll(0))

    def _connect(self) -> Any:
        asked_s = time.monotonic()
        with self._pool_lock:
            # Who waited while somebody else tried in vain need not wait for the same again.
            if self._failure is not None and self._failed_s > asked_s:
                raise self._failure
            try:
                return super()._connect()
            except Unreachable as error:
                self._failure, self._failed_s = error, time.monotonic()
                raise


def connection_options(name: str, timeout_s: float) -> dict[str, Any]:
    """How to connect: every statement ends within `timeout_s`, as does connecting."""
    milliseconds = round(timeout_s * 1000)
    return {
        "application_name": f"vllm-batch-{name}",
        "connect_timeout": max(2, round(timeout_s)),
        # A peer that vanished without a word is noticed by TCP, as deadlines kept by the server are then no use.
        "tcp_user_timeout": milliseconds,
        "keepalives_idle": 10,
        "keepalives_interval": 5,
        "keepalives_count": 3,
        "options": f"-c statement_timeout={milliseconds} -c lock_timeout={milliseconds}"
        f" -c idle_in_transaction_session_timeout={milliseconds * 6} -c timezone=UTC",
    }


class Database:
    """A pool of connections to one database. Every statement ends within `timeout_s`, as does connecting."""

    def __init__(self, url: str, name: str, timeout_s: float = 10, connections: int = 8) -> None:
        self._pool: peewee.PostgresqlDatabase = _Pool(
            url, max_connections=connections, timeout=timeout_s, **connection_options(name, timeout_s)
        )
        self._threads = ThreadPoolExecutor(connections, thread_name_prefix="database")
        self._deadlines = Deadlines()
        self._timeout_s = timeout_s

    def call(
        self, function: Callable[Concatenate[peewee.PostgresqlDatabase, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Runs `function(connection, ...)` here. Raises one of `Unreachable` when Postgres is away."""
        with (
            metrics.database_call(function.__name__, Unreachable),
            self._pool.connection_context(),
            self._deadlines.within(self._pool.connection(), CALL_FACTOR * self._timeout_s),
        ):
            return function(self._pool, *args, **kwargs)

    def run(
        self, function: Callable[Concatenate[peewee.PostgresqlDatabase, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> asyncio.Future[T]:
        """`function(connection, ...)` in a thread, begun at once, to be awaited.

        Raises one of `Unreachable` when Postgres is away.
        """
        loop = asyncio.get_running_loop()
        return loop.run_in_executor(self._threads, lambda: self.call(function, *args, **kwargs))

    def close(self) -> None:
        """Closes all connections. Calls that are under way end first."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        self._pool.close_all()  # type: ignore[attr-defined]


def connect(url: str, name: str, timeout_s: float) -> peewee.PostgresqlDatabase:
    """One connection outside of any pool, not open yet: for who must keep it. It belongs to one thread."""
    return peewee.PostgresqlDatabase(url, **connection_options(name, timeout_s))


def allow(db: peewee.PostgresqlDatabase, timeout_s: float) -> None:
    """Lets this transaction take longer than others, each of its statements and all of them."""
    extend(timeout_s)
    db.execute_sql("SELECT set_config('statement_timeout', %s, true)", (str(round(timeout_s * 1000)),))


def migrate(db: peewee.PostgresqlDatabase) -> list[str]:
    """Brings the schema up to date, also when several processes start at once. Returns the migrations applied."""
    with db.atomic():
        allow(db, MIGRATION_TIMEOUT_S)
        db.execute_sql("SELECT pg_advisory_xact_lock(%s)", (MIGRATION_LOCK,))
        applied: list[str] = _migrations(db).up()
    return applied


def check_schema(db: peewee.PostgresqlDatabase) -> None:
    """Raises one of `Unreachable` until somebody has brought the schema up to date: for who may not do so."""
    missing = [migration.name for migration in _migrations(db).status() if not migration.applied]
    if missing:
        raise peewee.OperationalError(f"the schema waits for {missing[0]}: a worker or the watchdog brings it")


def is_without_schema(error: Exception) -> bool:
    """True for a statement that found no table: the schema has not been brought yet."""
    return isinstance(getattr(error, "orig", None), psycopg2.errors.UndefinedTable)


def _migrations(db: peewee.PostgresqlDatabase) -> Runner:
    return Runner(db, directory=str(Path(__file__).parent / "migrations"))


def lock_worker(db: peewee.PostgresqlDatabase, worker_id: str) -> bool:
    """Takes the lock of a worker's identity for as long as this connection lives. False: another process has it."""
    row = db.execute_sql("SELECT pg_try_advisory_lock(%s, hashtext(%s))", (WORKER_LOCKS, worker_id)).fetchone()
    return bool(row[0])


def end_earlier_sessions(db: peewee.PostgresqlDatabase) -> int:
    """Ends other sessions under the application_name of this one. Returns how many there were.

    For a name that one process alone uses: Postgres, frozen for a while, may not have noticed yet that an earlier
    connection of this process is gone, and still keeps what that one had locked.
    """
    rows = db.execute_sql(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE application_name = current_setting('application_name') AND pid <> pg_backend_pid()"
    )
    return len(rows.fetchall())


def lock_housekeeping(db: peewee.PostgresqlDatabase) -> bool:
    """Takes the lock of the housekeeper for this transaction. False: another has it."""
    row = db.execute_sql("SELECT pg_try_advisory_xact_lock(%s)", (HOUSEKEEPING_LOCK,)).fetchone()
    return bool(row[0])
