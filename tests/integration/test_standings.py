"""Where batches stand, as the database has it."""

import json

from service.db import chunks, creation, results, standings
from service.db.connection import Database
from service.db.limits import Limits
from service.db.results import Result
from service.db.standings import Cost, Work
from tests.support.queue import answer, claim, queued
from tests.support.store import holder, stored_lines

TINY = frozenset({"tiny"})


def test_what_is_done_and_left_in_tokens(database: Database) -> None:
    """A mark has the tokens of its batch so far; what the results were estimated to use is the same before and after
    the queue has taken it over; what is left of others counts as theirs did so far, or else as estimated."""
    mine = holder()
    batch_id = queued(database, 4, size=20, estimate=100)
    first, second = claim(database, mine, 2)
    answer(database, mine, first, 30)
    answer(database, mine, second, 60, range(20, 25))
    higher = queued(database, 2, size=20, priority=1, estimate=50)

    asked = {batch_id: TINY, higher: TINY}
    queue, found = database.call(standings.read, asked, [TINY])
    standing = found[batch_id]
    assert [(mark.count, mark.tokens) for mark in standing.marks] == [(0, 900), (16, 270)]
    assert standing.cost == Cost(2_500, 8_000)
    assert found[higher].cost == Cost(0, 2_000)
    assert queue.held == {"w": Work(15, 1_500)}
    assert queue.unfinished == {TINY: {0: Work(55, 1_980), 1: Work(40, 2_000)}}

    [urgent] = claim(database, mine)
    assert urgent.batch_id == higher
    queue, found = database.call(standings.read, asked, [TINY])
    assert found[batch_id].cost == standing.cost
    # As much as the tenant's estimates turned out to be worth.
    assert queue.held == {"w": Work(35, 1_860)}


def test_a_retry_is_estimated_by_its_own_requests(database: Database) -> None:
    """If the long requests failed, their retry is as long as they are."""
    body = {"model": "tiny", "messages": []}
    lines = [
        {"custom_id": str(tokens), "url": "/v1/chat/completions", "body": body | {"max_tokens": tokens}}
        for tokens in (10, 5_000)
    ]
    batch = stored_lines(database, (json.dumps(line).encode() + b"\n" for line in lines))
    mine = holder()
    [chunk] = database.call(chunks.claim, mine, ["tiny"], 1)
    group = [Result(chunk.id, batch.id, index, 200 if index == 0 else 500, "{}") for index in range(2)]
    database.call(results.write, group, mine.incarnation)
    again = database.call(creation.retry, batch.id, None, 60, Limits(100, 1000))
    assert again is not None
    cost = database.call(standings.read, {again.id: TINY}, [])[1][again.id].cost
    assert cost.total > 5_000
