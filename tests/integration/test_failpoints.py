"""Kills a process before and after each commit point; after its recovery the invariants must hold."""

import contextlib

import psycopg2
import pytest

from tests.support.batches import finished, line, lines
from tests.support.lives import check_invariants, dies_and_comes_back
from tests.support.servers import Stack
from tests.support.waiting import until
from vllm_batch import CallError, Client
from vllm_batch.v1 import batch_service_pb2 as pb

# After the commit nobody has heard of what is done: the harder case.
WHEN = pytest.mark.parametrize("when", [pytest.param("before", marks=pytest.mark.thorough), "after"])


@WHEN
def test_create_crash_after_store(stack: Stack, when: str) -> None:
    """If the worker dies while storing a batch, a retry with the same request_id leaves exactly one batch."""
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


@WHEN
@pytest.mark.parametrize("point", ["claim", "write"])
def test_worker_dies_at_its_work(stack: Stack, point: str, when: str) -> None:
    """If the worker dies while claiming or storing, every request still gets exactly one result."""
    stack.gateway()
    worker = stack.worker(window=100)
    stack.wait_until_accepting()
    with Client(stack.target, patience_s=60) as client:
        batch = client.submit_lines(lines(700, vllm_xargs={"simulate": 0.2}))
        # Armed only now: an idle worker also tries to claim, and how often depends on the machine.
        worker.terminate()
        assert client.get(batch.id).counts.completed < 500
        # The third time: with some work done and some left.
        worker.arm(f"{point}.{when}_commit:3")
        worker.start()
        dies_and_comes_back(worker)
        assert finished(client, batch.id).counts.completed == 700
        assert [r.custom_id for r in client.results(batch.id)] == [f"c{i}" for i in range(700)]
    check_invariants(stack)


@WHEN
def test_finalization_strand(stack: Stack, when: str) -> None:
    """If the worker dies while storing the last result, the batch is still completed."""
    stack.gateway()
    worker = stack.worker(failpoint=f"write.{when}_commit")
    stack.wait_until_accepting()
    with Client(stack.target, patience_s=60) as client:
        batch = client.submit_lines(lines(1))
        dies_and_comes_back(worker)
        assert finished(client, batch.id).state == pb.BATCH_STATE_COMPLETED
    check_invariants(stack)


@WHEN
def test_worker_dies_as_it_buries_its_predecessor(stack: Stack, when: str) -> None:
    """If a worker dies while recovering its predecessor's work, the next one completes the recovery."""
    stack.gateway()
    worker = stack.worker(failpoint="write.after_commit:2", window=50)
    stack.wait_until_accepting()
    with Client(stack.target, patience_s=60) as client:
        batch = client.submit_lines(lines(400))
        until(lambda: worker.process.poll() is not None, "the first worker to die")
        worker.disarm()
        second = stack.worker(failpoint=f"bury.{when}_commit")
        dies_and_comes_back(second)
        assert finished(client, batch.id).counts.completed == 400
    check_invariants(stack)


@WHEN
def test_worker_dies_as_it_gives_back(stack: Stack, when: str) -> None:
    """If a worker dies while releasing chunks at the end of draining, the next life runs what it held."""
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


@WHEN
@pytest.mark.parametrize("point", ["cancel", "delete", "retry", "purge", "expire"])
def test_gateway_dies_at_its_work(stack: Stack, point: str, when: str) -> None:
    """If the gateway dies in the middle of an operation, repeating it carries it out exactly once."""
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

        until(purged, "deleted rows to be purged")
    check_invariants(stack)
