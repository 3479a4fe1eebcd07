"""Connections to Postgres: pooled, each with deadlines, and the calls that run on them."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Concatenate, ParamSpec, TypeVar

import peewee
import psycopg2

from service.db import schema, sessions, standby
from service.db.availability import DatabaseAwayError, database_away, is_away, is_cut, is_read_only
from service.db.deadlines import Deadlines, extend
from service.db.pool import Pool, Postgres, Turns
from service.db.servers import SLOW_S
from service.telemetry import logs, metrics

P = ParamSpec("P")
T = TypeVar("T")

# Any number that no other program uses for advisory locks in the same database.
MIGRATION_LOCK = 0x76626174
HOUSEKEEPING_LOCK = 0x76626176
TENANT_LOCKS = 0x76626177
HOSTS_LOCK = 0x76626178


# A call is several statements, each of which has the timeout.
CALL_FACTOR = 3
# Migrating large tables may take long.
MIGRATION_TIMEOUT_S = 600.0

log = logs.get("database")


class Database:
    """A pool of connections to one database. Every statement ends within `timeout_s`, as does connecting.

    `connections`: the most that are open at once. `synchronous_commit`: what acknowledgements wait for (standby.py).
    """

    def __init__(
        self, url: str, name: str, timeout_s: float = 10, connections: int = 8, synchronous_commit: str | None = None
    ) -> None:
        self._pool = _made(Pool, url, name, timeout_s, synchronous_commit or "")
        self._deadlines = Deadlines()
        self._limit(connections, timeout_s, ())

    def _limit(self, connections: int, timeout_s: float, others: tuple[Turns, ...]) -> None:
        self._turns = (Turns(connections), *others)
        self._threads = ThreadPoolExecutor(connections, thread_name_prefix="database")
        self._timeout_s = timeout_s

    def apart(self, connections: int, timeout_s: float | None = None) -> "Database":
        """At most `connections` of this one's at once, for calls in threads of their own.

        They wait for no others as long as all such limits together stay within this one's.
        """
        other = Database.__new__(Database)
        other._pool, other._deadlines = self._pool, self._deadlines
        other._limit(connections, timeout_s or self._timeout_s, self._turns)
        return other

    def call(
        self, function: Callable[Concatenate[peewee.PostgresqlDatabase, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Runs `function(connection, ...)` in this thread. Raises DatabaseAwayError when Postgres is away."""
        with (
            metrics.database_call(function.__name__, DatabaseAwayError),
            database_away(),
            self._turn(),
            self._pool.connection_context(),
            within(self._deadlines, self._pool, CALL_FACTOR * self._timeout_s),
        ):
            try:
                return function(self._pool, *args, **kwargs)
            except Exception as error:
                if is_away(error):
                    self._drop_connections(error)
                raise

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for turns in self._turns:
                # By then a call that has the turn has ended.
                stack.enter_context(turns.one(CALL_FACTOR * self._timeout_s))
            yield

    def _drop_connections(self, error: Exception) -> None:
        """Closes this thread's connection and, if it broke or its server takes no writes any more, all others.

        What is wrong with it is probably wrong with the others too: each would cost a call its whole deadline, and one
        that is made again would break again.
        """
        pool: peewee.PostgresqlDatabase = self._pool
        connection = pool.connection()
        if connection.closed or is_cut(error) or is_read_only(error):
            self._pool.renew()
        # A new session may reach another server, and sees corrected settings of its role or database.
        with contextlib.suppress(psycopg2.Error):
            connection.close()

    def run(
        self, function: Callable[Concatenate[peewee.PostgresqlDatabase, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> asyncio.Future[T]:
        """Runs `function(connection, ...)` in a thread, started at once. Await the result.

        Raises DatabaseAwayError when Postgres is away.
        """
        loop = asyncio.get_running_loop()
        return loop.run_in_executor(self._threads, lambda: self.call(function, *args, **kwargs))

    def run_idempotent(
        self, function: Callable[Concatenate[peewee.PostgresqlDatabase, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> asyncio.Future[T]:
        """As `run`, for a function that may run twice: if its connection breaks, it runs again over another one."""
        return asyncio.ensure_future(self.retry_once(lambda _: self.run(function, *args, **kwargs)))

    # For a function that changes nothing.
    read = run_idempotent

    async def retry_once(self, call: Callable[[bool], Awaitable[T]]) -> T:
        """The outcome of `call(False)`; of `call(True)` if the connection of that broke: it may have been done already.

        Connections break while Postgres is up, too: a pooler is restarted, an administrator ends sessions. Nobody is
        refused for that. A call that took as long as a statement may take is not made again.

        Raises what the last of them raises.
        """
        until_s = asyncio.get_running_loop().time() + self._timeout_s
        try:
            return await call(False)
        except DatabaseAwayError as error:
            if not is_cut(error) or asyncio.get_running_loop().time() > until_s:
                raise
            cause = str(error)
        answer = await call(True)
        # Not before: in an outage it is of no use, and comes with every call.
        log.info("call_made_again", cause=cause)
        return answer

    def check_new(self) -> None:
        """Raises DatabaseAwayError unless Postgres takes a new session: it may refuse those, and serve the others.

        As when all its connections are in use, or a password was changed. Takes one more than there may be: if it gave
        one back first, it would get the place of that.
        """
        with database_away():
            sessions.open_session(self._timeout_s, **self._pool.connect_params).close()

    def close(self) -> None:
        """Closes all connections. Calls that are under way end first."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        self._pool.close_idle()


def connect(url: str, name: str, timeout_s: float) -> peewee.PostgresqlDatabase:
    """One connection outside any pool, not open yet, for callers that keep it. It belongs to one thread.

    It waits for no standby: it is for heartbeats and leases, which may be lost in a failover.
    """
    return _made(Postgres, url, name, timeout_s, standby.LOCAL)


D = TypeVar("D", bound=Postgres)


def _made(kind: type[D], url: str, name: str, timeout_s: float, synchronous_commit: str) -> D:
    # Not the database's name, which libpq may take from a service file.
    database = kind("as libpq has it", **sessions.parameters(url, name, timeout_s))
    database.session_timeout_s = timeout_s
    database.synchronous_commit = synchronous_commit
    return database


def within(
    deadlines: Deadlines, db: peewee.PostgresqlDatabase, timeout_s: float
) -> contextlib.AbstractContextManager[None]:
    """Cuts this thread's connection unless the block ends within `timeout_s`.

    While the block takes long, looks for another server that takes writes: this one may be gone or frozen.
    """
    given = db.connect_params
    found = sessions.servers(given)
    return deadlines.within(db.connection(), timeout_s, SLOW_S, lambda: found.look(given, timeout_s / CALL_FACTOR))


def allow(db: peewee.PostgresqlDatabase, timeout_s: float) -> None:
    """Gives this transaction more time than others, for each of its statements and in total."""
    extend(timeout_s)
    db.execute_sql("SELECT set_config('statement_timeout', %s, true)", (str(round(timeout_s * 1000)),))


def migrate(db: peewee.PostgresqlDatabase) -> list[str]:
    """Brings the schema up to date, also when several processes start at once. Returns the migrations applied.

    Raises DatabaseUnfitError.
    """
    sessions.check(db)
    with db.atomic():
        allow(db, MIGRATION_TIMEOUT_S)
        db.execute_sql("SELECT pg_advisory_xact_lock(%s)", (MIGRATION_LOCK,))
        return schema.migrate(db)


def check_schema(db: peewee.PostgresqlDatabase) -> None:
    """Raises DatabaseAwayError until another process has migrated the schema. For processes that may not do so.

    Raises DatabaseUnfitError.
    """
    sessions.check(db)
    schema.check(db)


def lock_tenant(db: peewee.PostgresqlDatabase, tenant: str) -> None:
    """Takes the lock of a tenant's queue for this transaction, once others have given it back."""
    db.execute_sql("SELECT pg_advisory_xact_lock(%s, hashtext(%s))", (TENANT_LOCKS, tenant))


def lock_housekeeping(db: peewee.PostgresqlDatabase) -> bool:
    """Takes the housekeeping lock for this transaction. False: another process has it."""
    row = db.execute_sql("SELECT pg_try_advisory_xact_lock(%s)", (HOUSEKEEPING_LOCK,)).fetchone()
    return bool(row[0])


def lock_hosts(db: peewee.PostgresqlDatabase) -> bool:
    """Takes the lock on reporting what is lost for this transaction. False: another watchdog has it."""
    row = db.execute_sql("SELECT pg_try_advisory_xact_lock(%s)", (HOSTS_LOCK,)).fetchone()
    return bool(row[0])
