"""Databases with unusual settings: what a session can override is overridden or harmless, the rest is rejected."""

import json
import os
import re
import socket
import struct
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg2
import pytest

from scripts.doctor import database as doctor
from service.database_url import parse
from service.db import chunks, heartbeats, recoveries, results, sessions
from service.db.availability import DatabaseAwayError, DatabaseUnfitError
from service.db.batches import get
from service.db.connection import Database, check_schema, migrate
from service.db.heartbeats import Beat
from service.db.results import Result
from tests.support.batches import finished, refused
from tests.support.servers import Stack
from tests.support.store import holder, stored
from tests.support.waiting import until
from vllm_batch import Client

ROOT = Path(__file__).resolve().parents[2]
TEXT = "naïve 東京 🚀 \\u00e9 \\ ' \" back\\\\slash \u2028"


@contextmanager
def made(postgres: str, options: str) -> Iterator[str]:
    """A database created with these options."""
    name = f"test_{uuid.uuid4().hex}"
    admin = psycopg2.connect(postgres % "postgres")
    admin.autocommit = True
    with admin.cursor() as cursor:
        cursor.execute(f"CREATE DATABASE {name} {options} TEMPLATE template0")
        yield postgres % name
        cursor.execute(f"DROP DATABASE {name} WITH (FORCE)")
    admin.close()


def run(url: str, module: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    kept = {k: v for k, v in os.environ.items() if not k.startswith("BATCH_")}
    env = kept | {"BATCH_ENV_FILE": "/dev/null", "DATABASE_URL": url, "BATCH_ENGINE": "simulated"}
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("encoding", ["SQL_ASCII", "LATIN1", "EUC_JP", "WIN1252", "EUC_KR"])
def test_other_encodings_are_refused(postgres: str, encoding: str) -> None:
    """A database that is not UTF8 is rejected by every check, with the remedy, and nothing is stored."""
    with made(postgres, f"ENCODING '{encoding}' LC_COLLATE 'C' LC_CTYPE 'C'") as url:
        database = Database(url, "test")
        for ask in (migrate, check_schema):
            with pytest.raises(DatabaseUnfitError, match=f"has the encoding {encoding}, and only UTF8"):
                database.call(ask)
        database.close()
        finding = doctor.judge(doctor.probe(url), "DATABASE_URL")
        assert f"the encoding {encoding}, and only UTF8" in finding.problem
        assert "ENCODING 'UTF8'" in finding.fix
        with psycopg2.connect(url) as connection, connection.cursor() as cursor:
            cursor.execute("SELECT count(*) FROM pg_class WHERE relnamespace = 'public'::regnamespace")
            assert cursor.fetchone() == (0,)


def test_processes_refuse_another_encoding(postgres: str, tmp_path: Path) -> None:
    """On a database that is not UTF8, worker and gateway exit with the cause, and the watchdog's check reports it."""
    with made(postgres, "ENCODING 'SQL_ASCII' LC_COLLATE 'C' LC_CTYPE 'C'") as url:
        stack = Stack(url, tmp_path, 10_050, [])
        try:
            for server in (stack.gateway(), stack.worker()):
                until(lambda server=server: server.process.poll() is not None, "the process to end")  # type: ignore[misc]
                assert server.process.returncode == 1
                [failed] = server.events("start_failed")
                assert "has the encoding SQL_ASCII, and only UTF8 keeps every text" in str(failed["cause"])
        finally:
            stack.end()
        checked = run(url, "watchdog", "--check")
        assert checked.returncode == 1
        assert "Postgres cannot be used: database" in checked.stderr


# What else may be in a database, and what Postgres then says of a migration.
OTHERS = {
    "a table": ("CREATE TABLE files (id int)", "relation .files. already exists"),
    "a view": ("CREATE VIEW hosts AS SELECT 1", "relation .hosts. already exists"),
    "a type": ("CREATE TYPE batches AS (id int)", "relation .batches. already exists"),
    "a table of migrations": ("CREATE TABLE schema_migration (version text)", "column .* does not exist"),
    "a trigger": (
        "CREATE FUNCTION no() RETURNS event_trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'ask a DBA first'; END $$;"
        "CREATE EVENT TRIGGER no ON ddl_command_end WHEN TAG IN ('CREATE INDEX') EXECUTE FUNCTION no()",
        "ask a DBA first",
    ),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_what_others_have_made_in_the_database(postgres: str, kind: str) -> None:
    """A database in which no migration can succeed is rejected with the cause, and left as it was."""
    statement, cause = OTHERS[kind]
    with made(postgres, "ENCODING 'UTF8'") as url:
        with psycopg2.connect(url) as connection, connection.cursor() as cursor:
            cursor.execute(statement)
            cursor.execute("SELECT count(*) FROM pg_class")
            before = cursor.fetchone()
        database = Database(url, "test")
        with pytest.raises(DatabaseUnfitError, match=f"cannot be (applied|read) .*{cause}.*a schema that is its own"):
            database.call(migrate)
        database.close()
        with psycopg2.connect(url) as connection, connection.cursor() as cursor:
            cursor.execute("SELECT count(*) FROM pg_class")
            assert cursor.fetchone() == before


def test_tables_of_another_owner(postgres: str) -> None:
    """A role that may use the tables but not change them is told so at the first migration that it would have to do."""
    name = f"test_{uuid.uuid4().hex}"
    with made(postgres, "ENCODING 'UTF8'") as url:
        owner = Database(url, "test")
        last = owner.call(migrate)[-1]
        owner.call(lambda db: db.execute_sql("DELETE FROM schema_migration WHERE name = %s", (last,)))
        owner.call(lambda db: db.execute_sql(f"CREATE ROLE {name} LOGIN"))
        owner.call(lambda db: db.execute_sql(f"GRANT ALL ON ALL TABLES IN SCHEMA public TO {name}"))
        database = Database(url.replace("user=postgres", f"user={name}"), "test")
        told = f"migration {last} cannot be applied .(must be owner of|permission denied)"
        with pytest.raises(DatabaseUnfitError, match=told):
            database.call(migrate)
        database.close()
        owner.call(lambda db: db.execute_sql(f"DROP OWNED BY {name}; DROP ROLE {name}"))
        owner.close()


def test_a_worker_ends_where_others_have_its_tables(postgres: str, tmp_path: Path) -> None:
    """A worker whose migrations cannot succeed ends with the cause instead of waiting for a change."""
    with made(postgres, "ENCODING 'UTF8'") as url:
        with psycopg2.connect(url) as connection, connection.cursor() as cursor:
            cursor.execute("CREATE TABLE batches (id int)")
        stack = Stack(url, tmp_path, 10_050, [])
        try:
            worker = stack.worker()
            until(lambda: worker.process.poll() is not None, "the worker to end")
            assert worker.process.returncode == 1
            [failed] = worker.events("start_failed")
            assert "migration 0001_initial cannot be applied" in str(failed["cause"])
        finally:
            stack.end()


@pytest.mark.parametrize("path", ["nowhere", "''", "pg_temp, public", "pg_catalog"])
def test_search_paths_without_a_place_for_tables(postgres: str, database_url: str, path: str) -> None:
    """A search_path without a schema for permanent tables is rejected; once corrected, the same process continues."""
    name = parse(database_url)["dbname"]
    database = Database(database_url, "test")
    with psycopg2.connect(postgres % "postgres") as admin, admin.cursor() as cursor:
        cursor.execute(f"ALTER DATABASE {name} SET search_path = {path}")
        admin.commit()
        with pytest.raises(DatabaseUnfitError, match="no schema that can keep tables"):
            database.call(migrate)
        cursor.execute(f"ALTER DATABASE {name} RESET search_path")
        admin.commit()
    database.call(check_schema)
    database.close()


def test_tables_behind_another_schema(postgres: str) -> None:
    """When somebody makes a schema that precedes that of the tables, no second, empty set of them is begun there."""
    role = f"r_{uuid.uuid4().hex[:8]}"
    with made(postgres, "ENCODING 'UTF8'") as url:
        owner = Database(url, "test")
        owner.call(migrate)
        owner.call(lambda db: db.execute_sql(f"CREATE ROLE {role} LOGIN SUPERUSER; CREATE SCHEMA {role}"))
        theirs = url.replace("user=postgres", f"user={role}")
        database = Database(theirs, "test")
        for ask in (migrate, check_schema):
            with pytest.raises(DatabaseUnfitError, match=f"schema {role}, and the tables of a stack are in public"):
                database.call(ask)
        assert "the tables of a stack are in public" in doctor.judge(doctor.probe(theirs), "DATABASE_URL").problem
        owner.call(lambda db: db.execute_sql(f"DROP SCHEMA {role}"))
        database.call(check_schema)
        database.close()
        owner.call(lambda db: db.execute_sql(f"DROP ROLE {role}"))
        owner.close()


@pytest.mark.parametrize("schema", ["mine", "Mine", 'my "own", public'])
def test_a_schema_that_the_role_may_not_use(postgres: str, schema: str) -> None:
    """A role that lacks a right on the schema of its tables does not begin an empty set of them in the next one."""
    role = f"r_{uuid.uuid4().hex[:8]}"
    quoted = '"{}"'.format(schema.replace('"', '""'))
    with made(postgres, "ENCODING 'UTF8'") as url, psycopg2.connect(url) as owner, owner.cursor() as cursor:
        cursor.execute(f"CREATE SCHEMA {quoted}")
        cursor.execute(f"CREATE ROLE {role} LOGIN; GRANT ALL ON SCHEMA public TO {role}")
        cursor.execute(f"ALTER ROLE {role} SET search_path = {quoted}, public")
        owner.commit()
        database = Database(url.replace("user=postgres", f"user={role}"), "test")
        with pytest.raises(
            DatabaseUnfitError, match=re.escape(f"begins with schema {schema}, which the role may not use")
        ):
            database.call(migrate)
        cursor.execute(f"GRANT ALL ON SCHEMA {quoted} TO {role}")
        owner.commit()
        assert database.call(migrate)
        database.close()
        cursor.execute("SELECT DISTINCT schemaname FROM pg_tables WHERE tablename = 'batches'")
        assert cursor.fetchall() == [(schema,)]
        cursor.execute(f"DROP OWNED BY {role}; DROP ROLE {role}")
        owner.commit()


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        # Webhooks would be lost without a word.
        ("session_replication_role = replica", "session_replication_role is replica"),
        ("temp_file_limit = '10MB'", "temp_file_limit is 10240 kB"),
    ],
)
def test_what_only_a_superuser_can_correct(postgres: str, database_url: str, setting: str, told: str) -> None:
    """Settings with which work would be lost or never be stored are rejected until they are corrected."""
    name = parse(database_url)["dbname"]
    database = Database(database_url, "test")
    with psycopg2.connect(postgres % "postgres") as admin, admin.cursor() as cursor:
        cursor.execute(f"ALTER DATABASE {name} SET {setting}")
        admin.commit()
        with pytest.raises(DatabaseUnfitError, match=told):
            database.call(check_schema)
        assert told in doctor.judge(doctor.probe(database_url), "DATABASE_URL").problem
        cursor.execute(f"ALTER DATABASE {name} RESET ALL")
        admin.commit()
    database.call(check_schema)
    round_trip(database)
    database.close()


def test_tables_are_no_column_stores(postgres: str) -> None:
    """Where new tables are kept in another way by default, such as one without updates, ours are as everywhere."""
    with made(postgres, "ENCODING 'UTF8'") as url, psycopg2.connect(url) as admin, admin.cursor() as cursor:
        cursor.execute("CREATE ACCESS METHOD another TYPE TABLE HANDLER heap_tableam_handler")
        cursor.execute(f"ALTER DATABASE {parse(url)['dbname']} SET default_table_access_method = another")
        admin.commit()
        database = Database(url, "test")
        database.call(migrate)
        database.close()
        cursor.execute("SELECT count(*) FROM pg_class c JOIN pg_am a ON a.oid = c.relam WHERE amname = 'another'")
        assert cursor.fetchone() == (0,)


def test_refusals_in_another_encoding() -> None:
    """A server that refuses a connection in its own language and encoding is away, with its words as the cause."""
    words = "FATAL:  Passwort-Authentifizierung für Benutzer »batch« fehlgeschlagen"
    with socket.create_server(("127.0.0.1", 0)) as server:

        def refuse() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(1 << 16)
                fields = f"SFATAL\0C28P01\0M{words[8:]}\0\0".encode("latin-1")
                connection.sendall(b"E" + struct.pack("!i", len(fields) + 4) + fields)

        thread = threading.Thread(target=refuse, daemon=True)
        thread.start()
        database = Database(f"postgresql://batch@127.0.0.1:{server.getsockname()[1]}/a?sslmode=disable", "test")
        with pytest.raises(DatabaseAwayError, match=words):
            database.call(recoveries.uptime_s)
        thread.join()
        database.close()


def test_options_of_the_url_are_kept(postgres: str) -> None:
    """`options=` in the URL takes effect, as with psql, beside our own deadlines."""
    with made(postgres, "ENCODING 'UTF8'") as url:
        with psycopg2.connect(url) as connection, connection.cursor() as cursor:
            cursor.execute("CREATE SCHEMA mine")
        # Also in Heroku's spelling, which peewee takes for a database's name.
        mine = url.replace("postgresql://", "postgres://") + "&options=-c%20search_path%3Dmine%20-c%20work_mem%3D2MB"
        database = Database(mine, "test", 7)
        assert database.call(migrate)
        names = ("search_path", "work_mem", "statement_timeout", "application_name")
        found = database.call(lambda db: [db.execute_sql(f"SHOW {name}").fetchone()[0] for name in names])
        assert found == ["mine", "2MB", "7s", "vllm-batch-test"]
        database.close()
        assert doctor.probe(mine).may_write
        with psycopg2.connect(url) as connection, connection.cursor() as cursor:
            cursor.execute("SELECT DISTINCT schemaname FROM pg_tables WHERE tablename IN ('batches', 'results')")
            assert cursor.fetchall() == [("mine",)]


def round_trip(database: Database) -> None:
    """Stores and reads back a batch, its results in both forms, and a heartbeat, and checks them byte for byte."""
    batch = stored(database, 3, metadata={"text": TEXT})
    worker = holder()
    [chunk] = database.call(chunks.claim, worker, ["tiny"], 1)
    requests = database.call(chunks.unanswered, chunk)
    assert [json.loads(request.body)["x"] for request in requests] == ["a\\b\tc"] * 3
    body = json.dumps({"text": TEXT}, ensure_ascii=False)
    given = [
        Result(chunk.id, batch.id, 0, status_code=200, body=body),
        Result(chunk.id, batch.id, 1, status_code=200, body=json.dumps({"text": TEXT})),
        Result(chunk.id, batch.id, 2, error_code="E", error_message=TEXT, custom_id="c2"),
    ]
    assert database.call(results.write, given, worker.incarnation) == 3
    [span] = database.call(results.divide, "index", "all", batch.id, 0, 1 << 20, False).spans
    page = database.call(results.read_page, "index", "all", batch.id, span)
    assert [result.body for result in page] == [body, json.dumps({"text": TEXT}), None]
    assert page[2].error_message == TEXT
    lines = database.call(results.read_lines, "index", "all", batch.id, span).decode().split("\n")
    assert [json.loads(line)["custom_id"] for line in lines[:3]] == ["c0", "c1", "c2"]
    assert json.loads(lines[0])["response"]["body"]["text"] == TEXT
    assert json.loads(lines[2])["error"]["message"] == TEXT
    done = database.call(get, batch.id)
    assert done is not None
    assert (done.state, done.completed, done.failed, done.metadata) == ("completed", 2, 1, {"text": TEXT})
    assert done.digest == batch.digest
    assert done.end_time is not None
    assert done.end_time.utcoffset() is not None
    assert not done.end_time.utcoffset()
    assert abs(page[0].finish_us / 1e6 - done.end_time.timestamp()) < 60
    # One life, which beats with each setting.
    incarnation = uuid.UUID(int=1)
    assert database.call(heartbeats.write, Beat("w", incarnation, "a:1", "ready", 1, ("tiny",), detail={"cause": TEXT}))
    [seen] = database.call(heartbeats.read, "w")
    assert (seen.beat.incarnation, seen.beat.detail, seen.beat.models) == (incarnation, {"cause": TEXT}, ("tiny",))
    # Not rounded to whole digits.
    assert 0 <= seen.age_s < 60
    assert database.call(recoveries.uptime_s) > 0


# Limits that end a session, as short as someone may set them; and texts that no rule can generate.
GIVEN = {
    "statement_timeout": ["100ms", "0"],
    "lock_timeout": ["1ms", "0"],
    "idle_in_transaction_session_timeout": ["300ms", "0"],
    "idle_session_timeout": ["500ms", "0"],
    "transaction_timeout": ["300ms", "0"],
    "TimeZone": ["Asia/Kathmandu", "America/St_Johns"],
    "DateStyle": ["German, DMY", "SQL, MDY"],
    "client_encoding": ["LATIN1", "EUC_JP"],
    "search_path": ['"$user", public', "public, pg_catalog"],
    "lc_messages": ["C"],
    "lc_monetary": ["C"],
    "lc_numeric": ["C"],
    "lc_time": ["C"],
    "default_text_search_config": ["pg_catalog.german"],
    "default_tablespace": ["pg_default"],
    "temp_tablespaces": ["pg_default"],
    "timezone_abbreviations": ["Australia", "India"],
    "default_table_access_method": ["heap"],
    "application_name": ["x"],
    # Its greatest depends on the machine.
    "max_stack_depth": ["100kB", "2MB"],
}
# Settings that a role cannot have, or that do not concern us. Read-only has tests of its own.
LEFT_OUT = {"transaction_isolation", "transaction_read_only", "transaction_deferrable", "default_transaction_read_only"}
LEFT_OUT |= {"role", "session_authorization", "seed", "local_preload_libraries", "log_statement_sample_rate"}
# These are refused, by tests of their own; the last cannot be on together with those of the parts of a statement.
LEFT_OUT |= {"session_replication_role", "temp_file_limit", "log_statement_stats"}


def hostile(cursor: object, which: int) -> dict[str, str]:
    """Every setting that a role or database can have, not at its default: with the least value, or the greatest."""
    cursor.execute(  # type: ignore[attr-defined]
        "SELECT name, vartype, boot_val, enumvals, min_val, max_val FROM pg_settings"
        " WHERE context IN ('user', 'superuser')"
    )
    found = {}
    for name, kind, default, values, least, most in cursor.fetchall():  # type: ignore[attr-defined]
        if name in LEFT_OUT:
            continue
        if name in GIVEN:
            found[name] = GIVEN[name][which % len(GIVEN[name])]
        elif kind == "bool":
            found[name] = "off" if default == "on" else "on"
        elif kind == "enum":
            others = [value for value in values if value != default]
            found[name] = others[-which] if others else default
        elif kind in ("integer", "real"):
            found[name] = most if which else least
    return found


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("of", ["ROLE", "DATABASE"])
def test_every_setting_is_set_or_harmless(postgres: str, database_url: str, of: str, which: int) -> None:
    """With every setting of the role or database at a hostile value, data is stored and read back unchanged."""
    role, name = f"r_{uuid.uuid4().hex[:8]}", parse(database_url)["dbname"]
    admin = psycopg2.connect(postgres % "postgres")
    admin.autocommit = True
    with admin.cursor() as cursor:
        cursor.execute(f"CREATE ROLE {role} LOGIN SUPERUSER")
        settings = hostile(cursor, which)
        assert len(settings) > 160
        for setting, value in settings.items():
            target = role if of == "ROLE" else name
            cursor.execute(
                f"ALTER {of} {target} SET {setting} = " + ("%s" if setting not in PATHS else value), (value,)
            )
    url = database_url.replace("user=postgres", f"user={role}")
    try:
        with psycopg2.connect(url) as plain, plain.cursor() as cursor:
            cursor.execute("SHOW DateStyle")
            cursor.execute("SHOW timezone")
            assert cursor.fetchone() == (settings["TimeZone"],), "the hostile settings are not there"
        database = Database(url, "test", connections=1)
        round_trip(database)
        # Idle for longer than the role's sessions may be idle.
        until(lambda: database.call(recoveries.uptime_s) and aged(database), "the session to be old")
        round_trip(database)
        assert database.call(lambda db: db.execute_sql("SHOW synchronous_commit").fetchone()) != ("off",)
        database.close()
    finally:
        with admin.cursor() as cursor:
            cursor.execute(f"ALTER DATABASE {name} RESET ALL")
            cursor.execute(f"DROP ROLE {role}")
        admin.close()


PATHS = {"search_path", "temp_tablespaces", "DateStyle"}


def test_no_statement_is_compiled(postgres: str, database_url: str) -> None:
    """Sessions are without JIT, which is on by default and would compile the plans of each claim."""
    name = parse(database_url)["dbname"]
    with psycopg2.connect(postgres % "postgres") as admin, admin.cursor() as cursor:
        cursor.execute(f"ALTER DATABASE {name} SET jit = on")
    database = Database(database_url, "test")
    assert database.call(lambda db: db.execute_sql("SHOW jit").fetchone()) == ("off",)
    database.close()


def aged(database: Database) -> bool:
    row = database.call(
        lambda db: db.execute_sql(
            "SELECT clock_timestamp() - backend_start > '1 second' FROM pg_stat_activity WHERE pid = pg_backend_pid()"
        ).fetchone()
    )
    return bool(row[0])


# One statement of a process of ours that may take long.
LONG = """
import sys
from service.db.connection import Database
Database(sys.argv[1], "dying", timeout_s=600).call(lambda db: db.execute_sql(sys.argv[2]))
"""


def test_a_client_that_dies_leaves_no_statement(database_url: str) -> None:
    """What runs or waits for a lock when its client is killed ends within seconds, rather than at its own end."""
    running = "SELECT 1 FROM pg_stat_activity WHERE application_name = 'vllm-batch-dying' AND wait_event = %s"
    with psycopg2.connect(database_url) as admin, admin.cursor() as cursor:
        cursor.execute("SELECT pg_advisory_lock(1)")
        waits = {"PgSleep": "SELECT pg_sleep(300)", "advisory": "SELECT pg_advisory_lock(1)"}
        clients = [
            subprocess.Popen([sys.executable, "-c", LONG, database_url, statement], cwd=ROOT)
            for statement in waits.values()
        ]

        def left() -> list[str]:
            # Within a transaction what it shows stays as it was.
            admin.commit()
            return [wait for wait in waits if cursor.execute(running, (wait,)) or cursor.fetchone()]

        try:
            until(lambda: len(left()) == 2, "both statements to run")
        finally:
            for client in clients:
                client.kill()
                client.wait(10)
        until(lambda: not left(), "both to be ended", 2 * int(sessions.CLIENT_CHECK_MS) / 1000)


def test_a_server_that_does_not_look_after_its_clients(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Postgres refuses to look whether a client is still there, sessions are without that, and work."""
    monkeypatch.setattr(sessions, "CLIENT_CHECK_MS", "-1")
    database = Database(database_url, "test")
    assert database.call(lambda db: db.execute_sql(f"SHOW {sessions.CLIENT_CHECK}").fetchone()) == ("0",)
    round_trip(database)
    database.close()


def test_rows_that_a_policy_hides_are_an_error(database_url: str, database: Database) -> None:
    """When row-level security would hide rows, reading fails instead of returning less."""
    stored(database, 3)
    role = f"r_{uuid.uuid4().hex[:8]}"
    with psycopg2.connect(database_url) as connection, connection.cursor() as cursor:
        cursor.execute(f"CREATE ROLE {role} LOGIN; GRANT SELECT ON ALL TABLES IN SCHEMA public TO {role}")
        cursor.execute("ALTER TABLE batches ENABLE ROW LEVEL SECURITY")
    theirs = Database(database_url.replace("user=postgres", f"user={role}"), "test")
    with pytest.raises(DatabaseAwayError, match="row-level security policy"):
        theirs.call(get, 1)
    theirs.close()
    with psycopg2.connect(database_url) as connection, connection.cursor() as cursor:
        cursor.execute(f"DROP OWNED BY {role}; DROP ROLE {role}")


def test_a_role_that_is_read_only_for_a_while(stack: Stack, client: Client) -> None:
    """A stack started on a read-only database reports it, and works without a restart once writes are allowed."""
    name = parse(stack.database_url)["dbname"]
    with psycopg2.connect(stack.database_url) as connection, connection.cursor() as cursor:
        cursor.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    stack.gateway()
    worker = stack.worker()
    until(lambda: worker.events("database_away"), "the worker to report Postgres as away")
    assert "read-only transaction" in str(worker.events("database_away")[0]["cause"])
    assert refused(lambda: client.submit_lines([{"custom_id": "a", "url": "/x", "body": {}}])).code
    with psycopg2.connect(stack.database_url) as connection, connection.cursor() as cursor:
        cursor.execute("SET transaction_read_only = off")
        cursor.execute(f"ALTER DATABASE {name} RESET default_transaction_read_only")
    stack.wait_until_accepting()
    batch = client.submit_lines([b'{"custom_id": "a", "url": "/v1/chat/completions", "body": {"model": "tiny"}}\n'])
    assert finished(client, batch.id).counts.completed == 1
    assert [server.process.poll() for server in stack.servers] == [None, None]
