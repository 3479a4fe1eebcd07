"""Near its end a batch uses all workers: what one holds and has not begun is divided for those that are idle."""

from collections import Counter

from service.db import sharing, work
from service.db.connection import Database
from tests.support.batches import finished, lines
from tests.support.queue import answer, claim, queued
from tests.support.servers import Stack
from tests.support.store import holder
from tests.support.waiting import until
from vllm_batch import Client

# One request at a time, each slower than all others together.
SLOW = {"simulated_request_s": 3, "simulated_window": 1, "window": 4}


def test_a_fast_worker_takes_what_a_slow_one_has_not_begun(stack: Stack, client: Client) -> None:
    """Also what waits in the engine of the other: it ends with one result each, and the slow one has begun few."""
    stack.gateway()
    slow = stack.worker("slow", **SLOW)
    stack.wait_until_accepting()
    batch = client.submit_lines(lines(90))
    until(lambda: client.get(batch.id).counts.running == 90, "the slow worker to hold all of it")
    stack.worker("fast", simulated_request_s=0.01)
    done = finished(client, batch.id)
    assert (done.counts.completed, done.counts.failed) == (90, 0)
    given = sum(int(str(event["requests"])) for event in slow.events("requests_given"))
    assert given >= 45
    database = Database(stack.database_url, "test")
    found = database.call(lambda db: db.execute_sql("SELECT incarnation FROM results").fetchall())
    database.close()
    assert len(Counter(found)) == 2
    assert max(Counter(found).values()) >= 45


def test_who_holds_what_another_could_run_is_asked(database: Database) -> None:
    """Only those that hold something of its models, and only while there is nothing to claim."""
    asked = holder("a")
    mine, foreign = queued(database, 2), queued(database, 1, models=("other",))
    [first, _] = claim(database, asked, 2)
    claim(database, asked, 1, ("other",))
    idle = holder("b")

    def take(models: tuple[str, ...], room: int) -> work.Work:
        return database.call(work.take, idle, models, 100, 0, None, room)

    assert (take(("tiny",), 3).is_scarce, take(("tiny",), 0).is_scarce) == (True, False)
    assert not take(("none",), 3).is_scarce
    queued(database, 1)
    found = take(("tiny",), 3)
    assert (len(found.chunks), found.is_scarce) == (1, False)
    assert database.call(sharing.give, asked, [sharing.Part(first.id, [first.first_index])]) == 1
    # What is not held any more is not given again.
    assert database.call(sharing.give, asked, [sharing.Part(first.id, [first.first_index])]) == 0
    [[again, requests]] = take(("tiny",), 3).chunks
    assert (again.batch_id, [each.index for each in requests]) == (mine, [first.first_index])
    assert answer(database, asked, first, 1) == 0
    assert answer(database, idle, again, 1) == 1
    assert foreign != mine


def test_as_many_chunks_are_claimed_as_their_requests_need(database: Database) -> None:
    """Small chunks do not cost a call each, and large ones are not piled up."""
    queued(database, 9, size=30)
    queued(database, 40, size=2, models=("small",))

    def taken(wanted: int, model: str) -> int:
        found = database.call(work.take, holder(), (model,), wanted, 0, None)
        return sum(chunk.count for chunk, _ in found.chunks)

    assert [taken(1, "tiny"), taken(100, "tiny")] == [30, 90]
    assert 30 < taken(60, "small") <= 60
