"""Whose turn it is: fair shares by tokens, priorities, windows, models; and nothing is lost or done twice."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from service.db import chunks, endings, sharing, suspects, turns
from service.db.connection import Database, migrate
from tests.conftest import IS_THOROUGH
from tests.support.queue import Worker, answer, claim, queued
from tests.support.store import holder

# Each example fills and empties a queue in Postgres.
FEW = settings(
    max_examples=500 if IS_THOROUGH else 8,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
TABLES = "batches, requests, chunks, results, pools, pool_tenants, queue, queue_changes, urgent_batches, tenant_weights"


def sql(database: Database, statement: str, *params: object) -> list[Any]:
    def run(db: Any) -> list[Any]:
        cursor = db.execute_sql(statement, params)
        return list(cursor.fetchall()) if cursor.description else []

    return database.call(run)


def clear(database: Database) -> None:
    sql(database, f"TRUNCATE {TABLES} CASCADE")


def served(database: Database, turns_taken: int, models: tuple[str, ...] = ("tiny",)) -> list[int]:
    """The batches of the next chunks, none of which is answered."""
    return [chunk.batch_id for _ in range(turns_taken) for chunk in claim(database, holder(), 1, models)]


def test_a_small_batch_is_not_stuck_behind_a_huge_one(database: Database) -> None:
    """The next turn after its creation belongs to a small batch, however much of the same tenant is in the queue."""
    worker = Worker(database, lambda chunk: 50)
    queued(database, 1000)
    for _ in range(10):
        worker.step()
    small = queued(database, 1)
    assert served(database, 1) == [small]


def test_a_batch_has_as_much_as_its_neighbour_of_the_same_tenant(database: Database) -> None:
    """Tenants share first, and then the batches of each: ten batches are no more than one beside another tenant."""
    one = queued(database, 200, tenant="a")
    ten = [queued(database, 50, tenant="b") for _ in range(10)]
    worker = Worker(database, lambda chunk: 10)
    for _ in range(120):
        worker.step()
    assert worker.used(one) == pytest.approx(worker.used(*ten), abs=60)
    assert [worker.used(batch) for batch in ten] == pytest.approx([worker.used(*ten) / 10] * 10, abs=40)


@FEW
@given(
    weights=st.tuples(st.sampled_from([0.5, 1.0, 3.0]), st.sampled_from([0.5, 1.0, 3.0])),
    cost=st.tuples(st.integers(10, 100), st.integers(10, 100)),
    workers=st.integers(1, 3),
)
def test_tokens_really_used_are_shared_by_weight(
    database: Database, weights: tuple[float, float], cost: tuple[int, int], workers: int
) -> None:
    """Whatever requests turn out to cost, and however many workers claim, tenants use tokens by their weights."""
    clear(database)
    database.call(turns.set_weights, {"a": weights[0]}, weights[1])
    mine = {queued(database, 500, tenant=tenant): each for tenant, each in zip("ab", cost, strict=True)}
    all_workers = [Worker(database, lambda chunk: mine[chunk.batch_id]) for _ in range(workers)]
    # Until each has had at least so many.
    done: Counter[int] = Counter()
    while min(done[batch] for batch in mine) < 10 and done.total() < 400:
        for worker in all_workers:
            chunk = worker.step()
            assert chunk is not None
            done[chunk.batch_id] += 1
    shares = [done[batch] * each / weight for (batch, each), weight in zip(mine.items(), weights, strict=True)]
    # A chunk more or less of each worker's, and what was claimed before the first result was known.
    slack = sum((workers * 4 + 2) * each / weight for each, weight in zip(cost, weights, strict=True))
    assert shares[0] == pytest.approx(shares[1], abs=slack)
    used = sql(database, "SELECT sum(prompt_tokens + completion_tokens) FROM batches")[0][0]
    assert used == sum(done[batch] * each for batch, each in mine.items())


def test_an_idle_tenant_saves_up_nothing(database: Database) -> None:
    """One that comes after another has worked for long gets half from then on, not all."""
    long = queued(database, 1000, tenant="a")
    worker = Worker(database, lambda chunk: 100)
    for _ in range(100):
        worker.step()
    late = queued(database, 500, tenant="b")
    before = worker.used(long)
    for _ in range(40):
        worker.step()
    assert worker.used(late) == pytest.approx(worker.used(long) - before, abs=500)
    # Away for a while, and back.
    sql(database, "DELETE FROM chunks WHERE batch_id = %s AND state = 'pending'", late)
    for _ in range(40):
        worker.step()
    again, before = queued(database, 500, tenant="b"), worker.used(long)
    for _ in range(40):
        worker.step()
    assert worker.used(again) == pytest.approx(worker.used(long) - before, abs=500)


@FEW
@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 4), st.integers(0, 3000)), min_size=1, max_size=8))
def test_nobody_starves(database: Database, given: list[tuple[str, int, int]]) -> None:
    """A batch of one chunk has its turn soon, whoever else is in the queue with however much, and costs whatever."""
    clear(database)
    cost = {queued(database, 50 * count, tenant=tenant): tokens for tenant, count, tokens in given}
    worker = Worker(database, lambda chunk: cost.get(chunk.batch_id, 10))
    for _ in range(12):
        worker.step()
    small = queued(database, 1, tenant="d")
    for _ in range(worker.window + 2):
        worker.step()
    assert any(batch == small for batch, _ in worker.answered)


def test_priority_comes_before_shares(database: Database) -> None:
    """While a batch of higher priority waits, whoever's, no other has a turn."""
    low, high = queued(database, 5, tenant="a"), queued(database, 3, tenant="b", priority=1)
    assert served(database, 5) == [high] * 3 + [low] * 2
    higher = queued(database, 1, tenant="a", priority=2)
    assert served(database, 2) == [higher, low]


def test_foreign_models_are_not_passed_over(database: Database) -> None:
    """A worker gets what it can run: of its own models, of some of another's, and what names no model."""
    foreign, some, none = (queued(database, 2, models=models) for models in (("x", "y"), ("x",), ()))
    sql(database, "SELECT take_turns('{x,y}', 0, 'w', gen_random_uuid(), 60)")
    late = queued(database, 1, models=("x",))
    assert served(database, 3, ("z",)) == [none] * 2
    assert sorted(served(database, 9, ("x",))) == [some, some, late]
    assert served(database, 9, ("y", "x")) == [foreign] * 2


def test_tenants_share_a_pool_whatever_models_they_name(database: Database) -> None:
    """A tenant that names several models of the same workers gets no more than one that names one of them."""
    models = ("base", "lora")
    served(database, 1, models)
    both = [queued(database, 50, tenant="a", models=(name,)) for name in models]
    one = queued(database, 50, tenant="b", models=("base",))
    worker = Worker(database, lambda chunk: 10, models=models)
    for _ in range(48):
        worker.step()
    assert worker.used(one) == pytest.approx(worker.used(*both), abs=40)
    assert worker.used(both[0]) == pytest.approx(worker.used(both[1]), abs=40)


def test_the_number_of_entries_that_wait_costs_a_claim_nothing(database: Database) -> None:
    """A claim reads as many pages beside 5,000 batches that wait as beside none, whatever Postgres believes of them."""
    queued(database, 9)
    served(database, 1)
    more = """
        INSERT INTO queue (batch_id, pool_id, tenant, models, priority, total, estimate, virtual)
        SELECT -i, pool_id, tenant, models, priority, total, estimate, 1000000 FROM queue, generate_series(1, 5000) i
    """
    explain = "EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) SELECT take_turns('{tiny}', 1, 'w', gen_random_uuid(), 60)"

    def pages() -> int:
        [[[plan]]] = sql(database, explain)
        return int(plan["Plan"]["Shared Hit Blocks"] + plan["Plan"]["Shared Read Blocks"])

    few = min(pages(), pages())
    sql(database, more)
    # Postgres believes from now on that next to none wait; of a table that is empty autovacuum makes no statistics.
    sql(database, "ANALYZE queue")
    sql(database, "UPDATE queue SET waits = true")
    assert min(pages(), pages()) <= few + 20


def test_an_entry_of_one_chunk_waits_no_more_once_that_is_claimed(database: Database) -> None:
    """No turn is spent on finding out that it is emptied; what is put back of it, or given, waits again."""
    batch = queued(database, 1, size=3)
    mine, waiting = holder(), "SELECT batch_id FROM queue WHERE waits"
    [chunk] = claim(database, mine)
    assert sql(database, waiting) == []
    assert database.call(sharing.give, mine, [sharing.Part(chunk.id, [2])]) == 1
    [given] = claim(database, holder("other"))
    assert given.count == 1
    database.call(chunks.release, mine, [chunk.id])
    [again] = claim(database, mine)
    assert (again.id, again.batch_id) == (chunk.id, batch)
    assert claim(database, mine) == []
    assert sql(database, waiting) == []


def rate(database: Database, tokens_s: float) -> None:
    """Makes Postgres believe that workers make so many tokens per second."""
    sql(database, "UPDATE pools SET rate = %s, rate_since = NULL", tokens_s)


def test_what_was_used_counts_for_the_rate_whoever_notes_an_end(database: Database) -> None:
    """A pool whose workers are busy for long with what they have is as fast as it is, also if a batch of it ends."""
    mine, ended = holder(), queued(database, 1)
    queued(database, 1)
    [chunk, _] = claim(database, mine, 2)
    answer(database, mine, chunk, 70)
    sql(database, "UPDATE pools SET last_turn = last_turn - interval '1 hour'")
    database.call(turns.mend)
    assert sql(database, "SELECT batch_id FROM queue_changes WHERE is_over") == [(ended,)]
    database.call(turns.settle_abandoned)
    assert sql(database, "SELECT count(*) FROM queue_changes") == [(0,)]
    assert sql(database, "SELECT rate_tokens FROM pools") == [(70,)]


def test_a_window_that_would_end_before_its_turn_is_pulled_forward(database: Database) -> None:
    """A batch gets nine turns in ten once it could not be met otherwise, and its fair share as long as it could."""
    others = queued(database, 1000, tenant="a", size=10)
    due = queued(database, 400, tenant="b", size=10, window_s=86_400)
    served(database, 2)
    # 4,000 requests of 10 tokens.
    rate(database, 20)
    assert database.call(turns.pull_forward) == []
    sql(database, "UPDATE queue SET expire_time = clock_timestamp() + interval '40 min' WHERE batch_id = %s", due)
    assert database.call(turns.pull_forward) == [due]
    assert database.call(turns.pull_forward) == []
    assert Counter(served(database, 100)) == {due: 90, others: 10}
    # Now it is hopeless.
    sql(database, "UPDATE queue SET expire_time = clock_timestamp() + interval '4 min' WHERE batch_id = %s", due)
    assert database.call(turns.pull_forward) == []
    assert Counter(served(database, 20))[others] >= 19


def test_weights_can_be_changed(database: Database) -> None:
    """A tenant's weight counts from its next turn on; without one of its own it has that of all others."""
    database.call(turns.set_weights, {"a": 3.0, "b": 2.0}, 1.0)
    database.call(turns.set_weights, {"a": 2.0}, 0.5)
    rows = sql(database, "SELECT tenant, weight_of(tenant) FROM unnest(ARRAY['a', 'b', 'c']) AS tenant")
    assert rows == [("a", 2.0), ("b", 0.5), ("c", 0.5)]


def test_what_is_missing_in_the_queue_is_put_back(database: Database) -> None:
    """Batches that an older worker stored, chunks that it released, and batches that it completed, are noticed."""
    mine = holder()
    first, second = queued(database, 1), queued(database, 2)
    sql(database, "DELETE FROM queue WHERE batch_id = %s", first)
    assert {chunk.batch_id for chunk in claim(database, mine, 9)} == {second}
    database.call(turns.mend)
    [late] = claim(database, mine)
    assert late.batch_id == first
    assert claim(database, mine) == []
    pending = "UPDATE chunks SET state = 'pending', worker_id = NULL, incarnation = NULL, lease_until = NULL"
    sql(database, pending)
    assert claim(database, mine) == []
    database.call(turns.mend)
    assert len(claim(database, mine, 9)) == 3
    sql(database, "UPDATE batches SET state = 'completed'")
    database.call(turns.mend)
    claim(database, mine)
    assert sql(database, "SELECT batch_id FROM queue") == []
    assert sql(database, "SELECT in_flight FROM pool_tenants") == [(0,)]


def test_an_existing_database_is_migrated(database: Database) -> None:
    """What was in the queue of the version before has its turn, oldest first, also what a dead worker holds."""
    statements = """
        DROP TABLE pools, pool_tenants, queue, queue_changes, urgent_batches, tenant_weights CASCADE;
        DROP FUNCTION take_turns; DROP FUNCTION take_over_changes; DROP FUNCTION next_chunk; DROP FUNCTION weight_of;
        ALTER TABLE chunks DROP COLUMN charged;
        ALTER TABLE requests DROP COLUMN model;
        DROP INDEX chunks_pending;
        CREATE INDEX chunks_pending ON chunks (priority DESC, id) WHERE state = 'pending' AND deaths = 0;
        DELETE FROM schema_migration WHERE name IN ('0010_turns', '0023_mixed_models', '0028_many_entries');
        INSERT INTO batches (id, state, digest, metadata, priority, models, total)
        SELECT b, 'in_progress', '', '{}', 0, '{tiny}', 2 FROM generate_series(1, 3) b;
        INSERT INTO chunks (batch_id, first_index, count, unfinished, priority, models)
        SELECT b, i, 1, 1, 0, '{tiny}' FROM generate_series(1, 3) b, generate_series(0, 1) i;
        INSERT INTO requests SELECT b, i, 'c' || i, '', '{}' FROM generate_series(1, 3) b, generate_series(0, 1) i;
        UPDATE chunks SET state = 'leased', worker_id = 'dead', incarnation = gen_random_uuid(), lease_until = 'now'
        WHERE batch_id = 1
    """
    sql(database, statements)
    assert database.call(migrate)[:1] == ["0010_turns"]
    assert served(database, 3) == [2, 3, 2]
    assert database.call(suspects.bury, "dead").suspects == 2
    mine = holder()
    assert len(claim(database, mine, 9)) == 1


# What may happen to a queue, in any order.
ACTIONS = (
    "create",
    "claim",
    "claim",
    "claim",
    "answer",
    "answer",
    "answer",
    "give",
    "give",
    "release",
    "die",
    "cancel",
    "expire",
    "mend",
)


@FEW
@given(st.lists(st.tuples(st.sampled_from(ACTIONS), st.integers(0, 5), st.integers(0, 900)), max_size=40))
def test_no_order_of_claims_loses_or_doubles_a_request(database: Database, given: list[tuple[str, int, int]]) -> None:
    """Whatever happens, each request of a batch that is not cancelled ends with one result, and no charge is left.

    Chunks are divided at any moment, also twice as after a lost answer, and no request is under two leases at once.
    """
    clear(database)
    batches = [queued(database, 3, tenant="a", size=2)]
    lives = [holder(f"w{number}") for number in range(3)]
    held: dict[int, tuple[int, Any]] = {}
    # Of each chunk held, its requests without a result.
    left: dict[int, list[int]] = {}

    def take(which: int, limit: int) -> None:
        for chunk in claim(database, lives[which], limit):
            assert chunk.id not in held
            running = {
                index for other, (_, each) in held.items() if each.batch_id == chunk.batch_id for index in left[other]
            }
            left[chunk.id] = [request.index for request in database.call(chunks.unanswered, chunk)]
            assert not running & set(left[chunk.id])
            held[chunk.id] = (which, chunk)

    def drop(which: int) -> list[Any]:
        mine = [chunk for owner, chunk in held.values() if owner == which]
        for chunk in mine:
            del held[chunk.id]
        return mine

    for action, number, tokens in given:
        which = number % 3
        batch = batches[number % len(batches)]
        if action == "create":
            models = ("tiny",) if number % 2 else ()
            batches.append(
                queued(database, 1 + number, tenant="abc"[which], priority=tokens % 2, models=models, size=2)
            )
        elif action == "claim":
            take(which, 1 + number)
        elif action == "answer" and held:
            owner, chunk = list(held.values())[number % len(held)]
            done = len(left[chunk.id]) if tokens % 3 else 1
            answer(database, lives[owner], chunk, tokens, left[chunk.id][:done])
            del left[chunk.id][:done]
            if not left[chunk.id]:
                del held[chunk.id]
        elif action == "give" and held:
            owner, chunk = list(held.values())[number % len(held)]
            begun = tokens % (1 + len(left[chunk.id]))
            parts = [sharing.Part(chunk.id, [index]) for index in left[chunk.id][begun:]]
            parts = parts if tokens % 2 else [sharing.Part(chunk.id, left[chunk.id][begun:])]
            for _ in range(1 + number % 2):
                database.call(sharing.give, lives[owner], parts)
            del left[chunk.id][begun:]
            if not left[chunk.id]:
                del held[chunk.id]
        elif action == "release":
            database.call(chunks.release, lives[which], [chunk.id for chunk in drop(which)])
        elif action == "die":
            drop(which)
            database.call(suspects.bury, f"w{which}")
            lives[which] = holder(f"w{which}")
        elif action == "cancel" and tokens < 200 and batch is not batches[0]:
            database.call(endings.cancel, batch) if state(database, batch) == "in_progress" else None
        elif action == "expire" and tokens < 200 and batch is not batches[0]:
            sql(database, "UPDATE batches SET expire_time = clock_timestamp() WHERE id = %s", batch)
            database.call(endings.expire, 60)
        elif action == "mend":
            database.call(turns.mend)
    for number in range(3):
        drop(number)
        database.call(suspects.bury, f"w{number}")
    finish(database)
    assert sql(database, "SELECT id FROM chunks WHERE state <> 'done'") == []
    unfinished = sql(
        database,
        "SELECT b.id FROM batches b WHERE state = 'in_progress'"
        " OR state = 'completed' AND total <> (SELECT count(*) FROM results r WHERE r.batch_id = b.id)",
    )
    assert unfinished == []
    assert sql(database, "SELECT tenant FROM pool_tenants WHERE in_flight <> 0 OR waits") == []
    assert sql(database, "SELECT batch_id FROM queue UNION ALL SELECT batch_id FROM queue_changes") == []


def state(database: Database, batch_id: int) -> str:
    return str(sql(database, "SELECT state FROM batches WHERE id = %s", batch_id)[0][0])


def finish(database: Database) -> None:
    """Answers all that is left, suspects too."""
    mine = holder("last")

    def taken() -> Iterator[Any]:
        yield from claim(database, mine, 3)
        yield from database.call(suspects.claim_few, mine, ["tiny"], 0)
        yield from database.call(suspects.claim_alone, mine, ["tiny"])

    while found := list(taken()):
        for chunk in found:
            answer(database, mine, chunk, 7, [each.index for each in database.call(chunks.unanswered, chunk)])
    database.call(endings.settle_cancelled)
    database.call(turns.mend)
    claim(database, mine)
