"""Opens sessions of Postgres with the settings that our statements need, and detects where that is impossible."""

import contextlib
import functools
import weakref
from collections.abc import Mapping
from typing import Any

import peewee
import psycopg2

from service.database_url import parse
from service.db import certificates, standby
from service.db.availability import DatabaseUnfitError
from service.db.deadlines import Deadlines
from service.db.servers import Servers, divided

# Attempts to detect a pooler that lends sessions out between statements. Several, because others use it too.
POOLER_ROUNDS = 4
# A pooler may keep a connection waiting until a session is free.
LOOK_TIMEOUT_S = 10.0

# What every session gets, whatever else is configured, because our statements depend on it. Not
# standard_conforming_strings: psycopg2 reads it when it connects, and quotes accordingly from then on.
SETTINGS = {
    "timezone": "UTC",
    "datestyle": "ISO, YMD",
    "intervalstyle": "postgres",
    "bytea_output": "hex",
    "extra_float_digits": "1",
    "transform_null_equals": "off",
    "array_nulls": "on",
    # Functions that rule out sorting and reading whole tables have plans that, before Postgres 18, cost ten billion: a
    # server with LLVM would compile each of them, for some 0.2 s a claim.
    "jit": "off",
    # No part of a statement, such as a prompt, comes back as a notice.
    "client_min_messages": "warning",
    # Migrations make tables whose rows are updated, which those of column stores are not.
    "default_table_access_method": "heap",
    "default_transaction_isolation": "read committed",
    "default_transaction_deferrable": "off",
    # Postgres ends the session of a client that vanished, and releases its locks, within about a minute.
    "tcp_keepalives_idle": "30",
    "tcp_keepalives_interval": "10",
    "tcp_keepalives_count": "3",
    "tcp_user_timeout": "60000",
    # Rows that a policy would hide are an error: a batch never looks smaller than it is.
    "row_security": "off",
}
# Settings that older servers lack, with the version that introduced them.
NEWER = {"idle_session_timeout": ("0", 140000), "transaction_timeout": ("0", 170000)}
# How often Postgres looks, while a statement runs, whether the client is still there. Otherwise the statement of one
# that died runs to its end, and holds its locks until then.
CLIENT_CHECK, CLIENT_CHECK_MS, CLIENT_CHECK_SINCE = "client_connection_check_interval", "10000", 140000
# The one setting of durability that a role may have weakened; stronger ones stay.
DURABLE = """
SELECT pg_catalog.set_config('synchronous_commit', 'on', false)
WHERE pg_catalog.current_setting('synchronous_commit') = 'off'
"""

# Keep statements, and the prompts and results in them, out of the server's log, which records failed ones: for
# superusers, and roles that were granted it (GRANT SET ON PARAMETER, since version 15).
QUIET = {"log_min_error_statement": "panic", "log_error_verbosity": "terse"}
MAY_SET = (
    "WHERE pg_catalog.current_setting('is_superuser') = 'on'",
    "WHERE pg_catalog.has_parameter_privilege(%s, 'SET')",
)
PRIVILEGES_SINCE = 150000

# Where tables would be made; the first schema of the path that there is, even if the role may not use it; and where our
# tables are found. A worker would begin anew in the first, beside what is in another, as when somebody makes a schema
# that has the role's name.
LOOK = """
SELECT pg_catalog.current_setting('search_path'), pg_catalog.current_schema(),
       (SELECT n.nspname
        FROM pg_catalog.regexp_matches(pg_catalog.current_setting('search_path'), '"(?:[^"]|"")*"|[^", ]+', 'g')
             WITH ORDINALITY AS p (part, place)
        CROSS JOIN LATERAL (SELECT CASE WHEN part[1] OPERATOR(pg_catalog.~) '^"'
            THEN pg_catalog.replace(pg_catalog.substr(part[1], 2, pg_catalog.length(part[1]) - 2), '""', '"')
            ELSE pg_catalog.lower(part[1]) END) AS read (name)
        JOIN pg_catalog.pg_namespace n ON n.nspname = CASE name WHEN '$user' THEN current_user ELSE name END
        ORDER BY place LIMIT 1),
       (SELECT n.nspname FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
        WHERE c.oid = pg_catalog.to_regclass('schema_floor')),
       pg_catalog.current_setting('session_replication_role'),
       (SELECT setting::bigint FROM pg_catalog.pg_settings WHERE name = 'temp_file_limit')
"""
# Storing a group of results takes about three times their size in temporary files.
LEAST_TEMPORARY_KB = 256 << 10

# For statements sent while a session is opened, before the caller's own deadline applies.
_deadlines = Deadlines()
# Databases that no pooler lends out. To find out may take a connection more, so it is done once.
_unshared: weakref.WeakSet[peewee.PostgresqlDatabase] = weakref.WeakSet()


def parameters(url: str, name: str, timeout_s: float) -> dict[str, Any]:
    """The parameters for connecting to a URL: its own, and ours, which it cannot override. Raises UrlError."""
    given = certificates.with_system_authorities(parse(url))
    if len(divided(given)) > 1:
        given["target_session_attrs"] = "read-write"
    return given | {
        "application_name": f"vllm-batch-{name}",
        "client_encoding": "UTF8",
        # TCP detects a peer that vanished silently: deadlines kept by the server are of no use then.
        "tcp_user_timeout": round(timeout_s * 1000),
        "keepalives": 1,
        "keepalives_idle": 10,
        "keepalives_interval": 5,
        "keepalives_count": 3,
    }


def open_session(timeout_s: float, is_local: bool = False, **given: Any) -> Any:
    """Opens a psycopg2 connection with `parameters`; each of its statements ends within `timeout_s`.

    Its commits wait for no standby if `is_local`. Its settings are not passed as `options` when connecting: that would
    replace the user's options, and poolers refuse it. Raises psycopg2's errors, DatabaseAwayError, DatabaseUnfitError.
    """
    connection = servers(given).connect(given, timeout_s)
    try:
        with _deadlines.within(connection, timeout_s):
            _prepare(connection, timeout_s, is_local)
    except BaseException:
        connection.close()
        raise
    return connection


def servers(given: Mapping[str, Any]) -> Servers:
    """The servers of these parameters, the same ones for all connections to them."""
    names = ("host", "hostaddr", "port")
    return _servers(*(str(given.get(name, "")) for name in names))


@functools.cache
def _servers(host: str, hostaddr: str, port: str) -> Servers:
    return Servers(divided({"host": host, "hostaddr": hostaddr, "port": port}), _connected)


def _connected(given: Mapping[str, Any], timeout_s: float) -> Any:
    try:
        return psycopg2.connect(**{**given, "connect_timeout": max(2, round(timeout_s))})
    except UnicodeDecodeError as error:
        # Before it knows the client's encoding, a server refuses in that of its own language.
        told = error.object.decode("latin-1")
    except psycopg2.OperationalError as error:
        told = certificates.explained(str(error), given, timeout_s)
        if not told:
            raise
    # Raised outside the block, because the first error of a chain is reported as the cause.
    raise psycopg2.OperationalError(told)


def _prepare(connection: Any, timeout_s: float, is_local: bool) -> None:
    encoding = connection.info.parameter_status("server_encoding")
    if encoding != "UTF8":
        raise DatabaseUnfitError(
            f"database {connection.info.dbname!r} has the encoding {encoding}, and only UTF8 keeps every text: make one"
            f" with CREATE DATABASE ... ENCODING 'UTF8' TEMPLATE template0"
        )
    connection.autocommit = True
    milliseconds = round(timeout_s * 1000)
    settings = SETTINGS | {
        "lock_timeout": str(milliseconds),
        "idle_in_transaction_session_timeout": str(milliseconds * 6),
    }
    if is_local:
        settings["synchronous_commit"] = standby.LOCAL
    version = connection.info.server_version
    settings |= {name: value for name, (value, since) in NEWER.items() if version >= since}
    with connection.cursor() as cursor:
        # First, and by itself: the role's own timeout may be short.
        cursor.execute("SET statement_timeout = %s", (milliseconds,))
        calls = ", ".join(["pg_catalog.set_config(%s, %s, false)"] * len(settings))
        cursor.execute(f"SELECT {calls}", [part for setting in settings.items() for part in setting])
        cursor.execute(DURABLE)
        for name, value in QUIET.items():
            where, asked = (MAY_SET[1], [name]) if version >= PRIVILEGES_SINCE else (MAY_SET[0], [])
            cursor.execute(f"SELECT pg_catalog.set_config(%s, %s, false) {where}", [name, value, *asked])
        # After QUIET, and by itself: a server whose kernel does not report closed connections refuses it.
        if version >= CLIENT_CHECK_SINCE:
            with contextlib.suppress(psycopg2.DataError, psycopg2.ProgrammingError):
                cursor.execute("SELECT pg_catalog.set_config(%s, %s, false)", (CLIENT_CHECK, CLIENT_CHECK_MS))


def check(db: peewee.PostgresqlDatabase) -> None:
    """Raises DatabaseUnfitError for permanent reasons why we could not work here, or not correctly."""
    standby.check(db)
    path, schema, first, found, triggers, temporary_kb = db.execute_sql(LOOK).fetchone()
    if schema is None or schema.startswith("pg_") or path.strip(' "').startswith("pg_temp"):
        raise DatabaseUnfitError(
            f"the search_path {path!r} begins with no schema that can keep tables: correct it (ALTER ROLE ... SET"
            " search_path), or make that schema"
        )
    if found is None and first not in (None, schema):
        raise DatabaseUnfitError(
            f"the search_path {path!r} begins with schema {first}, which the role may not use: GRANT USAGE ON SCHEMA"
            f" {first}, or leave it out (ALTER ROLE ... SET search_path)"
        )
    if found not in (None, schema):
        raise DatabaseUnfitError(
            f"the search_path {path!r} begins with schema {schema}, and the tables of a stack are in {found}, which is"
            " on it too: begin it with the one to use, and leave out the other (ALTER ROLE ... SET search_path)"
        )
    if triggers == "replica":
        raise DatabaseUnfitError(
            "session_replication_role is replica, with which ended batches send no webhooks: reset it (ALTER ROLE ..."
            " RESET session_replication_role)"
        )
    if 0 <= temporary_kb < LEAST_TEMPORARY_KB:
        raise DatabaseUnfitError(
            f"temp_file_limit is {temporary_kb} kB, and storing results takes up to {LEAST_TEMPORARY_KB} kB: raise it"
            " (ALTER ROLE ... SET temp_file_limit)"
        )
    if db not in _unshared and _is_shared(db):
        raise DatabaseUnfitError(
            "a pooler gives each transaction another session of Postgres, and timeouts are settings of its"
            " session's: use pool_mode=session, or connect to Postgres itself"
        )
    _unshared.add(db)


def _is_shared(db: peewee.PostgresqlDatabase) -> bool:
    """True when a second connection gets the first one's session, or the first gets a different one than before."""
    # Postgres names the session's own process when it connects. A pooler that lends sessions out names something else,
    # by which it finds the session to cancel: only there does the look take a connection more than we may have.
    if db.connection().info.backend_pid == _backend(db.connection()):
        return False
    # Under a name of its own, so that code that ends earlier sessions of a name does not end this one.
    given = db.connect_params | {"application_name": "vllm-batch-look"}
    with contextlib.closing(servers(given).connect(given, LOOK_TIMEOUT_S)) as other:
        other.autocommit = True
        mine, others = set(), set()
        with _deadlines.within(other, LOOK_TIMEOUT_S):
            for _ in range(POOLER_ROUNDS):
                mine.add(_backend(db.connection()))
                others.add(_backend(other))
    return len(mine) > 1 or len(others) > 1 or mine == others


def _backend(connection: Any) -> int:
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_catalog.pg_backend_pid()")
        return int(cursor.fetchone()[0])
