"""A process killed at each commit point, before and after: then recovery, then the invariants."""

import contextlib

import psycopg2
import pytest

from tests.integration.conftest import Server, Stack
from tests.integration.test_front_door import finished, line, lines
from tests.waiting import until
from vllm_batch.client import CallError, Client
from vllm_batch.v1 import batch_service_pb2 as pb

# What is wrong in a database at rest; each query must find nothing.
INVARIANTS = {
    "a completed batch without all its results": """
        SELECT b.id FROM batches b WHERE state IN ('completed', 'expired')
        AND total <> (SELECT count(*) FROM results r WHERE r.batch_id = b.id)""",
    "counts that are not those of the results": """
        SELECT b.id FROM batches b
        LEFT JOIN (SELECT batch_id, count(*) FILTER (WHERE status_code BETWEEN 200 AND 299) AS good, count(*) AS all
                   FROM results GROUP BY batch_id) r ON r.batch_id = b.id
        WHERE b.completed <> coalesce(r.good, 0) OR b.completed + b.failed <> coalesce(r.all, 0)""",
    "sequence numbers with gaps": """
        SELECT batch_id FROM results GROUP BY batch_id HAVING max(sequence) <> count(*) OR min(sequence) <> 1""",
    "a chunk that is held": "SELECT id FROM chunks WHERE state = 'leased'",
    "chunks that count wrongly": "SELECT id FROM chunks WHERE (state = 'done') <> (unfinished = 0)",
    "requests of no batch": """
        SELECT batch_id FROM requests
        WHERE batch_id NOT IN (SELECT id FROM batches UNION SELECT batch_id FROM purges)""",
    "results of no request": """
        SELECT batch_id FROM results r
        WHERE NOT EXISTS (SELECT FROM requests q WHERE q.batch_id = r.batch_id AND q.index = r.index)""",
    "a batch without all its requests": """
        SELECT b.id FROM batches b WHERE total <> (SELECT count(*) FROM requests q WHERE q.batch_id = b.id)""",
    "a batch in progress that nobody will finish": """
        SELECT b.id FROM batches b WHERE state IN ('in_progress', 'cancelling')
        AND NOT EXISTS (SELECT FROM chunks c WHERE c.batch_id = b.id AND c.state <> 'done')""",
}


def check_invariants(stack: Stack) -> None:
    with psycopg2.connect(stack.database_url) as connection, connection.cursor() as cursor:
        for name, query in INVARIANTS.items():
            cursor.execute(query)
            assert cursor.fetchall() == [], name


def dies_and_comes_back(server: Server) -> None:
    until(lambda: server.process.poll() is not None, "the process to die at its failpoint")
    assert server.process.returncode == -9
    server.disarm()
    server.start()


@pytest.mark.parametrize("when", ["before", "after"])
def test_create_crash_after_store(stack: Stack, when: str) -> None:
    """The worker dies as it stores a batch: the client tries again under the same name and there is one batch."""
    stack.gateway()
    worker = stack.worker(failpoint=f"store.{when}_commit")
    stack.wait_until_accepting()
    with Client(stack.target, patience_s=0) as client:
        with pytest.raises(CallError):
            client.submit_lines(lines(150), request_id="once")
        dies_and_comes_back(worker)
    with Client(stack.target, patience_s=60) as client:
        batch = client.submit_lines(lines(150), request_id="once")
        assert finished(client, batch.id).counts.completed == 150
        assert [found.id for found in client.list()] == [batch.id]
    check_invariants(stack)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("point", ["claim", "write"])
def test_worker_dies_at_its_work(stack: Stack, point: str, when: str) -> None:
    """The worker dies as it claims or stores: each request has one result, the last of the batch's among them."""
    stack.gateway()
    worker = stack.worker(window=100)
    stack.wait_until_accepting()
    with Client(stack.target, patience_s=60) as client:
        batch = client.submit_lines(lines(700, vllm_xargs={"simulate": 0.2}))
        # Armed only now: a worker without work claims in vain, and how often depends on the machine.
        worker.terminate()
        assert client.get(batch.id).counts.completed < 500
        # The third time: with some work done and some to do.
        worker.arm(f"{point}.{when}_commit:3")
        worker.start()
        dies_and_comes_back(worker)
        assert finished(client, batch.id).counts.completed == 700
        assert [r.custom_id for r in client.results(batch.id)] == [f"c{i}" for i in range(700)]
    check_invariants(stack)


@pytest.mark.parametrize("when", ["before", "after"])
def test_finalization_strand(stack: Stack, when: str) -> None:
    """The worker dies as it stores the last result: the batch is completed all the same."""
    stack.gateway()
    worker = stack.worker(failpoint=f"write.{when}_commit")
    stack.wait_until_accepting()
    with Client(stack.target, patience_s=60) as client:
        batch = client.submit_lines(lines(1))
        dies_and_comes_back(worker)
        assert finished(client, batch.id).state == pb.BATCH_STATE_COMPLETED
    check_invariants(stack)


@pytest.mark.parametrize("when", ["before", "after"])
def test_worker_dies_as_it_buries_its_predecessor(stack: Stack, when: str) -> None:
    """A death in the middle of recovery is recovered from."""
    stack.gateway()
    worker = stack.worker(failpoint="write.after_commit:2", window=50)
    stack.wait_until_accepting()
    with Client(stack.target, patience_s=60) as client:
        batch = client.submit_lines(lines(400))
        until(lambda: worker.process.poll() is not None, "the first death")
        worker.disarm()
        second = stack.worker(failpoint=f"bury.{when}_commit")
        dies_and_comes_back(second)
        assert finished(client, batch.id).counts.completed == 400
    check_invariants(stack)


@pytest.mark.parametrize("when", ["before", "after"])
def test_worker_dies_as_it_gives_back(stack: Stack, when: str) -> None:
    """A death at the end of draining leaves what it held to the next life."""
    stack.gateway()
    worker = stack.worker(failpoint=f"release.{when}_commit", window=20)
    stack.wait_until_accepting()
    with Client(stack.target, patience_s=60) as client:
        batch = client.submit_lines(lines(200, vllm_xargs={"simulate": 0.2}))
        until(lambda: client.get(batch.id).counts.completed > 0, "the first results")
        worker.process.terminate()
        dies_and_comes_back(worker)
        assert finished(client, batch.id).counts.completed == 200
    check_invariants(stack)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("point", ["cancel", "delete", "retry", "purge", "expire"])
def test_gateway_dies_at_its_work(stack: Stack, point: str, when: str) -> None:
    """The gateway dies in the middle of an order: asked again it is carried out, once."""
    gateway = stack.gateway(failpoint=f"{point}.{when}_commit")
    stack.worker()
    stack.wait_until_accepting()
    with Client(stack.target, patience_s=60) as client:
        failing = line("bad", vllm_xargs={"simulate": "refuse"})
        ended = client.submit_lines([*lines(5), failing])
        finished(client, ended.id)
        window_s = 3 if point == "expire" else None
        running = client.submit_lines(lines(300, vllm_xargs={"simulate": 600}), completion_window_s=window_s)

        def order(by: Client) -> None:
            if point == "cancel":
                by.cancel(running.id)
            elif point == "retry":
                by.retry(ended.id, request_id="again")
            elif point != "expire":
                by.delete(ended.id)

        with Client(stack.target, patience_s=0) as hasty, contextlib.suppress(CallError):
            order(hasty)
        dies_and_comes_back(gateway)
        try:
            order(client)
        except CallError as error:
            if (point, error.code.name) not in (("delete", "NOT_FOUND"), ("purge", "NOT_FOUND")):
                raise
        if point != "expire":
            client.cancel(running.id)
        assert finished(client, running.id).state in (pb.BATCH_STATE_CANCELLED, pb.BATCH_STATE_EXPIRED)
        expected = {"cancel": 2, "delete": 1, "purge": 1, "retry": 3, "expire": 2}[point]
        assert len(list(client.list())) == expected
        for batch in client.list():
            finished(client, batch.id)

        def purged() -> bool:
            with psycopg2.connect(stack.database_url) as connection, connection.cursor() as cursor:
                cursor.execute("SELECT count(*) FROM purges")
                return cursor.fetchone() == (0,)

        until(purged, "deleted rows to go")
    check_invariants(stack)
