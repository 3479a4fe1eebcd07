"""The order in which the requests of a batch run: by shared prefixes or the file's; each still has one result."""

import json
import random
from collections import Counter
from itertools import groupby

import pytest

from service.db import batches, chunks, creation, endings, losses, results, suspects
from service.db.chunks import Chunk, Request
from service.db.connection import Database
from service.db.creation import Limits
from service.db.results import Result, Span
from tests.support.batches import count as rows_of
from tests.support.batches import finished
from tests.support.lives import check_invariants
from tests.support.prefixes import group_of, shuffled
from tests.support.servers import Stack
from tests.support.store import holder, stored, stored_lines
from tests.support.waiting import until
from vllm_batch import Client
from vllm_batch.v1 import batch_service_pb2 as pb

LIMITS = Limits(1_000, 1_000_000)


def claimed(database: Database, count: int = 1_000) -> list[tuple[Chunk, list[Request]]]:
    """All chunks there are, claimed by one worker, with their requests."""
    taken = database.call(chunks.claim, holder(), ["tiny"], count)
    return [(chunk, database.call(chunks.unanswered, chunk)) for chunk in taken]


def run_by(database: Database) -> list[str]:
    """The names of all requests in the order in which one worker runs them."""
    return [request.custom_id for _, requests in claimed(database) for request in requests]


def names(lines: list[bytes]) -> list[str]:
    return [json.loads(line)["custom_id"] for line in lines]


def answered(chunk: Chunk, requests: list[Request], status: int = 200) -> list[Result]:
    return [Result(chunk.id, chunk.batch_id, request.index, status_code=status, body="{}") for request in requests]


def test_shared_prefixes_run_together(database: Database) -> None:
    """Each group of a shuffled file runs in one piece, and each request once."""
    lines = shuffled(groups=30, each=20)
    batch = stored_lines(database, lines)
    run = run_by(database)
    assert sorted(run) == sorted(names(lines))
    assert len(list(groupby(run, key=group_of))) == 30
    assert batch.run_order == "prefix"


def test_long_requests_of_a_group_run_first(database: Database) -> None:
    """And those that are far longer than the others before all others, so that none is left for the end."""
    lines = shuffled(groups=10, each=40, lengths=[16] * 30 + [2_000] * 3 + [30_000])
    stored_lines(database, lines)
    asked = {name: json.loads(line)["body"]["max_tokens"] for name, line in zip(names(lines), lines, strict=True)}
    run = [(group_of(name), asked[name]) for name in run_by(database)]
    far_longer = [length for _, length in run if length == 30_000]
    assert [length for _, length in run[: len(far_longer)]] == far_longer
    rest = run[len(far_longer) :]
    assert len(list(groupby(rest, key=lambda place: place[0]))) == 10
    for _, group in groupby(rest, key=lambda place: place[0]):
        lengths = [length for _, length in group]
        assert lengths == sorted(lengths, reverse=True)


def test_lengths_alone_order_too(database: Database) -> None:
    """Without shared prefixes the longest run first, in chunks that are the smaller the longer their requests are."""
    lines = shuffled(groups=1, each=500, lengths=[16] * 9 + [20_000])
    asked = {name: json.loads(line)["body"]["max_tokens"] for name, line in zip(names(lines), lines, strict=True)}
    stored_lines(database, lines)
    run = claimed(database)
    lengths = [asked[request.custom_id] for _, requests in run for request in requests]
    assert lengths == sorted(lengths, reverse=True)
    assert len(run[0][1]) == 12
    assert max(len(requests) for _, requests in run) == 100


def test_the_order_of_the_file_can_be_asked_for(database: Database) -> None:
    """`input` runs the requests as they are in the file; a retry keeps to it."""
    lines = shuffled(groups=30, each=10, lengths=[16, 20_000])
    batch = stored_lines(database, lines, run_order="input")
    assert batch.run_order == "input"
    mine = holder()
    taken = database.call(chunks.claim, mine, ["tiny"], 1_000)
    run = [(chunk, database.call(chunks.unanswered, chunk)) for chunk in taken]
    assert [request.custom_id for _, requests in run for request in requests] == names(lines)
    for chunk, requests in run:
        database.call(results.write, answered(chunk, requests, status=500), mine.incarnation)
    again = database.call(creation.retry, batch.id, None, 60, LIMITS)
    assert again is not None
    assert again.run_order == "input"
    assert run_by(database) == names(lines)


def test_a_retry_orders_what_is_left(database: Database) -> None:
    """By the prefixes of the batch before, of which half has failed."""
    lines = shuffled(groups=20, each=20)
    batch = stored_lines(database, lines)
    mine = holder()
    for chunk in database.call(chunks.claim, mine, ["tiny"], 1_000):
        requests = database.call(chunks.unanswered, chunk)
        for status in (200, 500):
            group = [request for request in requests if (request.index % 2 == 0) == (status == 200)]
            database.call(results.write, answered(chunk, group, status), mine.incarnation)
    assert database.call(creation.retry, batch.id, None, 60, LIMITS) is not None
    run = run_by(database)
    assert sorted(run) == sorted(names(lines)[1::2])
    assert len(list(groupby(run, key=group_of))) == 20


def test_what_was_stored_before_runs_as_before(database: Database) -> None:
    """Chunks and requests of an older version, without an order or estimates, run in the order of their file."""
    batch = stored(database, 250)

    def older(db: object) -> None:
        db.execute_sql("UPDATE requests SET prefix = NULL, estimated_tokens = NULL")  # type: ignore[attr-defined]
        db.execute_sql("UPDATE chunks SET estimated_tokens = NULL")  # type: ignore[attr-defined]

    database.call(older)
    mine = holder()
    taken = database.call(chunks.claim, mine, ["tiny"], 10)
    assert [(chunk.first_index, chunk.count) for chunk in taken] == [(0, 100), (100, 100), (200, 50)]
    for chunk in taken:
        requests = database.call(chunks.unanswered, chunk)
        assert [request.index for request in requests] == list(
            range(chunk.first_index, chunk.first_index + chunk.count)
        )
        database.call(results.write, answered(chunk, requests, status=500), mine.incarnation)
    assert database.call(creation.retry, batch.id, None, 60, LIMITS) is not None
    assert [request.index for _, requests in claimed(database) for request in requests] == list(range(250))


def test_a_group_goes_to_one_worker(database: Database) -> None:
    """Two workers that claim in turn compute no prefix twice, and divide the last group when nothing else is left."""
    lines = shuffled(groups=4, each=300)
    stored_lines(database, lines)
    workers = {"a": holder("a"), "b": holder("b")}
    groups: dict[str, list[int]] = {"a": [], "b": []}
    for worker in "abbabaabbbaa":
        [chunk] = database.call(chunks.claim, workers[worker], ["tiny"], 1)
        requests = database.call(chunks.unanswered, chunk)
        groups[worker] += {group_of(request.custom_id) for request in requests}
    assert not set(groups["a"]) & set(groups["b"])

    stored_lines(database, shuffled(groups=2, each=300, seed=2)[:450])
    assert len(database.call(chunks.claim, workers["a"], ["tiny"], 1)) == 1
    assert len(database.call(chunks.claim, workers["b"], ["tiny"], 100)) >= 4
    assert database.call(chunks.claim, workers["a"], ["tiny"], 1) == []


def test_suspects_come_from_the_chunk_as_it_runs(database: Database) -> None:
    """Requests of a chunk that is no run of the file become suspects, each of them and no other."""
    stored_lines(database, shuffled(groups=20, each=10))
    mine = holder()
    [chunk] = database.call(chunks.claim, mine, ["tiny"], 1)
    requests = database.call(chunks.unanswered, chunk)
    assert [request.index for request in requests] != list(range(chunk.first_index, chunk.first_index + chunk.count))
    database.call(results.write, answered(chunk, requests[:30]), mine.incarnation)
    assert database.call(suspects.bury, "w").suspects == len(requests) - 30
    few = database.call(suspects.claim_few, holder(), ["tiny"], 0)
    again = [request for suspect in few for request in database.call(chunks.unanswered, suspect)]
    assert [request.index for request in again] == [request.index for request in requests[30 : 30 + len(few)]]


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.thorough) for seed in range(1, 4))])
def test_each_request_has_one_result_whatever_happens(database: Database, seed: int) -> None:
    """Two workers claim, answer, give back, lose their leases and die in any order: nothing is lost or doubled."""
    chosen = random.Random(seed)
    lines = shuffled(groups=12, each=25, seed=seed, lengths=[16, 3_000, 40_000])
    batch = stored_lines(database, lines, run_order=chosen.choice(["prefix", "prefix", "input"]))
    lives = {"a": holder("a"), "b": holder("b")}
    held: dict[str, list[Chunk]] = {"a": [], "b": []}
    for _ in range(10_000):
        worker = chosen.choice("ab")
        mine = lives[worker]
        match chosen.choice(["claim", "claim", "answer", "answer", "answer", "release", "die", "expire", "suspects"]):
            case "claim":
                held[worker] += database.call(chunks.claim, mine, ["tiny"], 2)
            case "suspects":
                held[worker] += database.call(suspects.claim_few, mine, ["tiny"], 0)
                held[worker] += database.call(suspects.claim_alone, mine, ["tiny"])
            case "answer" if held[worker]:
                chunk = chosen.choice(held[worker])
                left = database.call(chunks.unanswered, chunk)
                some = chosen.sample(left, chosen.randint(0, len(left)))
                database.call(results.write, answered(chunk, some), mine.incarnation)
            case "release":
                database.call(chunks.release, mine, [chunk.id for chunk in held[worker]])
                held[worker] = []
            case "die" if chosen.random() < 0.2:
                # What is still held afterwards is a zombie's, which writes nothing.
                database.call(suspects.bury, worker)
                lives[worker] = holder(worker)
            case "expire":
                database.call(lambda db: db.execute_sql("UPDATE chunks SET lease_until = clock_timestamp() - '1s'::interval WHERE state = 'leased'"))  # fmt: skip # noqa: E501
                database.call(losses.release_expired, 0.001)
        found = database.call(batches.get, batch.id)
        assert found is not None
        if found.is_terminal:
            break
    assert (found.state, found.completed + found.failed) == ("completed", 300)
    by_index = database.call(results.read_page, "index", "all", batch.id, Span(0, 1_000))
    assert [result.index for result in by_index] == list(range(300))
    assert [result.custom_id for result in by_index] == names(lines)
    by_sequence = database.call(results.read_page, "sequence", "all", batch.id, Span(1, 1_000))
    assert [result.sequence for result in by_sequence] == list(range(1, 301))


def test_cancelling_and_removing(database: Database) -> None:
    """What is removed of a batch that runs in another order is all of it, and of no other batch."""
    batch, other = (stored_lines(database, shuffled(groups=10, each=20, seed=seed)) for seed in (1, 2))
    mine = holder()
    [chunk] = database.call(chunks.claim, mine, ["tiny"], 1)
    requests = database.call(chunks.unanswered, chunk)
    database.call(results.write, answered(chunk, requests[:5]), mine.incarnation)
    database.call(endings.cancel, batch.id)
    database.call(chunks.drop_cancelled, mine, [chunk.id])
    database.call(endings.settle_cancelled)
    assert database.call(endings.delete, batch.id)
    while database.call(endings.purge, 50):
        pass
    assert len(run_by(database)) == other.total


def test_a_killed_worker_and_a_stream_that_follows(serving: Stack, client: Client) -> None:
    """Results arrive in input order without a gap while a batch runs in another, also when the worker is killed."""
    lines = shuffled(groups=25, each=20, vllm_xargs={"simulate": 0.05})
    batch = client.submit_lines(lines)
    assert batch.order == pb.RUN_ORDER_PREFIX
    worker = serving.servers[1]
    until(lambda: rows_of(serving, "results") > 100, "part of the batch")
    worker.kill()
    worker.start()
    read = [result.custom_id for result in client.results(batch.id, follow=True)]
    assert read == names(lines)
    done = finished(client, batch.id)
    assert (done.counts.completed, done.counts.failed) == (500, 0)
    until(lambda: rows_of(serving, "chunks WHERE state = 'leased'") == 0, "all chunks to be done")
    check_invariants(serving)
    first = Counter(
        group_of(result.custom_id) for result in list(client.results(batch.id, order="RESULT_ORDER_FINISHED"))[:100]
    )
    assert len(first) <= 20
