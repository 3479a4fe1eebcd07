"""Whoever locks the rows of chunks and batches: nobody ends in a deadlock, and the heart waits for no result."""

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import peewee
import psycopg2
import pytest

from service.db import batches, chunks, endings, losses, results
from service.db.availability import DatabaseAwayError
from service.db.chunks import Chunk, Holder
from service.db.connection import Database
from tests.support.store import answers, count, holder, stored

WRITERS = 3
SHORT_S = 1.0


@contextmanager
def locked(url: str, table: str, row_id: int) -> Iterator[None]:
    """While the results of a chunk are being written, its row and then that of its batch are locked."""
    with psycopg2.connect(url) as connection, connection.cursor() as cursor:
        cursor.execute(f"SELECT FROM {table} WHERE id = %s FOR UPDATE", (row_id,))
        yield
        connection.rollback()


def lease_ends_in_s(database: Database, chunk: Chunk) -> float:
    query = "SELECT extract(epoch FROM lease_until - clock_timestamp())::float8 FROM chunks WHERE id = %s"
    return float(database.call(lambda db: db.execute_sql(query, (chunk.id,)).fetchone()[0]))


def set_lease(database: Database, seconds: float) -> None:
    query = "UPDATE chunks SET lease_until = clock_timestamp() + make_interval(secs => %s) WHERE state = 'leased'"
    database.call(lambda db: db.execute_sql(query, (seconds,)))


@pytest.mark.parametrize("table", ["chunks", "batches"])
def test_the_heart_waits_for_no_result(database_url: str, table: str) -> None:
    """While a large result is written, other leases are renewed at once; its own is neither lost nor released."""
    patient, heart = Database(database_url, "test"), Database(database_url, "heart", SHORT_S)
    stored(patient, 200)
    mine, dead = holder(), holder("dead")
    busy, other = patient.call(chunks.claim, mine, ["tiny"], 2)
    stored(patient, 1)
    patient.call(chunks.claim, dead, ["tiny"], 1)
    set_lease(patient, -1)
    with locked(database_url, table, busy.id if table == "chunks" else busy.batch_id):
        assert heart.call(chunks.renew, mine, [busy.id, other.id]) == {busy.id, other.id}
        assert lease_ends_in_s(heart, other) > 0
        # That of the dead worker, not the one that is being written to.
        assert losses.released(heart.call(losses.release_expired, 0.001)) == 1
        assert heart.call(endings.settle_cancelled) == 0
    assert heart.call(chunks.renew, mine, [busy.id, other.id]) == {busy.id, other.id}
    patient.close()
    heart.close()


def test_a_lease_of_a_cancelled_batch_is_not_waited_for(database_url: str) -> None:
    """A chunk whose result is written just when it would be deleted is deleted later, not when its lease runs out."""
    database = Database(database_url, "test", SHORT_S)
    batch = stored(database, 200)
    mine = holder()
    ids = [chunk.id for chunk in database.call(chunks.claim, mine, ["tiny"], 2)]
    database.call(endings.cancel, batch.id)
    assert database.call(chunks.renew, mine, ids) == set()
    with locked(database_url, "chunks", ids[0]):
        assert database.call(chunks.drop_cancelled, mine, ids) == {ids[0]}
    assert database.call(endings.settle_cancelled) == 0
    assert database.call(chunks.drop_cancelled, mine, {ids[0]}) == set()
    assert database.call(endings.settle_cancelled) == 1
    database.close()


def test_a_batch_is_cancelled_once_its_result_is_written(database_url: str) -> None:
    """Cancelled while a result of it is written: nobody waits for that, and after it the batch ends."""
    database = Database(database_url, "test", SHORT_S)
    batch = stored(database, 200)
    mine = holder()
    busy, other = database.call(chunks.claim, mine, ["tiny"], 2)
    database.call(endings.cancel, batch.id)
    set_lease(database, -1)
    with locked(database_url, "chunks", busy.id):
        assert database.call(chunks.renew, mine, [busy.id, other.id]) == {busy.id}
        assert database.call(chunks.drop_cancelled, mine, [busy.id, other.id]) == {busy.id}
        assert database.call(endings.settle_cancelled) == 0
    assert database.call(chunks.renew, mine, [busy.id]) == set()
    assert database.call(endings.settle_cancelled) == 1
    ended = database.call(batches.get, batch.id)
    assert ended is not None
    assert (ended.state, count(database, "chunks")) == ("cancelled", 0)
    database.close()


def test_a_lease_does_not_run_while_a_result_is_written(database: Database) -> None:
    """What was left of the lease when a slow write began is left when it ends."""
    stored(database, 2)
    mine = holder()
    [chunk] = database.call(chunks.claim, mine, ["tiny"], 1)
    database.call(
        lambda db: db.execute_sql(
            "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS"
            " $$ BEGIN PERFORM pg_sleep(2); RETURN NEW; END $$;"
            " CREATE TRIGGER slow BEFORE INSERT ON results FOR EACH ROW EXECUTE FUNCTION slow()"
        )
    )
    set_lease(database, 2)
    database.call(results.write, answers(chunk, range(1)), mine.incarnation)
    assert lease_ends_in_s(database, chunk) > 1


def test_no_deadlocks(database_url: str) -> None:
    """Results, renewals, releases, cancellations and expiry at once, in any order of chunks: none is a victim."""
    setup = Database(database_url, "test")
    made = [stored(setup, 400) for _ in range(4)]
    mine = holder()
    held = setup.call(chunks.claim, mine, ["tiny"], 16)
    # Half of them held by a life that has ended, one of whose writes is still under way.
    query = "UPDATE chunks SET lease_until = clock_timestamp() - interval '1s' WHERE mod(id, 2) = 0"
    setup.call(lambda db: db.execute_sql(query))
    query = "UPDATE batches SET state = 'cancelling' WHERE id = %s"
    setup.call(lambda db: db.execute_sql(query, (made[0].id,)))
    query = "UPDATE batches SET expire_time = clock_timestamp() WHERE id = %s"
    setup.call(lambda db: db.execute_sql(query, (made[1].id,)))
    failures: list[Exception] = []
    is_over = threading.Event()

    def repeat(seed: int, what: str) -> None:
        dice, database = random.Random(seed), Database(database_url, f"{what}-{seed}")
        try:
            while not is_over.is_set():
                once(database, dice, what, held, mine)
        except DatabaseAwayError as error:
            failures.append(error)
        finally:
            database.close()

    jobs = [*["write"] * WRITERS, *["renew"] * 2, "release", "expired", "settle", "drop", "expire"]
    threads = [threading.Thread(target=repeat, args=job) for job in enumerate(jobs)]
    for thread in threads:
        thread.start()
    # How long they meet, not a wait for something.
    is_over.wait(4)
    is_over.set()
    for thread in threads:
        thread.join()
    setup.close()
    assert not failures, failures


def once(database: Database, dice: random.Random, what: str, held: list[Chunk], mine: Holder) -> None:
    some = dice.sample(held, 6)
    ids = [chunk.id for chunk in some]

    def back(db: peewee.PostgresqlDatabase) -> None:
        # As if it had been released and claimed again.
        db.execute_sql(
            "UPDATE chunks SET state = 'leased', worker_id = 'w', incarnation = %s, lease_until = clock_timestamp()"
            " WHERE id IN (SELECT id FROM chunks WHERE id = ANY(%s) ORDER BY id FOR UPDATE)",
            (str(mine.incarnation), ids),
        )

    if what == "write":
        index = dice.randrange(100)
        places = [chunk.first_index + index for chunk in some]
        group = [one for chunk, at in zip(some, places, strict=True) for one in answers(chunk, range(at, at + 1))]
        database.call(results.write, group, mine.incarnation)
    elif what == "renew":
        database.call(chunks.renew, mine, ids)
    elif what == "release":
        database.call(chunks.release, mine, ids)
        database.call(back)
    elif what == "expired":
        database.call(losses.release_expired, 0.0)
        database.call(back)
    elif what == "settle":
        database.call(endings.settle_cancelled)
    elif what == "drop":
        database.call(chunks.drop_cancelled, mine, ids)
    else:
        database.call(endings.expire, 60.0)
