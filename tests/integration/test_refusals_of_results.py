"""Postgres refuses in the middle of writing results: an outage is never anybody's result, and no log has a prompt."""

import asyncio
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from service.db import batches, chunks, results
from service.db.availability import CLASSES, CODES, FOREIGN, AvailabilityLog, DatabaseAwayError, Meaning, meaning
from service.db.batches import Batch
from service.db.chunks import Holder
from service.db.connection import Database, migrate
from service.db.results import LARGE_BYTES, Result, Span
from service.telemetry import logs
from service.worker import result_writer
from service.worker.result_writer import ResultWriter
from tests.support.servers import PostgresServer
from tests.support.store import holder, stored
from tests.support.waiting import until

COUNT = 4
# 00000 cannot be raised.
SPECIAL = ("53100", "53200", "53300", "57P01", "57014", "55P03", "40001", "40P01", "58030", "XX001", "XX002")
AWAY = sorted(
    {code for code in (*(f"{name}000" for name in CLASSES), *CODES, *SPECIAL) if meaning(code) is Meaning.AWAY}
)
SECRET = "a patient of ours"

# Fails for the third of the results of a batch, so that some have been written, or when the transaction ends.
FAULTS = """
CREATE TABLE fault (batch_id bigint, code text);
CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE wanted text;
BEGIN
    SELECT code INTO wanted FROM fault WHERE batch_id = NEW.batch_id;
    IF wanted IS NOT NULL AND NEW.index = 2 THEN RAISE EXCEPTION 'raised: %%', wanted USING ERRCODE = wanted; END IF;
    RETURN NULL;
END $$;
"""
TRIGGERS = {
    "a row": "CREATE TRIGGER fails AFTER INSERT ON results FOR EACH ROW EXECUTE FUNCTION fail()",
    "the end": "CREATE CONSTRAINT TRIGGER fails AFTER INSERT ON results DEFERRABLE INITIALLY DEFERRED"
    " FOR EACH ROW EXECUTE FUNCTION fail()",
}


def run_sql(database: Database, statement: str, *given: object) -> None:
    database.call(lambda db: db.execute_sql(statement, given or None))


class Writing:
    """One batch, whose results a writer stores while its Postgres fails with one code."""

    def __init__(self, database: Database, batch: Batch, mine: Holder, body: str) -> None:
        self.batch = batch
        self.availability = AvailabilityLog(logs.get("test"))
        self.writer = ResultWriter(database, mine.incarnation, 0, self.availability, lambda _: None)
        chunk = next(one for one in database.call(chunks.claim, mine, ["tiny"], 1) if one.batch_id == batch.id)
        for index in range(COUNT):
            self.writer.add(Result(chunk.id, batch.id, index, status_code=200, body=body, custom_id=f"c{index}"))


@pytest.mark.parametrize("when", TRIGGERS)
@pytest.mark.parametrize(("codes", "size"), [(AWAY, 10), (SPECIAL, LARGE_BYTES + 1)], ids=["small", "large"])
def test_an_outage_is_nobodys_result(
    database: Database, when: str, codes: Sequence[str], size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every error that means away, in the middle of a write or at its end: once it is gone all results are there,
    those that were written, each once, and none is an error. What a trigger of others refuses holds up no other."""
    monkeypatch.setattr(result_writer, "IDLE_S", 0.1)
    run_sql(database, FAULTS + TRIGGERS[when])
    body = '"' + "x" * size + '"'
    mine = holder()

    async def write() -> list[Writing]:
        all_of_them = []
        for code in codes:
            batch = stored(database, COUNT)
            run_sql(database, "INSERT INTO fault VALUES (%s, %s)", batch.id, code)
            all_of_them.append(Writing(database, batch, mine, body))
        tasks = [asyncio.create_task(one.writer.follow()) for one in all_of_them]
        is_noticed = [
            lambda one=one, code=code: one.writer.are_put_off if code.startswith(FOREIGN) else one.availability.is_away
            for code, one in zip(codes, all_of_them, strict=True)
        ]
        await asyncio.to_thread(until, lambda: all(each() for each in is_noticed), "the outages")
        for code, one in zip(codes, all_of_them, strict=True):
            assert one.writer.unstored == (1 if code.startswith(FOREIGN) else COUNT), code
        run_sql(database, "DELETE FROM fault")
        await asyncio.to_thread(until, lambda: not any(one.writer.unstored for one in all_of_them), "the results")
        assert not any(task.done() for task in tasks)
        for task in tasks:
            task.cancel()
        return all_of_them

    written = asyncio.run(write())
    for code, one in zip(codes, written, strict=True):
        done = database.call(batches.get, one.batch.id)
        assert done is not None
        assert (done.state, done.completed, done.failed) == ("completed", COUNT, 0), code
        found = database.call(results.read_page, "index", "all", one.batch.id, Span(0, COUNT - 1))
        assert [(result.status_code, len(result.body or "")) for result in found] == [(200, size + 2)] * COUNT, code


@pytest.fixture
def server() -> Iterator[PostgresServer]:
    """A Postgres whose log the test reads."""
    with tempfile.TemporaryDirectory(prefix="vbt-", ignore_cleanup_errors=True) as folder:
        server = PostgresServer(Path(folder))
        server.log = Path(folder) / "postgres.log"
        server.start()
        yield server
        server.stop()


# What a server of somebody else has by default; and a role that is no superuser, with and without the right.
LOUD = (
    "ALTER DATABASE batch SET log_min_error_statement = error; ALTER DATABASE batch SET log_error_verbosity = default;"
    "CREATE ROLE worker LOGIN; GRANT ALL ON ALL TABLES IN SCHEMA public TO worker"
)
MAY = "GRANT SET ON PARAMETER log_min_error_statement, log_error_verbosity TO worker"
MAY_NOT = "REVOKE SET ON PARAMETER log_min_error_statement, log_error_verbosity FROM worker"


def test_no_statement_is_in_the_log(server: PostgresServer) -> None:
    """A result that is refused leaves a line in the log of Postgres, and nothing of it: in the embedded one, and in any
    other for a superuser or a role that may say so; without that right the log has it all."""
    assert server.log is not None
    admin = Database(server.url % "batch", "admin")
    admin.call(migrate)
    batch, mine = stored(admin, COUNT), holder()
    [chunk] = admin.call(chunks.claim, mine, ["tiny"], 1)
    run_sql(admin, FAULTS + TRIGGERS["a row"])
    run_sql(admin, "INSERT INTO fault VALUES (%s, 'P0001')", batch.id)
    one = Result(chunk.id, batch.id, 2, status_code=200, body=f'"{SECRET}"' + " " * (2 << 20), custom_id=SECRET)

    def said(prepare: str, user: str) -> str:
        assert server.log is not None
        run_sql(admin, prepare)
        begin = server.log.stat().st_size
        database = Database(f"{server.url % 'batch'}&user={user}", "test")
        with pytest.raises(DatabaseAwayError):
            database.call(results.write, [one], mine.incarnation)
        database.close()
        text = server.log.read_text()[begin:]
        assert "raised: P0001" in text
        return text

    try:
        for prepare, user in (("SELECT", "postgres"), (LOUD, "postgres"), (MAY, "worker")):
            assert SECRET not in said(prepare, user)
        assert SECRET in said(MAY_NOT, "worker")
    finally:
        admin.close()
