"""The gateway's own Postgres role has the rights that the gateway needs, and no others."""

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psycopg2
import pytest
from openai import OpenAI

from service import embedded_postgres as embedded
from service.database_url import parse
from service.db.connection import Database, migrate
from tests.support.batches import count, finished, lines, refused, run_sql
from tests.support.ports import free_port
from tests.support.servers import Stack
from tests.support.waiting import until
from vllm_batch import Client

ROOT = Path(__file__).resolve().parents[2]


def as_gateway(url: str) -> str:
    return url.replace("user=postgres", "user=vllm_batch_gateway")


def run_file(url: str) -> "subprocess.CompletedProcess[str]":
    arguments = [str(embedded.binaries() / "psql"), url, "-v", "ON_ERROR_STOP=1", "-f", "conf/gateway-role.sql"]
    return subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=60)


def make_role(url: str) -> None:
    done = run_file(url)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def role_url(database_url: str) -> Iterator[str]:
    """The database as seen by the gateway's role, which conf/gateway-role.sql creates."""
    for _ in range(2):
        # Twice, as after an upgrade.
        make_role(database_url)
    yield as_gateway(database_url)
    with psycopg2.connect(database_url) as connection, connection.cursor() as cursor:
        cursor.execute("DROP OWNED BY vllm_batch_gateway")


def test_every_call_works_under_the_role(role_url: str, stack: Stack, client: Client) -> None:
    """The gateway can serve its calls and do its housekeeping with the rights of its own role."""
    gateway = stack.gateway(gateway_database_url=role_url, retention_s=1)
    stack.worker()
    stack.wait_until_accepting()
    done = client.submit_lines(lines(3, vllm_xargs={"simulate": "refuse"}))
    finished(client, done.id)
    assert client.get(done.id).counts.total == 3
    assert list(client.list())
    assert client.tenants()
    assert len(list(client.results(done.id))) == 3
    assert client.result(done.id, "c0").custom_id == "c0"
    for server in stack.servers[1:]:
        server.terminate()
    retried = client.retry(done.id)
    assert client.cancel(retried.id).state
    finished(client, retried.id)
    client.delete(retried.id)
    expiring = client.retry(done.id)
    run_sql(stack, f"UPDATE batches SET expire_time = now() WHERE id = {expiring.id.removeprefix('batch_')}")
    # Expired, then removed with all rows once too old, like the other batch.
    until(lambda: gateway.events("batch_expired"), "the batch to expire")
    until(lambda: count(stack, "batches") + count(stack, "purges") + count(stack, "requests") == 0, "the cleanup")
    assert count(stack, "results") + count(stack, "chunks") == 0
    assert gateway.process.poll() is None
    with psycopg2.connect(stack.database_url) as connection, connection.cursor() as cursor:
        cursor.execute(
            "SELECT DISTINCT usename FROM pg_stat_activity WHERE application_name LIKE 'vllm-batch-gateway%'"
        )
        assert cursor.fetchall() == [("vllm_batch_gateway",)]


def test_openai_api_works_under_the_role(role_url: str, stack: Stack) -> None:
    """Whatever a client does with files, uploads and batches over HTTP, and the cleaning up, the role allows."""
    stack.gateway(gateway_database_url=role_url)
    stack.worker()
    door = stack.http(gateway_database_url=role_url)
    with OpenAI(base_url=stack.base_url, api_key="none", max_retries=0) as client:
        file = client.files.create(file=("a", b"".join(lines(3))), purpose="batch")
        asked: Any = {"endpoint": "/v1/chat/completions", "completion_window": "24h"}
        batch = client.batches.create(input_file_id=file.id, **asked)
        until(lambda: client.batches.retrieve(batch.id).status == "completed", "the batch")
        output = str(client.batches.retrieve(batch.id).output_file_id)
        assert len(client.files.content(output).text.splitlines()) == 3
        upload = client.uploads.create(bytes=1, filename="a", mime_type="a", purpose="batch")
        parts = [client.uploads.parts.create(upload.id, data=data).id for data in (b"1", b"2")]
        made = client.uploads.complete(upload.id, part_ids=parts[:1]).file
        assert made is not None
        again = client.batches.create(input_file_id=file.id, metadata={"n": "2"}, **asked)
        client.batches.cancel(again.id)
        assert client.models.list().data
        for name in (file.id, output, made.id):
            client.files.delete(name)
        assert not list(client.files.list(purpose="batch"))
    until(
        lambda: not count(stack, "files") + count(stack, "file_parts") + count(stack, "file_pieces"), "the cleaning up"
    )
    assert not door.events("call_failed") + door.events("call_without_database")


def test_a_file_that_is_newer_than_the_schema_takes_no_rights(role_url: str, database_url: str) -> None:
    """Run before the upgrade has migrated the schema, the file is refused, and running gateways keep their rights."""
    with psycopg2.connect(database_url) as connection, connection.cursor() as cursor:
        cursor.execute("DROP TABLE gone_files")
    done = run_file(database_url)
    assert done.returncode
    assert "gone_files" in done.stderr
    with psycopg2.connect(role_url) as connection, connection.cursor() as cursor:
        cursor.execute("DELETE FROM servers WHERE false")


@pytest.mark.parametrize("how", ["in the URL", "of the database"])
def test_the_schema_is_that_of_the_tables(how: str, database_url: str, tmp_path: Path) -> None:
    """Where the tables are in another schema, the role finds them there, has its rights there and no others."""
    schema, name = 'our "batches"', parse(database_url)["dbname"]
    with psycopg2.connect(database_url) as connection, connection.cursor() as cursor:
        cursor.execute('DROP SCHEMA public CASCADE; CREATE SCHEMA "our ""batches"""; CREATE SCHEMA public')
        if how == "of the database":
            cursor.execute(f"ALTER DATABASE {name} SET search_path = 'our \"batches\"', public")
    url = database_url
    if how == "in the URL":
        url += "&options=" + quote("-c search_path=" + '"our\\ ""batches"""')
    database = Database(url, "test")
    database.call(migrate)
    database.close()
    try:
        make_role(url)
        stack = Stack(url, tmp_path, free_port(), [])
        try:
            # Without `options`: the role has its own search_path.
            stack.gateway(gateway_database_url=as_gateway(database_url))
            stack.worker()
            stack.wait_until_accepting()
            with Client(stack.target) as client:
                done = client.submit_lines(lines(3, vllm_xargs={"simulate": "refuse"}))
                finished(client, done.id)
                assert client.retry(done.id).counts.total == 3
        finally:
            stack.end()
        with psycopg2.connect(as_gateway(database_url)) as connection, connection.cursor() as cursor:
            cursor.execute("SELECT current_schema()")
            assert cursor.fetchone() == (schema,)
            for statement in FORBIDDEN:
                with pytest.raises(psycopg2.errors.InsufficientPrivilege):
                    cursor.execute(statement)
                connection.rollback()
    finally:
        with psycopg2.connect(database_url) as connection, connection.cursor() as cursor:
            cursor.execute("DROP OWNED BY vllm_batch_gateway")


FORBIDDEN = (
    "CREATE TABLE mine (id int)",
    "DROP TABLE results",
    "ALTER TABLE batches ADD COLUMN x int",
    "UPDATE results SET body = 'forged'",
    "UPDATE requests SET body = 'forged'",
    "UPDATE batches SET completed = total",
    "UPDATE batches SET tenant = 'mine'",
    "DELETE FROM tenants",
    "UPDATE chunks SET state = 'done'",
    "INSERT INTO heartbeats SELECT * FROM heartbeats",
    "DELETE FROM recovery_events",
    "UPDATE schema_migration SET name = 'x'",
    "COPY batches TO PROGRAM 'true'",
)


def test_the_role_may_not_do_more(role_url: str) -> None:
    """An attacker who controls the gateway cannot change schema, requests, results, heartbeats or the audit log."""
    with psycopg2.connect(role_url) as connection, connection.cursor() as cursor:
        for statement in FORBIDDEN:
            with pytest.raises(psycopg2.errors.InsufficientPrivilege):
                cursor.execute(statement)
            connection.rollback()


def test_gateway_waits_for_the_schema(stack: Stack, client: Client) -> None:
    """On an empty database the gateway reports the pending migration, and works once a worker has applied it."""
    run_sql(stack, "DROP SCHEMA public CASCADE; CREATE SCHEMA public")
    stack.gateway()
    until(lambda: "is pending" in client.accepting(), "the gateway to report the pending migration")
    assert refused(lambda: list(client.list())).reason == "DATABASE_UNAVAILABLE"
    stack.worker()
    stack.wait_until_accepting()
    assert list(client.list()) == []
