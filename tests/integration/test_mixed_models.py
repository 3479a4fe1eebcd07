"""A batch that names several models: each worker runs the requests of its own, and the rest waits for others."""

import hashlib
import json
from collections.abc import Sequence, Set

import grpc
import pytest
from openai import OpenAI

from service.db import chunks, creation, results, sharing, standings, suspects, turns, unserved
from service.db.batches import Batch
from service.db.chunks import Chunk
from service.db.connection import Database
from service.db.creation import Options
from service.db.limits import Limits
from service.db.losses import IS_MISSING
from service.db.results import Result
from service.db.run_order import RunOrder
from service.db.sharing import Part
from service.worker.intake import Rows
from service.worker.offer import Offer
from tests.support.batches import URL, count, finished, line, refused, run_sql
from tests.support.queue import answer, claim
from tests.support.servers import Stack
from tests.support.store import SIZES, holder
from tests.support.waiting import until
from vllm_batch import Client
from vllm_batch.v1 import batch_service_pb2 as pb

UNAVAILABLE = grpc.StatusCode.UNAVAILABLE
MODELS = ("alpha", "beta", None)


def stored(database: Database, models: Sequence[str | None], run_order: RunOrder = "prefix") -> Batch:
    """Stores a batch with a request for each of these models."""
    batch_id = database.call(creation.reserve)
    rows = Rows(batch_id, Offer({"alpha", "beta"}, {URL}), SIZES, run_order=run_order)
    given = b"".join(line(f"c{i}", model=model) for i, model in enumerate(models))
    copied = rows.feed(given) + rows.end()
    return database.call(creation.create, batch_id, Options(run_order=run_order), rows.content, copied, False, 60, None)


def sql(database: Database, query: str, *values: object) -> list[tuple[object, ...]]:
    return list(database.call(lambda db: db.execute_sql(query, values)).fetchall())


def indexes(database: Database, chunk: Chunk) -> list[int]:
    return [request.index for request in database.call(chunks.unanswered, chunk)]


def in_flight(database: Database) -> set[object]:
    """What is charged for claimed chunks, once all changes are taken over."""
    sql(database, "SELECT count(*) FROM take_turns('{alpha,beta}', 0, 'w', gen_random_uuid(), 60)")
    rows = sql(database, "SELECT in_flight FROM queue UNION ALL SELECT in_flight FROM pool_tenants")
    return {value for (value,) in rows}


def test_a_sequence_that_begins_again(database: Database) -> None:
    """A batch of several models is stored beside others also after a failover to a standby that was a little behind."""
    for _ in range(2):
        sql(database, "SELECT setval(pg_get_serial_sequence('batches', 'id'), 1, false)")
        stored(database, ["alpha", "beta"])
    assert sql(database, "SELECT count(*), count(DISTINCT batch_id) FROM queue") == [(4, 4)]


@pytest.mark.parametrize("run_order", ["prefix", "input"])
def test_each_worker_claims_its_models(database: Database, run_order: RunOrder) -> None:
    """A chunk is of one model, in the order of the batch; a request that names none is anybody's."""
    given = [MODELS[i % 3] for i in range(450)]
    batch = stored(database, given, run_order)
    assert batch.models == ["alpha", "beta"]
    mine, other = holder("a"), holder("b")
    alpha = claim(database, mine, 9, ["alpha"])
    assert {given[index] for chunk in alpha for index in indexes(database, chunk)} == {"alpha", None}
    beta = claim(database, other, 9, ["beta"])
    assert [index for chunk in beta for index in indexes(database, chunk)] == list(range(1, 450, 3))
    assert sum(chunk.count for chunk in alpha + beta) == 450
    assert claim(database, mine, 1, ["alpha", "beta"]) == []
    for chunk in alpha:
        answer(database, mine, chunk, 5, indexes(database, chunk))
    # What is put back is there for those who serve it.
    assert database.call(chunks.release, other, [chunk.id for chunk in beta]) == len(beta)
    assert claim(database, mine, 1, ["alpha"]) == []
    for chunk in claim(database, mine, 9, ["alpha", "beta"]):
        answer(database, mine, chunk, 5, indexes(database, chunk))
    assert sql(database, "SELECT state, completed FROM batches") == [("completed", 450)]
    assert in_flight(database) == {0}
    database.call(turns.mend)
    in_flight(database)
    assert sql(database, "SELECT FROM queue") == []


def test_all_ways_of_a_chunk(database: Database) -> None:
    """Chunks that are divided, and suspects, stay those of their model; what was charged for them is taken back."""
    batch = stored(database, ["alpha"] * 10 + ["beta"] * 10)
    mine, other = holder("a"), holder("b")
    [chunk] = claim(database, other, 9, ["beta"])
    assert database.call(sharing.give, other, [Part(chunk.id, [18, 19])]) == 2
    assert claim(database, mine, 9, ["alpha"])[0].count == 10
    [given] = claim(database, mine, 9, ["beta"])
    assert indexes(database, given) == [18, 19]
    database.call(chunks.begin, other, {chunk.id: 11})
    database.call(suspects.bury, other.worker_id)
    [rest] = claim(database, mine, 9, ["beta"])
    assert indexes(database, rest) == list(range(12, 18))
    assert database.call(suspects.waiting, ["alpha"]) == (0, 0)
    assert database.call(suspects.waiting, ["beta"]) == (2, 0)
    database.call(chunks.release_others, mine, [])
    assert in_flight(database) == {0}
    assert [one.batches for one in database.call(unserved.find, lambda models: models == {"beta"})] == [(batch.id,)]


def waiting_models(database: Database, batch: Batch) -> Set[frozenset[str]]:
    asked = {batch.id: frozenset(batch.models)}
    return database.call(standings.read, asked, [])[1][batch.id].waiting_models


def test_which_models_the_rest_waits_for(database: Database) -> None:
    """What waits of a batch are the models of its pending chunks and suspects, and of no others."""
    batch = stored(database, ["alpha"] * 3 + ["beta"] * 3)
    alpha, beta = frozenset({"alpha"}), frozenset({"beta"})
    assert waiting_models(database, batch) == {alpha, beta}
    mine, other = holder("a"), holder("b")
    [chunk] = claim(database, mine, 9, ["alpha"])
    answer(database, mine, chunk, 5, indexes(database, chunk))
    assert waiting_models(database, batch) == {beta}
    [chunk] = claim(database, other, 9, ["beta"])
    database.call(chunks.begin, other, {chunk.id: 5})
    database.call(suspects.bury, other.worker_id)
    assert database.call(suspects.waiting, ["beta"]) == (3, 0)
    assert waiting_models(database, batch) == {beta}


@pytest.mark.parametrize("query", [standings.PENDING, unserved.WANTED, turns.UNNOTICED], ids=["rest", "wanted", "mend"])
def test_the_number_of_chunks_that_wait_costs_nothing(database: Database, query: str) -> None:
    """What a batch waits for is read by the heads of indexes: as many pages for 20,000 chunks as for 20."""
    batch = stored(database, ["alpha", "beta"])
    in_flight(database)
    explain = "EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON)"

    def pages() -> int:
        asked = {"ids": [batch.id]}
        [[[plan]]] = database.call(lambda db: db.execute_sql(f"{explain} {query}", asked).fetchall())
        return int(plan["Plan"]["Shared Hit Blocks"] + plan["Plan"]["Shared Read Blocks"])

    more = (
        "INSERT INTO chunks (batch_id, first_index, count, unfinished, priority, models)"
        f" SELECT {batch.id}, 2, 1, 1, 0, ARRAY['beta'] FROM generate_series(1, %s)"
    )
    sql(database, f"{more} RETURNING id", 20)
    few = pages()
    sql(database, f"{more} RETURNING id", 20_000)
    assert pages() <= few + 10


def test_a_worker_of_very_many_models(database: Database) -> None:
    """A worker with a thousand adapters of long names, which no row of a B-tree holds, claims as any other does."""
    adapters = [hashlib.sha256(b"%d" % number).hexdigest() for number in range(1000)]
    batch_id = database.call(creation.reserve)
    rows = Rows(batch_id, Offer(set(adapters), {URL}), SIZES)
    copied = rows.feed(b"".join(line(f"c{i}", model=model) for i, model in enumerate(adapters[:20]))) + rows.end()
    mine = holder()
    assert claim(database, mine, 1, adapters) == []
    database.call(creation.create, batch_id, Options(), rows.content, copied, False, 60, None)
    assert len(claim(database, mine, 30, adapters)) == 20
    assert sql(database, "SELECT count(*) FROM pools") == [(1,)]


def test_a_retry_waits_for_the_models_that_failed(database: Database) -> None:
    """A retry of a batch of several models has chunks of those whose requests failed, and waits for no other."""
    batch = stored(database, ["alpha", "beta", "alpha"])
    mine = holder()
    for chunk in claim(database, mine, 9, ["alpha", "beta"]):
        found = indexes(database, chunk)
        status = 400 if found == [1] else 200
        given = [Result(chunk.id, batch.id, index, status_code=status, body="{}") for index in found]
        database.call(results.write, given, mine.incarnation)
    retried = database.call(creation.retry, batch.id, None, 60, Limits(10, 10))
    assert retried is not None
    assert claim(database, mine, 9, ["alpha"]) == []
    assert [chunk.batch_id for chunk in claim(database, mine, 9, ["beta"])] == [retried.id]


def test_beside_programs_of_before(database: Database) -> None:
    """A gateway of before takes entries for ended batches, and a worker stores requests without models: all run."""
    batch = stored(database, ["alpha", "beta"])
    over = "INSERT INTO queue_changes (pool_id, batch_id, tenant, is_over) SELECT pool_id, batch_id, tenant, true"
    database.call(lambda db: db.execute_sql(f"{over} FROM queue q WHERE of_batch IS NOT NULL"))
    assert [chunk.count for chunk in claim(database, holder(), 9, ["beta"])] == [1]
    database.call(lambda db: db.execute_sql("UPDATE requests SET model = NULL"))
    database.call(lambda db: db.execute_sql("UPDATE batches SET state = 'failed', end_time = clock_timestamp()"))
    retried = database.call(creation.retry, batch.id, None, 60, Limits(10, 10))
    assert retried is not None
    assert claim(database, holder(), 9, ["beta"]) == []
    claimed = claim(database, holder(), 9, ["alpha", "beta"])
    assert [chunk.count for chunk in claimed if chunk.batch_id == retried.id] == [2]


def answered_by(client: Client, batch_id: str) -> list[str]:
    """The model of the worker that answered each request, in input order."""
    return [json.loads(one.response.body_json)["model"] for one in client.results(batch_id)]


def test_a_file_of_two_hosts_models(stack: Stack, client: Client) -> None:
    """Each host runs its part, by both doors; what is for the dead one waits, says so, and runs when it is back."""
    stack.gateway(heartbeat_timeout_s=5)
    stack.worker("a", model="alpha", lease_s=5)
    beta = stack.worker("b", model="beta", lease_s=5, window=2)
    stack.http()
    stack.wait_until_accepting()
    until(lambda: client.service_status().models == ["alpha", "beta"], "both workers")
    models = ["alpha", "beta"] * 20
    mixed = [line(f"c{i}", model=model) for i, model in enumerate(models)]
    batch = finished(client, client.submit_lines(mixed, require_live=True).id)
    assert (batch.state, list(batch.models)) == (pb.BATCH_STATE_COMPLETED, ["alpha", "beta"])
    assert answered_by(client, batch.id) == models
    with OpenAI(base_url=stack.base_url, api_key="none", max_retries=0) as door:
        file = door.files.create(file=("mixed.jsonl", b"".join(mixed)), purpose="batch")
        made = door.batches.create(input_file_id=file.id, endpoint=URL, completion_window="24h")
        until(lambda: door.batches.retrieve(made.id).status == "completed", "the door's batch")

    slow = [line(f"c{i}", model=model, vllm_xargs={"simulate": 0.5}) for i, model in enumerate(models)]
    held = client.submit_lines(slow)
    until(lambda: client.get(held.id).counts.completed, "some of it")
    beta.kill()
    until(lambda: client.get(held.id).wait.message.endswith("the requests that are left are for beta"), "its reason")
    assert client.get(held.id).counts.completed >= 20
    # The others of a new batch run, too, whichever come first.
    later = [client.submit_lines(mixed), client.submit_lines(mixed[::-1])]
    for one in later:
        until(lambda one=one: client.get(one.id).counts.completed == 20, "what alpha serves")
    until(
        lambda: count(stack, f"heartbeats h WHERE worker_id LIKE '%:b' AND {IS_MISSING}"), "its heartbeats to be missed"
    )
    away = refused(lambda: client.submit_lines(mixed, require_live=True, request_id="live"))
    assert (away.code, away.reason, away.metadata["models"]) == (grpc.StatusCode.UNAVAILABLE, "WORKER_OFFLINE", "beta")
    wrong = refused(lambda: client.submit_lines([mixed[0], line("x", model="gamma")]))
    assert wrong.code is grpc.StatusCode.INVALID_ARGUMENT
    assert "line 2: body.model: 'gamma' is not served; available: alpha, beta" in str(wrong)
    # What nobody can begin is refused, by the gateway or, if that does not see all of it, by the worker; the door keeps
    # it.
    for long in (1, 400_000):
        alone = [line(f"c{i}", model="beta", user="x" * long) for i in range(2)]
        away = refused(lambda alone=alone, long=long: client.submit_lines(alone, request_id=f"alone-{long}"))
        assert (away.code, away.reason, away.metadata["models"]) == (UNAVAILABLE, "WORKER_OFFLINE", "beta")
    with OpenAI(base_url=stack.base_url, api_key="none", max_retries=0) as door:
        made = {}
        for name, lines in {"alone": alone, "mixed": mixed[::-1]}.items():
            file = door.files.create(file=(f"{name}.jsonl", b"".join(lines)), purpose="batch")
            made[name] = door.batches.create(input_file_id=file.id, endpoint=URL, completion_window="24h")
        until(lambda: door.batches.retrieve(made["mixed"].id).status == "in_progress", "the door's mixed batch")
        until(lambda: count(stack, "file_batches WHERE away = '{beta}'"), "the other to be found to wait")
        assert door.batches.retrieve(made["alone"].id).status == "validating"
        beta.start()
        for one in made.values():
            until(lambda one=one: door.batches.retrieve(one.id).status == "completed", "the door's batches")
    for waiting, order in ((held, models), (later[0], models), (later[1], models[::-1])):
        done = finished(client, waiting.id)
        assert (done.state, done.counts.completed) == (pb.BATCH_STATE_COMPLETED, 40)
        assert answered_by(client, waiting.id) == order


def test_a_model_that_is_loaded_again(stack: Stack, client: Client) -> None:
    """While a worker loads again what it served, its models are away and not unknown, and other names are wrong."""
    stack.gateway()
    stack.worker("a", model="alpha")
    stack.wait_until_accepting()
    beta = stack.worker("b", model="beta", simulated_load_s=600)
    loads = "heartbeats WHERE worker_id LIKE '%:b' AND phase = 'loading'"
    until(lambda: count(stack, loads), "it to load for the first time")
    mixed = [line("a", model="alpha"), line("b", model="beta")]
    unknown = refused(lambda: client.submit_lines(mixed))
    assert (unknown.code, unknown.reason) == (UNAVAILABLE, "WORKER_LOADING")
    beta.kill()
    served = f"""models = '{{beta}}', detail = detail || '{{"urls": ["{URL}"]}}'"""
    run_sql(stack, f"UPDATE heartbeats SET phase = 'ready', {served} WHERE worker_id LIKE '%:b'")
    beta.start()
    until(lambda: count(stack, loads), "it to load again")
    batch = client.submit_lines(mixed)
    until(lambda: client.get(batch.id).counts.completed == 1, "what alpha serves")
    until(lambda: client.get(batch.id).wait.reason == pb.WAIT_REASON_WORKER_LOADING, "the reason of the rest")
    wrong = refused(lambda: client.submit_lines([mixed[0], line("x", model="gamma")]))
    assert wrong.code is grpc.StatusCode.INVALID_ARGUMENT
    until(lambda: client.service_status().models == ["alpha"], "only what is served now")
    beta.kill()
    stack.worker("b", model="delta", simulated_load_s=600)
    until(lambda: count(stack, f"{loads} AND models = '{{}}'"), "other settings to make its models unknown")
