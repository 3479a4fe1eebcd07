"""Postgres refuses in every way that it can: no process ends, each call gets the reason, and work resumes."""

import os

import httpx
import psycopg2
import pytest

from service.database_url import parse
from service.db.availability import CLASSES, Meaning, meaning
from service.worker.result_writer import MAX_PUT_OFF
from tests.support.batches import count, lines, refused, run_sql
from tests.support.ports import free_port
from tests.support.servers import Stack
from tests.support.waiting import until
from vllm_batch import Client
from vllm_batch.v1 import batch_service_pb2 as pb

COUNT = 20
# One code of each class, and those whose meaning differs from their class. 00000 cannot be raised.
CODES = ["54001", *(f"{name}000" for name in CLASSES if name != "00")]
CODES += ["25006", "25P03", "42501", "42P01", "42601", "40P01", "55P03", "57014", "57P01", "53100", "53300", "23514"]

# One of each meaning, and the errors that servers raise most; THOROUGH=1 walks through all.
IN_CI = ["08000", "22000", "23514", "25006", "40P01", "42501", "42601", "53100", "57P01", "58000", "XX000"]

# The status of a call that meets such an error, at either door.
CALLS = {
    Meaning.AWAY: ("UNAVAILABLE", 503),
    Meaning.REFUSED: ("INVALID_ARGUMENT", 400),
    Meaning.FAULT: ("INTERNAL", 500),
}

PROGRAMS = ("gateway", "heart", "http", "watchdog", "worker")

# Reading heartbeats and writing the other tables goes through a function that may raise.
# It notes in sequences, which are not rolled back, which programs it was raised for.
FAULTS = """
CREATE TABLE fault (code text);
"""
FAULTS += "".join(f"CREATE SEQUENCE met_{program};" for program in PROGRAMS)
FAULTS += f"""
CREATE FUNCTION fail() RETURNS boolean LANGUAGE plpgsql VOLATILE AS $$
DECLARE wanted text;
BEGIN
    SELECT code INTO wanted FROM fault;
    IF wanted IS NOT NULL THEN
        PERFORM nextval('met_' || substring(current_setting('application_name') FROM '{"|".join(PROGRAMS)}'));
        RAISE EXCEPTION 'raised: %', wanted USING ERRCODE = wanted;
    END IF;
    RETURN true;
END $$;
CREATE FUNCTION fail_trigger() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM fail(); RETURN NULL; END $$;
ALTER TABLE heartbeats RENAME TO heartbeats_kept;
CREATE VIEW heartbeats AS SELECT * FROM heartbeats_kept WHERE (SELECT fail());
"""
FAULTS += "".join(
    f"CREATE TRIGGER fails BEFORE INSERT OR UPDATE OR DELETE ON {table} EXECUTE FUNCTION fail_trigger();"
    for table in ("batches", "chunks", "requests", "results", "servers", "watchdogs")
)


def have_met_it(stack: Stack) -> bool:
    """True once each program has met the error. The worker itself does so only while it has something to write."""
    met = [count(stack, f"met_{program} WHERE is_called") for program in PROGRAMS if program != "worker"]
    return all(met)


@pytest.mark.timeout(400)
def test_every_class(stack: Stack, client: Client) -> None:
    """Whatever error a real server raises, no process ends, calls fail with the cause and all work completes
    afterwards."""
    run_sql(stack, FAULTS)
    stack.gateway()
    stack.worker()
    stack.http()
    # Without a supervisord it guards nobody, and beats and looks at the others' heartbeats all the same.
    stack.run("watchdog", "watchdog", watchdog_port=free_port(), watchdog_metrics_port=0)
    batches = {}
    for code in CODES if os.environ.get("THOROUGH") == "1" else IN_CI:
        stack.wait_until_accepting()
        batch = client.submit_lines(lines(COUNT, vllm_xargs={"simulate": 0.5}))
        reset = "".join(f"SELECT setval('met_{program}', 1, false);" for program in PROGRAMS)
        run_sql(stack, f"{reset} INSERT INTO fault VALUES ('{code}')")
        until(lambda code=code: f"raised: {code}" in client.accepting(), f"the gateway to report {code}")  # type: ignore[misc]
        error = refused(lambda: client.submit_lines(lines(1)))
        assert (error.code.name, error.reason) == ("UNAVAILABLE", "DATABASE_UNAVAILABLE")
        assert f"raised: {code}" in error.message
        # Calls that go to the database itself fail too: as retryable, rejected, or our fault.
        error = refused(lambda batch=batch: client.cancel(batch.id))  # type: ignore[misc]
        answer = httpx.post(f"{stack.base_url}/batches/{batch.id}/cancel", timeout=60)
        assert (error.code.name, answer.status_code) == CALLS[meaning(code)], (code, answer.text)
        assert (error.reason == "DATABASE_UNAVAILABLE") == (meaning(code) is Meaning.AWAY)
        until(lambda: have_met_it(stack), "every program to meet it")
        ended = [server.log.stem for server in stack.servers if server.process.poll() is not None]
        assert not ended, code
        run_sql(stack, "DELETE FROM fault")
        batches[code] = batch.id
    for code, batch_id in batches.items():
        *_, done = client.watch(batch_id)
        assert done.state == pb.BATCH_STATE_COMPLETED
        found = list(client.results(batch_id))
        assert [result.custom_id for result in found] == [f"c{number}" for number in range(COUNT)]
        # Only a rejection of the data itself may have become a result.
        failed = {result.error.code for result in found if result.HasField("error")}
        assert failed <= ({"RESULT_NOT_STORABLE"} if meaning(code) is Meaning.REFUSED else set()), code
        assert httpx.get(f"{stack.base_url}/batches/{batch_id}").json()["status"] == "completed"
    for table, beats in (("servers", 2), ("watchdogs", 1)):
        run_sql(stack, f"UPDATE {table} SET last_seen = now() - interval '1 hour'")
        fresh = f"{table} WHERE last_seen > now() - interval '1 minute'"
        until(lambda fresh=fresh, beats=beats: count(stack, fresh) == beats, f"{table} to beat again")  # type: ignore[misc]
    assert [server.process.poll() for server in stack.servers] == [None] * 4


def test_read_only_for_a_while(stack: Stack, client: Client) -> None:
    """While Postgres is read-only nothing is written; afterwards all work completes without any process ending."""
    stack.gateway()
    stack.worker(window=50)
    stack.wait_until_accepting()
    batch = client.submit_lines(lines(300, vllm_xargs={"simulate": 0.2}))
    read_only = f"ALTER DATABASE {parse(stack.database_url)['dbname']} SET default_transaction_read_only = "
    with psycopg2.connect(stack.database_url) as connection, connection.cursor() as cursor:
        cursor.execute(read_only + "on")
        connection.commit()
        # New sessions are read-only at once; old ones have to be replaced.
        cursor.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database()"
            " AND pid <> pg_backend_pid()"
        )
        for server in stack.servers:
            until(lambda server=server: server.events("database_away"), "the outage to be noticed")  # type: ignore[misc]
        # Some connections were cut before they were refused a write, so the first cause logged may be another.
        until(lambda: "read-only" in stack.servers[1].log.read_text(), "the worker to log that it is read-only")
        assert [server.process.poll() for server in stack.servers] == [None, None]
        cursor.execute(read_only + "off")
    with Client(stack.target, patience_s=60) as patient:
        *_, done = patient.watch(batch.id)
    assert done.counts.completed == 300
    assert [server.process.poll() for server in stack.servers] == [None, None]


@pytest.mark.parametrize(
    ("code", "event", "told"),
    [
        ("42501", "database_away", "InsufficientPrivilege, with more in the log"),
        ("P0001", "results_put_off", "not audited"),
    ],
)
def test_results_that_are_refused_are_told(stack: Stack, client: Client, code: str, event: str, told: str) -> None:
    """While Postgres refuses all results and serves all else, the batch says so within 15 s, the worker logs it once,
    and once they are let through all are there. What a trigger says is told of its own batch alone."""
    stack.gateway()
    worker = stack.worker(window=50)
    stack.wait_until_accepting()
    run_sql(
        stack,
        "CREATE SEQUENCE met; CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        f" PERFORM nextval('met'); RAISE EXCEPTION 'not audited' USING ERRCODE = '{code}'; END $$;"
        "CREATE TRIGGER refuse BEFORE INSERT ON results FOR EACH ROW EXECUTE FUNCTION refuse()",
    )
    batch = client.submit_lines(lines(COUNT))
    reason = pb.WAIT_REASON_DATABASE_AWAY
    wait = until(lambda: (found := client.get(batch.id).wait).reason == reason and found, "the reason", 15)
    assert wait.message.endswith(f": {told}")
    # More than one round refuses.
    until(lambda: count(stack, f"met WHERE last_value > {MAX_PUT_OFF + 2}"), "results to be refused again")
    logged = [event for name in ("database_away", "results_put_off") for event in worker.events(name)]
    assert [each["event"] for each in logged] == [event]
    assert not worker.events("database_back")
    run_sql(stack, "DROP FUNCTION refuse CASCADE")
    *_, done = client.watch(batch.id)
    assert (done.state, done.counts.completed) == (pb.BATCH_STATE_COMPLETED, COUNT)
    assert not done.HasField("wait")


@pytest.mark.parametrize(
    ("part", "event"),
    [
        ("gateway.presence", "task_failed"),
        ("gateway.housekeeping", "task_failed"),
        ("gateway.losses", "task_failed"),
        ("gateway.beat", "task_failed"),
        ("gateway.schema", "task_failed"),
        ("http.measuring", "task_failed"),
        ("worker.pulse", "program_failed"),
        ("worker.writer", "program_failed"),
        ("watchdog.health", "program_failed"),
    ],
)
def test_a_part_that_fails_ends_the_process(
    stack: Stack, part: str, event: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When one part of a process fails, the whole process exits with the cause, so that it can be restarted."""
    monkeypatch.setenv("BROKEN_PART", part)
    name = part.partition(".")[0]
    ports = {f"{each}_port": free_port() for each in ("worker", "watchdog", "http")} | {"watchdog_metrics_port": 0}
    process = stack.run("tests.support.broken_parts", name, **ports)
    until(lambda: process.process.poll() is not None, "the process to end", 60)
    assert process.process.returncode == 1
    assert "a fault of ours" in str(process.events(event)[0])
