"""A worker that is told to stop finishes its requests, reports `draining` meanwhile, and leaves nothing behind."""

import psutil
import psycopg2

from service.processes import is_alive
from tests.support.batches import count, finished, health, lines
from tests.support.servers import Stack
from tests.support.waiting import until
from vllm_batch import Client

COUNT, WINDOW = 250, 32
BATCH_SERVICE = "vllm_batch.v1.BatchService"


def beat(stack: Stack) -> tuple[str, float]:
    """The phase in the heartbeat, and when it was written."""
    with psycopg2.connect(stack.database_url) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT phase, extract(epoch FROM last_seen)::float8 FROM heartbeats")
        [row] = cursor.fetchall()
        return row


def claimed(stack: Stack) -> int:
    """How many requests the workers have claimed, in all lives so far."""
    return sum(int(str(event["requests"])) for event in stack.servers[-1].events("chunk_claimed"))


def claimed_while_draining(log: str) -> int:
    """How many chunks were claimed after the worker logged that it drains."""
    _, drains, after = log.partition('"phase": "draining"')
    assert drains
    return after.count('"chunk_claimed"')


def test_draining_worker_says_so_to_its_end(stack: Stack, client: Client) -> None:
    """A draining worker claims nothing, finishes what is in its engine, keeps beating, and ends all its processes."""
    stack.gateway()
    worker = stack.worker(log_level="DEBUG", window=WINDOW, simulated_window=WINDOW)
    stack.wait_until_accepting()
    family = psutil.Process(worker.process.pid).children(recursive=True)
    assert family
    batch = client.submit_lines(lines(COUNT, vllm_xargs={"simulate": 1}))
    until(lambda: count(stack, f"heartbeats WHERE (detail->>'in_engine')::int = {WINDOW}"), "a full engine")

    worker.process.terminate()
    until(lambda: beat(stack)[0] == "draining", "a heartbeat that says draining")
    assert health(f"127.0.0.1:{worker.port}", BATCH_SERVICE) == "NOT_SERVING"
    _, first_s = beat(stack)
    until(lambda: beat(stack) > ("draining", first_s), "another heartbeat while draining")
    assert worker.process.wait(30) == 0

    assert beat(stack)[0] == "stopping"
    assert not any(is_alive(process) for process in family)
    assert claimed_while_draining(worker.log.read_text()) == 0
    before = claimed(stack)
    stored = client.get(batch.id).counts.completed
    assert WINDOW <= stored < COUNT
    assert count(stack, "chunks WHERE state = 'leased' OR deaths > 0") == 0

    # The next life runs what is left, and nothing else.
    worker.start()
    assert finished(client, batch.id).counts.completed == COUNT
    assert claimed(stack) == before + COUNT - stored


def test_drain_that_never_ends(stack: Stack, client: Client) -> None:
    """A request that outlasts the drain timeout is released without blame, and the worker ends."""
    stack.gateway()
    worker = stack.worker(drain_timeout_s=0.5)
    stack.wait_until_accepting()
    batch = client.submit_lines(lines(3, vllm_xargs={"simulate": 3600}))
    until(lambda: count(stack, "heartbeats WHERE (detail->>'in_engine')::int = 3"), "the requests to run")
    assert worker.terminate() == 0
    assert worker.events("drain_timeout")
    log = worker.log.read_text()
    assert log.index('"chunks_given_back"') < log.index('"stopping"'), "it went on to its end before all was given back"
    assert count(stack, "chunks WHERE state = 'pending' AND deaths = 0") == 1
    assert client.get(batch.id).counts.completed == 0
    client.cancel(batch.id)
