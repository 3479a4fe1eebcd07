"""The standard failure scenarios of batch gateways, each a test of the same name, except those tested elsewhere:
`worker_crash_strands_job`, `cancel_reverted`, `replicas_execute_once` are in test_front_door.py,
`cancel_racing_completion` in test_store.py, `create_crash_after_store`, `finalization_strand` in test_failpoints.py.
"""

import os
import random
import signal

import grpc
import psycopg2
import pytest

from service.db import batches, chunks, endings, results
from service.db.connection import Database
from tests.support.batches import count, finished, line, lines, ready, refused
from tests.support.servers import Server, Stack
from tests.support.store import answers, holder, stored
from tests.support.waiting import until
from vllm_batch import Client
from vllm_batch.v1 import batch_service_pb2 as pb
from vllm_batch.v1 import batch_service_pb2_grpc


def in_engine(stack: Stack, worker_id: str) -> int:
    """How many requests a worker reports to have in its engine."""
    with psycopg2.connect(stack.database_url) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT detail ->> 'in_engine' FROM heartbeats WHERE worker_id LIKE %s", (f"%:{worker_id}",))
        [found] = cursor.fetchone() or ("0",)
        return int(found)


def test_terminal_overwrite(database: Database) -> None:
    """Nothing that arrives late changes an ended batch: no result, cancellation, expiry or second completion."""
    batch, cancelled = stored(database, 2, completion_window_s=3600.0), stored(database, 2)
    mine = holder()
    one, two = database.call(chunks.claim, mine, ["tiny"], 2)
    database.call(results.write, answers(one, range(2)), mine.incarnation)
    database.call(endings.cancel, cancelled.id)
    database.call(chunks.drop_cancelled, mine, [two.id])
    database.call(endings.settle_cancelled)
    before = [database.call(batches.get, batch_id) for batch_id in (batch.id, cancelled.id)]
    assert [ended and ended.state for ended in before] == ["completed", "cancelled"]

    database.call(lambda db: db.execute_sql("UPDATE batches SET expire_time = clock_timestamp()"))
    before = [database.call(batches.get, batch_id) for batch_id in (batch.id, cancelled.id)]
    assert database.call(results.write, answers(one, range(2), status=500), mine.incarnation) == 0
    assert database.call(results.write, answers(two, range(2)), mine.incarnation) == 0
    assert database.call(endings.expire, 60) == []
    database.call(endings.settle_cancelled)
    database.call(endings.cancel, cancelled.id)
    assert [database.call(batches.get, batch_id) for batch_id in (batch.id, cancelled.id)] == before


def test_duplicate_execution(serving: Stack, client: Client) -> None:
    """When two workers lose all their connections, neither takes chunks that the other is still working on."""
    second = serving.worker("second")
    until(lambda: ready(serving) == 2, "both workers to be ready")
    batch = client.submit_lines(lines(1000, vllm_xargs={"simulate": 0.3}))
    until(lambda: client.get(batch.id).counts.completed > 50, "part of the batch")
    with psycopg2.connect(serving.database_url) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE '%worker%'")
    assert finished(client, batch.id).counts.completed == 1000
    assert not [event for worker in (serving.servers[1], second) for event in worker.events("leases_lost")]


def frozen_past_its_lease(stack: Stack, request_s: float) -> tuple[Server, str]:
    """A worker frozen with 50 requests in its engine, whose chunk another has taken over; and the batch's id."""
    stack.gateway()
    zombie = stack.worker("zombie", lease_s=1, window=50)
    stack.wait_until_accepting()
    assert_postgres_is_old(stack)
    with Client(stack.target) as client:
        batch = client.submit_lines(lines(50, vllm_xargs={"simulate": request_s}))
    until(lambda: in_engine(stack, "zombie") == 50, "all requests to be in the engine")
    os.kill(zombie.process.pid, signal.SIGSTOP)
    stack.worker("heir", lease_s=1, window=50)
    until(lambda: count(stack, "chunks WHERE worker_id LIKE '%:heir' OR state = 'done'"), "another to take over")
    return zombie, batch.id


@pytest.mark.thorough
def test_zombie_owner_burns_inference(stack: Stack, client: Client) -> None:
    """A worker that wakes after its lease was taken over notices it and aborts the requests."""
    zombie, batch_id = frozen_past_its_lease(stack, 600)
    os.kill(zombie.process.pid, signal.SIGCONT)
    until(lambda: zombie.events("leases_lost"), "the zombie to notice the lost lease")
    # Some of them it may take again, as suspects: whatever the other does not run.
    until(lambda: in_engine(stack, "heir"), "the other to run some of them")
    until(lambda: in_engine(stack, "zombie") + in_engine(stack, "heir") <= 50, "the zombie to abort its requests")
    assert client.get(batch_id).counts.completed == 0


def test_zombie_owner_writes_nothing(stack: Stack, client: Client) -> None:
    """Results that a worker finishes after its lease was taken over are not stored."""
    zombie, batch_id = frozen_past_its_lease(stack, 2)
    assert finished(client, batch_id).counts.completed == 50
    os.kill(zombie.process.pid, signal.SIGCONT)
    until(lambda: in_engine(stack, "zombie") == 0, "the zombie to finish its requests")
    assert (zombie.process.poll(), count(stack, "results")) == (None, 50)
    with psycopg2.connect(stack.database_url) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT DISTINCT worker_id FROM results LEFT JOIN heartbeats USING (incarnation)")
        assert [worker_id.rpartition(":")[2] for (worker_id,) in cursor.fetchall()] == ["heir"]


def assert_postgres_is_old(stack: Stack) -> None:
    """Leases are not released during the first lease time after Postgres starts, so it must be older than that."""
    with psycopg2.connect(stack.database_url) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT clock_timestamp() - pg_postmaster_start_time() > interval '1s'")
        assert cursor.fetchone() == (True,)


def test_recovery_crash_loop(stack: Stack) -> None:
    """Workers that die while recovering add no deaths to the requests that they recover."""
    stack.gateway()
    worker = stack.worker(failpoint="write.after_commit:2", window=50)
    stack.wait_until_accepting()
    with Client(stack.target, patience_s=90) as client:
        batch = client.submit_lines(lines(300))
        until(lambda: worker.process.poll() is not None, "the first worker to die")
        looping = stack.worker(failpoint="bury.before_commit")
        for _ in range(4):
            until(lambda: looping.process.poll() is not None, "a death in recovery")
            looping.start()
        with psycopg2.connect(stack.database_url) as connection, connection.cursor() as cursor:
            cursor.execute("SELECT max(deaths) FROM chunks")
            assert cursor.fetchone() == (0,)
        until(lambda: looping.process.poll() is not None, "the last worker to die in recovery")
        looping.disarm()
        looping.start()
        done = finished(client, batch.id)
    assert (done.counts.completed, done.counts.failed) == (300, 0)


def test_cancel_event_lost(stack: Stack, client: Client) -> None:
    """A batch cancelled while no worker lives stays cancelled, and the next worker runs nothing of it."""
    stack.gateway()
    worker = stack.worker(window=10)
    stack.wait_until_accepting()
    batch = client.submit_lines(lines(200, vllm_xargs={"simulate": 0.2}))
    until(lambda: client.get(batch.id).counts.completed > 0, "the first results")
    worker.kill()
    client.cancel(batch.id)
    results_then = count(stack, "results")
    worker.start()
    assert finished(client, batch.id).state == pb.BATCH_STATE_CANCELLED
    # The next worker works, but on other batches only.
    with Client(stack.target, patience_s=60) as patient:
        assert finished(patient, patient.submit_lines(lines(20)).id).counts.completed == 20
    assert count(stack, "results") == results_then + 20


def test_orphaned_blob(serving: Stack, client: Client) -> None:
    """Nothing is left in the database of a deleted batch or a rejected upload."""
    refused(lambda: client.submit_lines([*lines(500), b"{"]))
    batch = client.submit_lines(lines(500))
    finished(client, batch.id)
    client.delete(batch.id)
    for table in ("batches", "requests", "chunks", "results", "purges"):
        until(lambda table=table: count(serving, table) == 0, f"{table} to be empty")  # type: ignore[misc]


def test_async_result_destruction(serving: Stack, client: Client) -> None:
    """Deleting a batch while its results are being read ends the stream with NOT_FOUND instead of silently."""
    batch = client.submit_lines(line(f"{number:0500}") for number in range(5000))
    assert refused(lambda: client.delete(batch.id)).reason == "BATCH_STATE"
    finished(client, batch.id)
    # A small window, so that only part of the results can be in transit.
    small_window = (("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1 << 16))
    with grpc.insecure_channel(serving.target, options=small_window) as channel:
        stub = batch_service_pb2_grpc.BatchServiceStub(channel)
        stream = stub.StreamResults(pb.StreamResultsRequest(batch_id=batch.id), timeout=60)
        read = [result.index for result in next(stream).results]
        client.delete(batch.id)
        until(lambda: count(serving, "requests") == 0, "the rows to be gone")
        with pytest.raises(grpc.RpcError) as ended:
            read.extend(result.index for page in stream for result in page.results)
    assert ended.value.code() is grpc.StatusCode.NOT_FOUND
    assert read == list(range(len(read)))


@pytest.mark.thorough
def test_results_of_several_writers_resume(stack: Stack, client: Client) -> None:
    """With several workers writing, a stream resumed again and again has no gaps or repeats, in either order."""
    stack.gateway()
    for name in ("first", "second", "third"):
        # With this window one worker alone would need 12 s, so all of them get a share.
        stack.worker(name, window=50)
    until(lambda: ready(stack) == 3, "all workers to be ready")
    stack.wait_until_accepting()
    batch = client.submit_lines(lines(2000, vllm_xargs={"simulate": 0.3}))
    dice = random.Random(7)
    for order in ("RESULT_ORDER_FINISHED", "RESULT_ORDER_INPUT"):
        token, read = "", []
        while len(read) < 2000:
            stream = client.result_pages(batch.id, follow=True, order=order, resume_token=token)
            for _ in range(dice.randrange(1, 4)):
                page = next(stream, None)
                if page is None:
                    break
                token = page.resume_token
                read += [result.custom_id for result in page.results]
            stream.close()  # type: ignore[attr-defined]
        assert len(set(read)) == 2000
        assert order == "RESULT_ORDER_FINISHED" or read == [f"c{number}" for number in range(2000)]
    with psycopg2.connect(stack.database_url) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT count(DISTINCT incarnation) FROM results")
        assert cursor.fetchone() == (3,)
