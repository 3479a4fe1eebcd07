"""The gateway as a role of its own in Postgres, that may do what the gateway does and nothing else."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import psycopg2
import pytest

from service import postgres as embedded
from tests.integration.conftest import Stack
from tests.integration.test_front_door import count, finished, lines, refused, run_sql
from tests.waiting import until
from vllm_batch.client import Client

ROOT = Path(__file__).resolve().parents[2]


def as_gateway(url: str) -> str:
    return url.replace("user=postgres", "user=vllm_batch_gateway")


@pytest.fixture
def role_url(database_url: str) -> Iterator[str]:
    """The database as the gateway's role sees it, made as the file says."""
    psql = embedded.binaries() / "psql"
    for _ in range(2):
        # Twice, as after an upgrade.
        arguments = [str(psql), database_url, "-v", "ON_ERROR_STOP=1", "-f", "conf/gateway-role.sql"]
        done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
    yield as_gateway(database_url)
    with psycopg2.connect(database_url) as connection, connection.cursor() as cursor:
        cursor.execute("DROP OWNED BY vllm_batch_gateway")


def test_every_call_works_under_the_role(role_url: str, stack: Stack, client: Client) -> None:
    """Whatever a client asks of the gateway, and what the gateway cleans up by itself, the role lets it do."""
    gateway = stack.gateway(gateway_database_url=role_url, retention_s=1)
    stack.worker()
    stack.wait_until_accepting()
    done = client.submit_lines(lines(3, vllm_xargs={"simulate": "refuse"}))
    finished(client, done.id)
    assert client.get(done.id).counts.total == 3
    assert client.list()
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
    # Expired, then removed for their age as the other is, with all their rows.
    until(lambda: gateway.events("batch_expired"), "the batch to expire")
    until(lambda: count(stack, "batches") + count(stack, "purges") + count(stack, "requests") == 0, "the cleaning up")
    assert count(stack, "results") + count(stack, "chunks") == 0
    assert gateway.process.poll() is None
    with psycopg2.connect(stack.database_url) as connection, connection.cursor() as cursor:
        cursor.execute(
            "SELECT DISTINCT usename FROM pg_stat_activity WHERE application_name LIKE 'vllm-batch-gateway%'"
        )
        assert cursor.fetchall() == [("vllm_batch_gateway",)]


FORBIDDEN = (
    "CREATE TABLE mine (id int)",
    "DROP TABLE results",
    "ALTER TABLE batches ADD COLUMN x int",
    "UPDATE results SET body = 'forged'",
    "UPDATE requests SET body = 'forged'",
    "UPDATE batches SET completed = total",
    "UPDATE chunks SET state = 'done'",
    "INSERT INTO heartbeats SELECT * FROM heartbeats",
    "DELETE FROM recovery_events",
    "UPDATE schema_migration SET name = 'x'",
    "COPY batches TO PROGRAM 'true'",
)


def test_the_role_may_not_do_more(role_url: str) -> None:
    """Who has taken over the gateway cannot change schema, results, heartbeats or the audit log."""
    with psycopg2.connect(role_url) as connection, connection.cursor() as cursor:
        for statement in FORBIDDEN:
            with pytest.raises(psycopg2.errors.InsufficientPrivilege):
                cursor.execute(statement)
            connection.rollback()


def test_gateway_waits_for_the_schema(stack: Stack, client: Client) -> None:
    """On an empty database the gateway says what it waits for, and goes on once a worker has brought the schema."""
    run_sql(stack, "DROP SCHEMA public CASCADE; CREATE SCHEMA public")
    stack.gateway()
    until(lambda: "the schema waits for" in client.accepting(), "the gateway to say what it waits for")
    assert refused(lambda: list(client.list())).reason == "DATABASE_UNAVAILABLE"
    stack.worker()
    stack.wait_until_accepting()
    assert list(client.list()) == []
