"""A batch whose model nobody serves any more says so, wherever somebody looks."""

from dataclasses import replace
from uuid import uuid4

from service.db import chunks, endings, heartbeats, results, turns, unserved
from service.db.connection import Database
from service.db.heartbeats import Beat
from tests.integration.test_cli import run
from tests.integration.test_metrics import scrape
from tests.support.batches import lines
from tests.support.ports import free_port
from tests.support.queue import claim, queued
from tests.support.servers import Stack
from tests.support.store import answers, count, holder, stored
from tests.support.waiting import until
from vllm_batch import Client
from vllm_batch.v1 import batch_service_pb2 as pb

# What docs/fleet.md promises, from the loss of the last worker of a model.
PROMISED_S = 15.0


def age(database: Database, table: str, column: str, hours: int) -> None:
    query = f"UPDATE {table} SET {column} = clock_timestamp() - make_interval(hours => %s)"
    database.call(lambda db: db.execute_sql(query, (hours,)))


def test_which_batches_and_since_when(database: Database) -> None:
    """Those that name models which no worker serves, from the last sign of one that did."""
    nobody = True

    def find() -> list[tuple[tuple[int, ...], int]]:
        found = database.call(unserved.find, lambda models: nobody and models == {"tiny"})
        return [(one.batches, round(one.age_s / 3600)) for one in found]

    first, second = stored(database, 2), stored(database, 2)
    age(database, "batches", "create_time", 9)
    ids = (first.id, second.id)
    assert find() == [(ids, 9)]
    tiny = Beat("w", uuid4(), "127.0.0.1:1", "ready", 1, models=("other", "tiny"))
    database.call(heartbeats.write, tiny)
    nobody = False
    assert find() == []
    nobody = True
    # It went away, and another came that has other models.
    age(database, "heartbeats", "last_seen", 5)
    other = replace(tiny, worker_id="v", models=("other",))
    database.call(heartbeats.write, other)
    assert find() == [(ids, 5)]
    # It came back with another model: what it served before shows in the results alone.
    mine = holder()
    [chunk, _] = database.call(chunks.claim, mine, ["tiny"], 2)
    database.call(results.write, answers(chunk, range(1)), mine.incarnation)
    age(database, "results", "finish_time", 3)
    database.call(heartbeats.write, other)
    database.call(heartbeats.write, replace(tiny, models=("other",)))
    assert find() == [(ids, 3)]
    # What has ended waits for nothing.
    database.call(results.write, answers(chunk, range(1, 2)), mine.incarnation)
    assert find() == [((second.id,), 9)]


def test_models_that_batches_wait_for(database: Database) -> None:
    """Those of batches with something to claim, from their creation on, until the last of them is claimed."""
    assert database.call(unserved.awaited) == frozenset()
    queued(database, 2, models=("tiny",))
    assert database.call(unserved.awaited) == {"tiny"}
    mine = holder()
    [first] = claim(database, mine)
    assert database.call(unserved.awaited) == {"tiny"}
    [_] = claim(database, mine)
    assert claim(database, mine) == []
    assert database.call(unserved.awaited) == frozenset()
    database.call(chunks.release, mine, [first.id])
    assert database.call(unserved.awaited) == {"tiny"}


def test_what_was_cancelled_waits_for_nothing(database: Database) -> None:
    """The end of a batch is noted by other workers where nobody serves its models, and not where somebody does."""
    for models in (("gone",), ("tiny",)):
        database.call(endings.cancel, queued(database, 2, models=models))
        queued(database, 1, models=("tiny",))
    claim(database, holder())
    database.call(turns.mend)
    assert database.call(unserved.awaited) == {"gone", "tiny"}
    for _ in range(3):
        database.call(turns.settle_abandoned)
    assert database.call(unserved.awaited) == {"tiny"}
    assert (count(database, "queue"), count(database, "queue_changes WHERE is_over")) == (3, 1)


def test_it_is_said_everywhere(stack: Stack, client: Client) -> None:
    """The log once, the metric, `get` and `status` name a batch of a model that is gone; with its model it goes on."""
    port = free_port()
    gateway = stack.gateway(heartbeat_timeout_s=2, gateway_metrics_port=port)
    alpha = stack.worker("a", model="alpha", window=1, lease_s=5)
    stack.wait_until_accepting()
    # One that loads may serve any model.
    stack.worker("b", model="beta", lease_s=5)
    until(lambda: set(client.service_status().models) == {"alpha", "beta"}, "both workers")
    batch = client.submit_lines(lines(3, model="alpha", vllm_xargs={"simulate": 1}))
    alpha.kill()
    [event] = until(lambda: gateway.events("models_unserved"), "the log to say it", PROMISED_S)
    assert (event["models"], event["first"]) == (["alpha"], [batch.id])
    until(lambda: not client.accepting(), "new work to be accepted")

    def waiting() -> float:
        return next(one.value for one in scrape(port) if one.name == "vllm_batch_unserved_batches")

    until(lambda: waiting() == 1, "the metric", PROMISED_S)
    until(lambda: client.get(batch.id).HasField("wait"), "the batch to say why it does not move", PROMISED_S)
    # Without the age, which differs from one moment to the next.
    why = client.get(batch.id).wait.message.partition(" (")[0]
    assert why in run(stack, "get", batch.id).stdout.decode()
    assert f"{batch.id} waits: {why}" in run(stack, "status").stdout.decode()
    stack.worker("c", model="alpha", lease_s=5)
    *_, done = client.watch(batch.id)
    assert (done.state, done.counts.completed) == (pb.BATCH_STATE_COMPLETED, 3)
    until(lambda: gateway.events("models_not_waited_for"), "the log to say that it is over")
    assert len(gateway.events("models_unserved")) == 1
    assert "waits" not in run(stack, "get", batch.id).stdout.decode()
    until(lambda: waiting() == 0, "the metric")
