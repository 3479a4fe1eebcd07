"""Checks whether a Postgres is usable: it answers, is new enough, accepts writes, and lets us create tables."""

import re
from dataclasses import dataclass, replace

import peewee

from scripts.prerequisites import Finding
from service.db import connection, schema, sessions
from service.db.availability import DATABASE_ERRORS, DatabaseUnfitError

# The first with gen_random_uuid() built in.
OLDEST = 13
TIMEOUT_S = 5.0
FACTS = """
SELECT current_setting('server_version_num')::int / 10000, pg_is_in_recovery(), current_user, current_database(),
       CASE WHEN to_regclass('batches') IS NULL THEN has_schema_privilege(current_schema(), 'CREATE')
            ELSE has_table_privilege('batches', 'INSERT, UPDATE, DELETE') END,
       least(current_setting('max_connections')::int,
             CASE WHEN NOT rolsuper AND rolconnlimit >= 0 THEN rolconnlimit END,
             CASE WHEN NOT rolsuper AND datconnlimit >= 0 THEN datconnlimit END)
FROM pg_roles, pg_database WHERE rolname = session_user AND datname = current_database()
"""
# Of our tables and sequences, those that the role may not use as it likes, and those of which a policy hides rows.
NOT_OURS = """
SELECT coalesce(string_agg(name, ', ' ORDER BY name) FILTER (WHERE CASE relkind
           WHEN 'S' THEN NOT has_sequence_privilege(name, 'USAGE')
           ELSE NOT has_table_privilege(name, 'SELECT') OR NOT has_table_privilege(name, 'INSERT')
                OR NOT has_table_privilege(name, 'UPDATE') OR NOT has_table_privilege(name, 'DELETE') END), ''),
       coalesce(string_agg(name, ', ' ORDER BY name) FILTER (WHERE relkind <> 'S' AND row_security_active(name)), '')
FROM unnest(%s) AS name JOIN pg_class c ON c.oid = to_regclass(name)
"""
# Since Postgres 15: a system library that sorts in another order than the one with which indexes were made.
COLLATION = """
SELECT datcollversion, pg_database_collation_actual_version(oid) FROM pg_database WHERE datname = current_database()
"""
COLLATION_SINCE = 15
# What a host takes at most, and at rest (docs/capacity.md).
CONNECTIONS, CONNECTIONS_AT_REST = 12, 5


@dataclass(frozen=True)
class Database:
    """What a server reports about itself. `error`: why it could not be queried. `unfit`: what has to be changed."""

    error: str = ""
    version: int = 0
    is_standby: bool = False
    user: str = ""
    name: str = ""
    may_write: bool = False
    # How many connections the user may have in this database.
    connections: int = CONNECTIONS
    unfit: str = ""
    # Of our tables and sequences: those that the user may not use, and those of which a policy hides rows.
    lacking: str = ""
    hidden: str = ""
    # The collation version with which the database was made, and the server's, if they differ.
    collations: str = ""


def judge(found: Database, setting: str) -> Finding:
    """Checks whether the server that a setting names is usable."""
    if found.error:
        fix = f"correct {setting}, or start that server (pg_isready shows whether it listens)"
        if re.search(r"certificate|SSL", found.error):
            fix = f"correct the server's TLS, or host, sslmode and sslrootcert in {setting}"
        return Finding("postgres", problem=f"{setting}: {found.error}", fix=fix)
    if found.unfit:
        problem, _, fix = found.unfit.partition(": ")
        return Finding("postgres", problem=f"{setting}: {problem}", fix=fix)
    if found.version < OLDEST:
        problem = f"{setting}: Postgres {found.version} is too old"
        return Finding("postgres", problem=problem, fix=f"use Postgres {OLDEST} or newer")
    if found.is_standby:
        problem = f"{setting}: the server is a standby and accepts no writes"
        return Finding("postgres", problem=problem, fix="use the primary (target_session_attrs=read-write)")
    if not found.may_write:
        problem = f"{setting}: {found.user} may not create or change tables in {found.name}"
        fix = f'psql {found.name} -c "GRANT CREATE ON SCHEMA public TO {found.user}" (as the owner)'
        return Finding("postgres", problem=problem, fix=fix)
    if found.hidden:
        problem = f"{setting}: row-level security hides rows from {found.user}, which is an error: {found.hidden}"
        fix = f"ALTER TABLE ... NO FORCE ROW LEVEL SECURITY, or ALTER ROLE {found.user} BYPASSRLS"
        return Finding("postgres", problem=problem, fix=fix)
    # The gateway's own role has the rights that conf/gateway-role.sql grants.
    if found.lacking and setting == "DATABASE_URL":
        problem = f"{setting}: {found.user} may not read and write {found.lacking}"
        fix = f"REASSIGN OWNED BY ... TO {found.user} (as a superuser): upgrades change tables"
        return Finding("postgres", problem=problem, fix=fix)
    if found.connections < CONNECTIONS and setting == "DATABASE_URL":
        problem = f"{setting}: {found.user} may have {found.connections} connections to {found.name}"
        fix = f"allow each host {CONNECTIONS} (ALTER ROLE or ALTER DATABASE ... CONNECTION LIMIT, max_connections)"
        is_blocking = found.connections < CONNECTIONS_AT_REST
        return Finding("postgres", problem=problem, fix=fix, is_blocking=is_blocking)
    if found.collations:
        problem = f"{setting}: indexes of {found.name} were made with another collation version ({found.collations})"
        fix = f"REINDEX DATABASE {found.name}, then ALTER DATABASE {found.name} REFRESH COLLATION VERSION"
        return Finding("postgres", problem=problem, fix=fix, is_blocking=False)
    return Finding("postgres", f"{setting}: Postgres {found.version}, {found.user} in {found.name}")


def probe(url: str, synchronous_commit: str | None = None) -> Database:
    """Connects once, as the stack does, and queries the server."""
    try:
        connections = connection.Database(url, "doctor", TIMEOUT_S, 1, synchronous_commit)
    except ValueError as error:
        return Database(error=first_line(error))
    try:
        return connections.call(_ask)
    except DatabaseUnfitError as error:
        return Database(unfit=str(error))
    except DATABASE_ERRORS as error:
        return Database(error=first_line(error))
    finally:
        connections.close()


def _ask(db: peewee.PostgresqlDatabase) -> Database:
    sessions.check(db)
    [row] = db.execute_sql(FACTS).fetchall()
    found = Database("", *row)
    if found.may_write:
        # Who may not write may not read this either.
        schema.check_version(db)
    [lists] = db.execute_sql(NOT_OURS, (_tables(),)).fetchall()
    collations = ""
    if found.version >= COLLATION_SINCE:
        [(made, actual)] = db.execute_sql(COLLATION).fetchall()
        collations = f"{made or 'none'}, now {actual or 'none'}" if made != actual else ""
    return replace(found, lacking=lists[0], hidden=lists[1], collations=collations)


def _tables() -> list[str]:
    """The names of our tables and sequences, of which some may not be there yet."""
    texts = [path.read_text() for path in schema.MIGRATIONS.glob("*.py")]
    made = {name for text in texts for name in re.findall(r"CREATE (?:TABLE|SEQUENCE) (\w+)", text)}
    return sorted(made | {"batches_id_seq"})


def first_line(error: Exception) -> str:
    """Returns the cause alone, never the URL, which contains a password."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
