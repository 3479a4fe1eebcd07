"""Failures alone and successes alone: streams of them lose and repeat nothing, and failures are counted by kind."""

import asyncio
import json
import random
from collections.abc import Sequence

import pytest

from service.api import messages, servicer
from service.api.servicer import BatchServicer
from service.db import chunks, results
from service.db.connection import Database
from service.db.creation import Limits
from service.db.results import Result
from service.errors import ApiError
from tests.support.store import holder, stored
from vllm_batch.v1 import batch_service_pb2 as pb

pytestmark = pytest.mark.usefixtures("called_by_anybody")

LIMITS = Limits(1000, 1_000_000)
LARGE = 100
ORDERS = (pb.RESULT_ORDER_INPUT, pb.RESULT_ORDER_FINISHED)
FILTERS = (pb.RESULT_FILTER_UNSPECIFIED, pb.RESULT_FILTER_SUCCEEDED, pb.RESULT_FILTER_FAILED)
FORMS = (pb.RESULT_FORMAT_MESSAGE, pb.RESULT_FORMAT_JSONL)


@pytest.fixture
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages, stretches and pieces so small that a short batch has many."""
    monkeypatch.setattr(results, "LARGE_BYTES", LARGE)
    monkeypatch.setattr(results, "STRETCH", 5)
    monkeypatch.setattr(servicer, "PAGE_BYTES", 400)
    monkeypatch.setattr(servicer, "LINES_BYTES", 600)


def outcome(kind: str, chunk: chunks.Chunk, index: int) -> Result:
    """A result that succeeded, with a body of some size, or failed in some way."""
    given: dict[str, object] = {
        "ok": {"status_code": 200, "body": "{}"},
        "large": {"status_code": 200, "body": json.dumps("x" * 3 * LARGE)},
        "error": {"error_code": "E", "error_message": f"failed at {index}"},
        "refused": {"status_code": 400, "body": json.dumps({"error": {"message": f"no {index}", "type": "T"}})},
        "large refused": {"status_code": 500, "body": json.dumps("y" * 2 * LARGE)},
    }[kind]
    return Result(chunk.id, chunk.batch_id, index, custom_id=f"c{index}", **given)  # type: ignore[arg-type]


def groups(kinds: Sequence[str | None], order: Sequence[int]) -> list[list[int]]:
    """The requests that finished, in groups of a few, within which they are numbered as in the input."""
    finished = [index for index in order if kinds[index] is not None]
    return [sorted(finished[first : first + 3]) for first in range(0, len(finished), 3)]


def store(database: Database, kinds: Sequence[str | None], order: Sequence[int]) -> int:
    """A batch whose requests finished in this order; None: not finished."""
    batch = stored(database, len(kinds))
    mine = holder()
    [chunk] = database.call(chunks.claim, mine, ["tiny"], 1)
    for group in groups(kinds, order):
        finished = [outcome(kinds[index] or "", chunk, index) for index in group]
        database.call(results.write, finished, mine.incarnation)
    return batch.id


def read(database: Database, batch_id: int, **asked: object) -> list[pb.StreamResultsResponse]:
    """What StreamResults sends."""

    async def all_pages() -> list[pb.StreamResultsResponse]:
        request = pb.StreamResultsRequest(batch_id=messages.batch_name(batch_id), **asked)  # type: ignore[arg-type]
        answers = BatchServicer(database, LIMITS).StreamResults(request, None)  # type: ignore[arg-type]
        return [response async for response in answers]

    return asyncio.run(all_pages())


def names(pages: Sequence[pb.StreamResultsResponse]) -> list[str]:
    """The custom_ids in pages of either form, in order."""
    lines = b"".join(page.jsonl for page in pages).decode().splitlines()
    return [json.loads(line)["custom_id"] for line in lines] or [
        each.custom_id for page in pages for each in page.results
    ]


def expected(kinds: Sequence[str | None], order: Sequence[int], asked: int, wanted: int) -> list[str]:
    """The custom_ids that a stream has to send."""
    if asked == pb.RESULT_ORDER_FINISHED:
        sent = [index for group in groups(kinds, order) for index in group]
    else:
        # Of a batch in progress, only up to the first request without a result.
        gap = next((index for index, kind in enumerate(kinds) if kind is None), len(kinds))
        sent = list(range(gap))
    is_success = {"ok": True, "large": True, "error": False, "refused": False, "large refused": False}
    matching = {pb.RESULT_FILTER_SUCCEEDED: (True,), pb.RESULT_FILTER_FAILED: (False,)}.get(wanted, (True, False))
    return [f"c{index}" for index in sent if is_success[kinds[index] or ""] in matching]


@pytest.mark.usefixtures("small_limits")
@pytest.mark.parametrize("seed", range(6))
def test_a_filtered_stream_has_what_it_should_from_wherever_it_goes_on(database: Database, seed: int) -> None:
    """For any mixture of outcomes, finished in any order, with requests still open or not: a stream has the results
    asked for, each once and in order, and resumes after each of its pages."""
    chance = random.Random(seed)
    weights = chance.choice([(9, 1, 1, 1, 1, 0), (1, 0, 9, 9, 1, 0), (30, 1, 1, 0, 1, 1), (0, 0, 1, 0, 0, 0)])
    choices = ("ok", "large", "error", "refused", "large refused", None)
    kinds = chance.choices(choices, weights, k=chance.randint(1, 40))
    order = chance.sample(range(len(kinds)), len(kinds))
    batch_id = store(database, kinds, order)
    for asked in ORDERS:
        for wanted in FILTERS:
            for form in FORMS:
                pages = read(database, batch_id, order=asked, filter=wanted, format=form)
                sent = expected(kinds, order, asked, wanted)
                assert names(pages) == sent
                whole = b"".join(page.jsonl for page in pages)
                for number, page in enumerate(pages, 1):
                    token = page.resume_token
                    rest = read(database, batch_id, order=asked, filter=wanted, format=form, resume_token=token)
                    if form == pb.RESULT_FORMAT_JSONL:
                        assert b"".join(each.jsonl for each in [*pages[:number], *rest]) == whole
                    else:
                        assert names([*pages[:number], *rest]) == sent


def test_a_token_belongs_to_its_filter(database: Database) -> None:
    """Resuming with another filter or order would leave results out: it is refused by the name of the field."""
    batch_id = store(database, ["ok", "error", "ok"], [2, 1, 0])
    for asked in ORDERS:
        for wanted in FILTERS:
            token = read(database, batch_id, order=asked, filter=wanted)[-1].resume_token
            for other_order in ORDERS:
                for other in FILTERS:
                    if (other_order, other) == (asked, wanted):
                        continue
                    with pytest.raises(ApiError, match="resume_token"):
                        read(database, batch_id, order=other_order, filter=other, resume_token=token)
    with pytest.raises(ApiError, match="filter"):
        read(database, batch_id, filter=9)


@pytest.mark.usefixtures("small_limits")
def test_failures_are_followed_as_they_come(database: Database) -> None:
    """A stream of failures that follows a batch sends each once, in both orders, and ends with the batch."""
    count = 40
    batch = stored(database, count)
    mine = holder()
    [chunk] = database.call(chunks.claim, mine, ["tiny"], 1)

    async def follow(order: int) -> list[str]:
        request = pb.StreamResultsRequest(
            batch_id=messages.batch_name(batch.id), order=order, filter=pb.RESULT_FILTER_FAILED, follow=True
        )
        served = BatchServicer(database, LIMITS)
        served._watch.interval_s = 0.01
        return [each.custom_id async for page in served.StreamResults(request, None) for each in page.results]  # type: ignore[arg-type]

    async def finish() -> None:
        for index in range(count):
            kind = "error" if index % 13 == 12 else "ok"
            await database.run(results.write, [outcome(kind, chunk, index)], mine.incarnation)

    async def both() -> tuple[list[str], list[str], None]:
        return await asyncio.gather(follow(ORDERS[0]), follow(ORDERS[1]), finish())

    in_order, as_finished, _ = asyncio.run(both())
    assert in_order == as_finished == ["c12", "c25", "c38"]


def test_failures_are_found_by_their_index(database: Database) -> None:
    """Neither a stream of failures nor counting them reads what succeeded, however much of that there is."""
    fill = """
    INSERT INTO batches (state, digest, metadata, priority, models, total, completed, failed, end_time)
    VALUES ('completed', '', '{}', 0, '{tiny}', 20000, 19999, 1, now()) RETURNING id
    """
    [batch_id] = database.call(lambda db: db.execute_sql(fill).fetchone())
    rows = """
    INSERT INTO results (batch_id, index, sequence, status_code, body, incarnation, custom_id)
    SELECT %(id)s, i, i + 1, CASE i WHEN 15000 THEN 400 ELSE 200 END, repeat('{}', 50), gen_random_uuid(), 'c' || i
    FROM generate_series(0, 19999) i
    """
    database.call(lambda db: db.execute_sql(rows, {"id": batch_id}))
    database.call(lambda db: db.execute_sql("ANALYZE results"))
    for order in ORDERS:
        assert names(read(database, batch_id, order=order, filter=pb.RESULT_FILTER_FAILED)) == ["c15000"]
        column = "index" if order == pb.RESULT_ORDER_INPUT else "sequence"
        plan = f"EXPLAIN SELECT {column} FROM results r WHERE batch_id = %s AND {column} >= 0 AND {results.FAILED}"
        plan += f" ORDER BY {column} LIMIT 5000"
        found = database.call(lambda db, plan=plan: db.execute_sql(plan, (batch_id,)).fetchall())
        assert "results_failed" in str(found), found


def test_kinds_of_failure_with_counts_and_an_example(database: Database) -> None:
    """Failures that differ in numbers and quoted texts are one kind, whatever succeeded beside them."""
    batch = stored(database, 60)
    mine = holder()
    [chunk] = database.call(chunks.claim, mine, ["tiny"], 1)
    given = []
    for index in range(60):
        what: dict[str, object] = {"status_code": 200, "body": "{}"}
        if index % 3 == 1:
            error = {"message": f"the prompt has {index} tokens, user's limit is 'm{index}'", "type": "BadRequestError"}
            what = {"status_code": 400, "body": json.dumps({"error": error})}
        elif index % 20 == 2:
            what = {"error_code": "REQUEST_CRASHED_ENGINE", "error_message": "The engine died 3 times."}
        given.append(Result(chunk.id, chunk.batch_id, index, custom_id=f"c{index}", **what))  # type: ignore[arg-type]
    database.call(results.write, given, mine.incarnation)
    request = pb.ListErrorsRequest(batch_id=messages.batch_name(batch.id))
    answer = asyncio.run(BatchServicer(database, LIMITS).ListErrors(request, None))  # type: ignore[arg-type]
    refused, crashed = answer.kinds
    assert (refused.status_code, refused.type, refused.count) == (400, "BadRequestError", 20)
    assert refused.message == "the prompt has N tokens, user's limit is …"
    assert refused.example_custom_id == "c1"
    assert refused.example_message == "the prompt has 1 tokens, user's limit is 'm1'"
    assert (crashed.code, crashed.count, crashed.example_custom_id) == ("REQUEST_CRASHED_ENGINE", 2, "c2")
    assert (answer.other_count, answer.is_partial) == (0, False)
