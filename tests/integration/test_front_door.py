"""What clients see of gateway and worker processes, with real Postgres and real gRPC over sockets."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import grpc
import psutil
import psycopg2
import pytest

from tests.conftest import IS_THOROUGH
from tests.support.batches import URL, count, finished, health, line, lines, ready, refused, run_sql
from tests.support.servers import Server, Stack
from tests.support.waiting import until
from vllm_batch import Client
from vllm_batch.v1 import batch_service_pb2 as pb
from vllm_batch.v1 import batch_service_pb2_grpc

ROOT = Path(__file__).resolve().parents[2]


def test_batch_from_upload_to_results(serving: Stack, client: Client) -> None:
    """Every request of an uploaded file gets one result, in the order of the file."""
    batch = client.submit_lines(lines(500), metadata={"who": "me"}, priority=3)
    done = finished(client, batch.id)
    assert done.state == pb.BATCH_STATE_COMPLETED
    assert (done.counts.total, done.counts.completed, done.counts.failed) == (500, 500, 0)
    assert (dict(done.metadata), done.priority, list(done.models)) == ({"who": "me"}, 3, ["tiny"])
    assert done.usage.completion_tokens == 500 * 16
    found = [result.custom_id for result in client.results(batch.id)]
    assert found == [f"c{i}" for i in range(500)]


def test_inline_batch(serving: Stack, client: Client) -> None:
    """An inline batch runs too, with bodies as structures or as text."""
    with grpc.insecure_channel(serving.target) as channel:
        stub = batch_service_pb2_grpc.BatchServiceStub(channel)
        text = pb.InlineRequest(custom_id="b", url=URL, body_json='{"model": "tiny",\n "messages": []}')
        structure = pb.InlineRequest(custom_id="a", url=URL)
        structure.body.update({"model": "tiny", "messages": [], "max_tokens": 7})
        batch = stub.CreateBatch(pb.CreateBatchRequest(requests=[structure, text]), timeout=10).batch
    finished(client, batch.id)
    first, second = (json.loads(r.response.body_json) for r in client.results(batch.id))
    assert (first["usage"]["completion_tokens"], second["usage"]["completion_tokens"]) == (7, 16)


def test_a_batch_without_a_model(serving: Stack, client: Client) -> None:
    """A missing, null or empty model means the worker's own model, in a file and inline."""
    bodies = ('{"messages": []}', '{"model": null, "messages": []}', '{"model": "", "messages": []}')
    file = [
        f'{{"custom_id": "c{number}", "method": "POST", "url": "{URL}", "body": {body}}}\n'.encode()
        for number, body in enumerate(bodies)
    ]
    texts = [pb.InlineRequest(custom_id=f"c{n}", url=URL, body_json=body) for n, body in enumerate(bodies)]
    structure = pb.InlineRequest(custom_id="c3", url=URL)
    structure.body.update({"model": None, "messages": []})
    with grpc.insecure_channel(serving.target) as channel:
        stub = batch_service_pb2_grpc.BatchServiceStub(channel)
        inline = stub.CreateBatch(pb.CreateBatchRequest(requests=[*texts, structure]), timeout=10).batch
    for batch in (client.submit_lines(file), inline):
        done = finished(client, batch.id)
        assert (done.counts.completed, done.counts.total, list(done.models)) == (batch.counts.total,) * 2 + ([],)
        assert all(json.loads(r.response.body_json)["model"] == "tiny" for r in client.results(batch.id))


@pytest.mark.parametrize(
    ("given", "field", "description"),
    [
        ([b"{\n"], "line 1", "not JSON"),
        ([line("a"), line("b"), line("a")], "line 3: custom_id", "earlier request"),
        ([line("a"), b"\n", line("b"), b"\n", line("b")], "line 5: custom_id", "earlier request"),
        ([line("a").replace(b"/v1/chat/completions", b"/v1/nothing")], "line 1: url", "is not served"),
        ([line("a", model="gpt-9")], "line 1: body.model", "is not served"),
        ([line("a", stream=True)], "line 1: body.stream", "not streamed"),
        ([], "requests", "must contain at least one request"),
        ([b"\n\n"], "requests", "must contain at least one request"),
    ],
)
def test_bad_input_is_named_and_nothing_is_stored(
    serving: Stack, client: Client, given: list[bytes], field: str, description: str
) -> None:
    """A batch with any error is rejected as a whole, naming line and field, and the server keeps working."""
    error = refused(lambda: client.submit_lines(given))
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert [found for found, _ in error.violations] == [field]
    assert description in error.violations[0][1]
    assert (count(serving, "batches"), count(serving, "requests")) == (0, 0)
    assert finished(client, client.submit_lines(lines(1)).id).counts.completed == 1


def test_all_wrong_lines_are_named(serving: Stack, client: Client) -> None:
    """All wrong lines and fields are reported together."""
    error = refused(lambda: client.submit_lines([b"{", line("ok"), line("", model="x"), b"[]"]))
    fields = [field for field, _ in error.violations]
    assert fields == ["line 1", "line 3: custom_id", "line 3: body.model", "line 4"]


def test_creation_is_idempotent(serving: Stack, client: Client) -> None:
    """The same request_id with the same content returns the first batch; with other content it is rejected."""
    first = client.submit_lines(lines(3), request_id="mine")
    again = client.submit_lines(lines(3), request_id="mine")
    assert (again.id, count(serving, "batches"), count(serving, "requests")) == (first.id, 1, 3)
    error = refused(lambda: client.submit_lines(lines(4), request_id="mine"))
    assert error.code is grpc.StatusCode.ALREADY_EXISTS
    assert error.metadata["batch_id"] == first.id
    assert count(serving, "requests") == 3


def test_listing_pages(serving: Stack, client: Client) -> None:
    """Pages list every batch once, newest first, even if new ones arrive in between."""
    ids = [client.submit_lines(lines(1)).id for _ in range(5)]
    with grpc.insecure_channel(serving.target) as channel:
        stub = batch_service_pb2_grpc.BatchServiceStub(channel)
        first = stub.ListBatches(pb.ListBatchesRequest(page_size=2), timeout=10)
        client.submit_lines(lines(1))
        second = stub.ListBatches(pb.ListBatchesRequest(page_size=10, page_token=first.next_page_token), timeout=10)
        with pytest.raises(grpc.RpcError) as caught:
            stub.ListBatches(pb.ListBatchesRequest(page_token="nonsense"), timeout=10)
    assert [batch.id for batch in (*first.batches, *second.batches)] == ids[::-1]
    assert second.next_page_token == ""
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_results_resume_by_token(serving: Stack, client: Client) -> None:
    """A result stream resumed by token has neither gaps nor repeats, in either order and while work goes on."""
    batch = client.submit_lines(lines(2500))
    for order in ("RESULT_ORDER_INPUT", "RESULT_ORDER_FINISHED"):
        found, token, pages = [], "", 0
        while True:
            stream = client.result_pages(batch.id, follow=True, order=order, resume_token=token)
            page = next(stream, None)
            stream.close()
            if page is None:
                break
            found += [result.custom_id for result in page.results]
            token, pages = page.resume_token, pages + 1
        assert pages >= 3
        assert len(found) == len(set(found)) == 2500


def test_unknown_batch(serving: Stack, client: Client) -> None:
    """An unknown or malformed batch name is NOT_FOUND."""
    for name in ("batch_999", "batch_", "nonsense", "batch_99999999999999999999"):
        assert refused(lambda name=name: client.get(name)).code is grpc.StatusCode.NOT_FOUND  # type: ignore[misc]


def test_line_over_the_limit(serving: Stack, client: Client) -> None:
    """A line that is too long is rejected with its number and the limit, and nothing is stored."""
    error = refused(lambda: client.submit_lines([line("a"), b"x" * 10_000_000]))
    assert error.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert error.message.startswith("bytes of line 2: ")
    assert error.metadata["limit"] == str(8 << 20)
    assert count(serving, "batches") == 0


def test_line_at_the_limit(serving: Stack, client: Client) -> None:
    """A line of exactly the limit runs; with one byte more it is rejected with the limit and its own size."""
    limit = 8 << 20
    room = limit - len(line("a", filler="").rstrip())
    batch = client.submit_lines([line("a", filler="x" * room)])
    assert finished(client, batch.id).counts.completed == 1
    error = refused(lambda: client.submit_lines([line("a", filler="x" * (room + 1))]))
    assert error.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert (error.metadata["limit"], error.metadata["value"]) == (str(limit), str(limit + 1))
    assert count(serving, "batches") == 1


def test_limits(stack: Stack, client: Client) -> None:
    """Each limit has its own error with limit and value, and a batch over a limit is not stored."""
    stack.gateway(max_open_batches=2, max_queued_requests=8)
    stack.worker(
        max_requests_per_batch=5,
        max_batch_bytes=2000,
        max_open_batches=2,
        max_queued_requests=8,
    )
    stack.wait_until_accepting()
    for given, told in (
        (lines(6), "requests of the batch: 6, at most 5"),
        ([line("a", x="y" * 3000)], "bytes of the batch: "),
    ):
        error = refused(lambda given=given: client.submit_lines(given))  # type: ignore[misc]
        assert (error.code, told in error.message) == (grpc.StatusCode.RESOURCE_EXHAUSTED, True), error.message
    client.submit_lines(lines(5, vllm_xargs={"simulate": 600}))
    assert "queued requests: 9, at most 8 are allowed, 3 left" in refused(lambda: client.submit_lines(lines(4))).message
    client.submit_lines(lines(3, vllm_xargs={"simulate": 600}))
    assert "open batches: 3, at most 2" in refused(lambda: client.submit_lines(lines(1))).message
    assert count(stack, "batches") == 2


def test_refused_in_the_middle_of_an_upload(stack: Stack, client: Client) -> None:
    """A rejection by the worker during an upload reaches the client every time."""
    stack.gateway()
    stack.worker(max_open_batches=1)
    stack.wait_until_accepting()
    client.submit_lines(lines(1, vllm_xargs={"simulate": 600}))
    large = [line(f"c{number}", padding="x" * 300_000) for number in range(3)]
    for _ in range(300 if IS_THOROUGH else 50):
        error = refused(lambda: client.submit_lines(large))
        assert (error.code, error.message[:26]) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "open batches: 2, at most 1")


def test_cancel_stops_what_runs(stack: Stack, client: Client) -> None:
    """Cancelling a batch aborts its requests in the engine, keeps finished results, and frees the engine."""
    stack.gateway()
    stack.worker(window=50)
    stack.wait_until_accepting()
    batch = client.submit_lines([*lines(20), *(line(f"slow{i}", vllm_xargs={"simulate": 600}) for i in range(300))])
    until(lambda: client.get(batch.id).counts.completed == 20, "the quick requests to complete")
    assert client.cancel(batch.id).state == pb.BATCH_STATE_CANCELLING
    ended = finished(client, batch.id)
    assert (ended.state, ended.counts.completed) == (pb.BATCH_STATE_CANCELLED, 20)
    assert client.cancel(batch.id).state == pb.BATCH_STATE_CANCELLED
    assert len(list(client.results(batch.id, follow=True))) == 20
    # The engine's window is free again: it was full of ten-minute requests.
    assert finished(client, client.submit_lines(lines(60)).id).counts.completed == 60


def test_cancel_reverted(serving: Stack, client: Client) -> None:
    """If the worker dies while its batch is being cancelled, the batch stays cancelled."""
    batch = client.submit_lines(lines(500, vllm_xargs={"simulate": 600}))
    until(lambda: client.get(batch.id).HasField("start_time"), "the batch to start")
    os.kill(serving.servers[-1].process.pid, signal.SIGSTOP)
    assert client.cancel(batch.id).state == pb.BATCH_STATE_CANCELLING
    serving.servers[-1].kill()
    serving.servers[-1].start()
    assert finished(client, batch.id).state == pb.BATCH_STATE_CANCELLED
    assert client.get(batch.id).counts.completed == 0


def test_cancel_without_a_worker(stack: Stack, client: Client) -> None:
    """A batch can be cancelled without any worker, once its leases have expired."""
    stack.gateway()
    worker = stack.worker(lease_s=1)
    stack.wait_until_accepting()
    batch = client.submit_lines(lines(100, vllm_xargs={"simulate": 600}))
    until(lambda: client.get(batch.id).HasField("start_time"), "the batch to start")
    worker.kill()
    client.cancel(batch.id)
    assert finished(client, batch.id).state == pb.BATCH_STATE_CANCELLED


def test_one_result_by_name(serving: Stack, client: Client) -> None:
    """GetResult returns one request's result; a request without a result and an unknown name are NOT_FOUND."""
    batch = client.submit_lines([*lines(3), line("never", vllm_xargs={"simulate": 600})])
    until(lambda: client.get(batch.id).counts.completed == 3, "three results")
    assert client.result(batch.id, "c1").index == 1
    for name in ("never", "unknown"):
        error = refused(lambda name=name: client.result(batch.id, name))  # type: ignore[misc]
        assert (error.code, name in error.message) == (grpc.StatusCode.NOT_FOUND, True)
    assert refused(lambda: client.result(batch.id, "")).code is grpc.StatusCode.INVALID_ARGUMENT


def test_retry_and_delete(serving: Stack, client: Client) -> None:
    """A retry runs only the failed requests as a new batch; an ended batch can be deleted, a running one cannot."""
    batch = client.submit_lines([*lines(3), line("bad", vllm_xargs={"simulate": "refuse"})])
    finished(client, batch.id)
    again = client.retry(batch.id, request_id="again")
    assert client.retry(batch.id, request_id="again").id == again.id
    assert (finished(client, again.id).counts.total, again.id != batch.id) == (1, True)
    client.delete(batch.id)
    # At once, though its rows are removed later.
    calls: list[Callable[[], object]] = [
        lambda: client.result(batch.id, "c1"),
        lambda: client.get(batch.id),
        lambda: list(client.results(batch.id)),
        lambda: client.errors(batch.id),
        lambda: client.retry(batch.id),
        lambda: client.wait(batch.id),
        lambda: client.cancel(batch.id),
        lambda: client.delete(batch.id),
    ]
    assert [refused(call).code for call in calls] == [grpc.StatusCode.NOT_FOUND] * len(calls)
    running = client.submit_lines(lines(2, vllm_xargs={"simulate": 600}))
    error = refused(lambda: client.delete(running.id))
    assert (error.code, error.metadata["state"]) == (grpc.StatusCode.FAILED_PRECONDITION, "in_progress")
    until(lambda: count(serving, "requests") == 3, "the deleted rows to be removed")


def test_completion_window(serving: Stack, client: Client) -> None:
    """A batch that misses its completion window expires: finished results stay, the others become `batch_expired`."""
    given = [*lines(10), *(line(f"slow{i}", vllm_xargs={"simulate": 600}) for i in range(5))]
    batch = client.submit_lines(given, completion_window_s=2)
    ended = finished(client, batch.id)
    assert (ended.state, ended.counts.completed, ended.counts.failed) == (pb.BATCH_STATE_EXPIRED, 10, 5)
    assert [r.error.code for r in client.results(batch.id)][10:] == ["batch_expired"] * 5
    assert finished(client, client.submit_lines(lines(300)).id).counts.completed == 300


def poison(stack: Stack, client: Client, count: int, killers: int) -> tuple[pb.Batch, int]:
    """Runs a batch with requests that kill the worker, restarting it each time. Returns the batch and the deaths."""
    given = list(lines(count))
    for number in range(killers):
        given.insert(
            (number * 2 + 1) * count // (2 * killers), line(f"killer{number}", vllm_xargs={"simulate": "crash"})
        )
    batch = client.submit_lines(given)
    deaths = 0
    worker = stack.servers[-1]
    while not client.get(batch.id).HasField("end_time"):
        if worker.process.poll() is not None:
            deaths += 1
            assert deaths <= 3 * killers, "more deaths than a poison request may cost"
            worker.start()
        until(lambda: worker.process.poll() is not None or client.get(batch.id).HasField("end_time"), "an event", 60)
    return client.get(batch.id), deaths


@pytest.mark.parametrize(("count", "killers"), [(300, 1), pytest.param(5000, 3, marks=pytest.mark.thorough)])
def test_poison_costs_only_itself(stack: Stack, client: Client, count: int, killers: int) -> None:
    """Poison requests cost at most three deaths each and get an error; all other requests complete."""
    stack.gateway()
    stack.worker(simulated_request_s=0.005, window=64)
    stack.wait_until_accepting()
    done, deaths = poison(stack, client, count, killers)
    # Killers that happen to be in the engine together share a death.
    assert 3 <= deaths <= 3 * killers
    assert (done.state, done.counts.completed, done.counts.failed) == (pb.BATCH_STATE_COMPLETED, count, killers)
    failed = [r for r in client.results(done.id) if r.HasField("error")]
    assert [result.custom_id for result in failed] == [f"killer{number}" for number in range(killers)]
    assert {result.error.code for result in failed} == {"REQUEST_CRASHED_ENGINE"}
    assert "died 3 times" in failed[0].error.message


def test_never_a_worker(stack: Stack, client: Client) -> None:
    """Before any worker has ever run, new work is refused as offline while the gateway itself is healthy."""
    stack.gateway()
    until(lambda: "never seen" in client.accepting(), "the gateway to report that no worker was ever seen")
    error = refused(lambda: client.submit_lines(lines(1)))
    assert (error.code, error.reason) == (grpc.StatusCode.UNAVAILABLE, "WORKER_OFFLINE")
    assert error.retry_delay_s
    assert health(stack.target, "") == "SERVING"
    assert health(stack.target, "vllm_batch.v1.BatchService") == "NOT_SERVING"


def test_stale_worker(serving: Stack, client: Client) -> None:
    """When the worker is gone, the refusal says since when, and reading continues to work."""
    batch = client.submit_lines(lines(2))
    finished(client, batch.id)
    serving.servers[-1].kill()
    run_sql(serving, "UPDATE heartbeats SET last_seen = clock_timestamp() - interval '72s'")
    said = until(lambda: "last seen 7" in (why := client.accepting()) and why, "the stale heartbeat to be noticed")
    assert said.startswith("worker offline (last seen 7")
    error = refused(lambda: client.submit_lines(lines(1)))
    assert (error.code, error.reason) == (grpc.StatusCode.UNAVAILABLE, "WORKER_OFFLINE")
    assert int(error.metadata["last_seen_s"]) >= 72
    assert error.retry_delay_s
    assert health(serving.target, "vllm_batch.v1.BatchService") == "NOT_SERVING"
    assert client.get(batch.id).counts.completed == 2
    assert len(list(client.results(batch.id))) == 2


def test_loading_worker(stack: Stack, client: Client) -> None:
    """While the model loads, the heartbeat continues and new work is refused as WORKER_LOADING."""
    stack.gateway()
    worker = stack.worker(simulated_load_s=600)
    until(lambda: "loading" in client.accepting(), "the worker to be loading")
    error = refused(lambda: client.submit_lines(lines(1)))
    assert (error.reason, error.metadata["phase"]) == ("WORKER_LOADING", "loading")

    def beats() -> str:
        with psycopg2.connect(stack.database_url) as connection, connection.cursor() as cursor:
            cursor.execute("SELECT last_seen::text FROM heartbeats WHERE phase = 'loading'")
            return str((cursor.fetchone() or [""])[0])

    first = until(beats, "a heartbeat")
    until(lambda: beats() != first, "another heartbeat")
    assert worker.terminate() == 0


def test_worker_crash_strands_job(serving: Stack, client: Client) -> None:
    """After a worker is killed in the middle of a batch, its next life completes it, with one result per request."""
    batch = client.submit_lines(lines(2000))
    until(lambda: client.get(batch.id).counts.completed > 200, "part of the batch")
    worker = serving.servers[-1]
    worker.kill()
    done_before = client.get(batch.id).counts.completed
    assert done_before < 2000
    worker.start()
    done = finished(client, batch.id)
    found = [result.custom_id for result in client.results(batch.id)]
    assert done.counts.completed == 2000
    assert found == [f"c{i}" for i in range(2000)]
    [second] = worker.events("identity_locked")
    assert second["suspects"]


def test_engine_death_is_no_result(serving: Stack, client: Client) -> None:
    """When the engine dies, its requests return to the queue without a result, and new work is refused."""
    batch = client.submit_lines([*lines(50), line("killer", vllm_xargs={"simulate": "engine_dead"})])
    until(lambda: "engine_dead" in client.accepting(), "the gateway to report the dead engine")
    error = refused(lambda: client.submit_lines(lines(1)))
    assert (error.reason, error.metadata.get("phase")) == ("WORKER_STALLED", "engine_dead"), str(error)
    assert client.get(batch.id).counts.failed == 0

    def leased() -> bool:
        with psycopg2.connect(serving.database_url) as connection, connection.cursor() as cursor:
            cursor.execute("SELECT count(*) FROM chunks WHERE state = 'leased'")
            return cursor.fetchone() != (0,)

    until(lambda: not leased(), "the chunks to be released")
    assert serving.servers[-1].terminate() == 0


def engine_of(worker: Server) -> psutil.Process:
    """The worker's engine process."""
    children = psutil.Process(worker.process.pid).children(recursive=True)
    return next(child for child in children if "simulated-engine" in child.cmdline())


@pytest.mark.parametrize("is_busy", [True, pytest.param(False, marks=pytest.mark.thorough)])
def test_frozen_engine_is_not_serving(serving: Stack, client: Client, is_busy: bool) -> None:
    """A frozen engine, busy or idle, makes the worker NOT_SERVING until it moves again, without losing a request."""
    worker = serving.servers[-1]
    batch = client.submit_lines(lines(500 if is_busy else 1, vllm_xargs={"simulate": 0.2}))
    until(lambda: client.get(batch.id).counts.completed > 0, "the first results")
    engine = engine_of(worker)
    engine.suspend()
    until(lambda: "stalled" in client.accepting(), "the gateway to report the frozen engine")
    target = f"127.0.0.1:{worker.port}"
    assert health(target, "") == "NOT_SERVING"
    engine.resume()
    until(lambda: not client.accepting(), "the gateway to accept new work again")
    assert finished(client, batch.id).counts.failed == 0
    assert worker.process.poll() is None


def test_refused_request_has_an_error_result(serving: Stack, client: Client) -> None:
    """A request that the engine rejects gets that error as its result, and the batch continues."""
    batch = client.submit_lines([line("good"), line("bad", vllm_xargs={"simulate": "refuse"})])
    done = finished(client, batch.id)
    assert (done.state, done.counts.completed, done.counts.failed) == (pb.BATCH_STATE_COMPLETED, 1, 1)
    _, bad = client.results(batch.id)
    assert bad.response.status_code == 400
    assert json.loads(bad.response.body_json)["error"]["message"] == "refused on request"


def test_sigterm_drains(serving: Stack, client: Client) -> None:
    """On SIGTERM a worker finishes what is in its engine, releases the rest, and exits with 0."""
    batch = client.submit_lines(lines(600, vllm_xargs={"simulate": 0.3}))
    until(lambda: client.get(batch.id).counts.completed > 0, "the first results")
    worker = serving.servers[-1]
    assert worker.terminate() == 0
    assert [event["phase"] for event in worker.events("phase_entered")][-2:] == ["draining", "stopping"]
    counts = client.get(batch.id).counts
    assert 0 < counts.completed < 600
    assert worker.events("chunks_given_back")
    worker.start()
    assert finished(client, batch.id).counts.completed == 600


def test_replicas_execute_once(stack: Stack, client: Client) -> None:
    """Two workers share one batch: both run some of it, and every request is run and stored exactly once."""
    stack.gateway()
    workers = [stack.worker(name, log_level="DEBUG") for name in ("worker", "second")]
    until(lambda: ready(stack) == 2, "both workers to be ready")
    stack.wait_until_accepting()
    batch = client.submit_lines(lines(1500, vllm_xargs={"simulate": 0.2}))
    assert finished(client, batch.id).counts.completed == 1500
    with psycopg2.connect(stack.database_url) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT count(DISTINCT incarnation), count(*) FROM results")
        assert cursor.fetchone() == (2, 1500)
    claimed = [event for worker in workers for event in worker.events("chunk_claimed")]
    assert len({event["chunk"] for event in claimed}) == len(claimed)
    # What one gave to the other, which had nothing left, was claimed twice, but not begun before.
    given = [event for worker in workers for event in worker.events("requests_given")]
    assert sum(int(str(event["requests"])) for event in claimed) - sum(int(str(e["requests"])) for e in given) == 1500


def test_second_process_of_the_same_identity_waits(serving: Stack, client: Client) -> None:
    """A second process with the same worker name gets that identity only once the first has died."""
    second = serving.worker("worker")
    until(lambda: second.log.read_text().count("identity_locked") == 1, "the first process to hold the identity")
    batch = client.submit_lines(lines(100))
    assert finished(client, batch.id).counts.completed == 100
    serving.servers[1].kill()
    until(lambda: second.log.read_text().count("identity_locked") == 2, "the second process to take over")


def test_postgres_connections_cut(serving: Stack, client: Client) -> None:
    """When all connections to Postgres are cut in the middle of a batch, no process ends and nothing is lost."""
    batch = client.submit_lines(lines(1500))
    until(lambda: client.get(batch.id).counts.completed > 100, "part of the batch")
    run_sql(
        serving,
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE datname = current_database() AND pid <> pg_backend_pid()",
    )
    with Client(serving.target, patience_s=30) as patient:
        assert finished(patient, batch.id).counts.completed == 1500
        assert len({r.custom_id for r in patient.results(batch.id)}) == 1500
    assert all(server.process.poll() is None for server in serving.servers)


def test_buf_curl_by_reflection(serving: Stack) -> None:
    """A client without the contract discovers it by reflection and can call it: buf curl."""
    buf = shutil.which("buf", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
    assert buf, "buf is installed with the development tools"

    def curl(method: str, data: dict[str, object]) -> dict[str, object]:
        done = subprocess.run(
            [
                buf,
                "curl",
                "--protocol",
                "grpc",
                "--http2-prior-knowledge",
                "-d",
                json.dumps(data),
                f"http://{serving.target}/{method}",
            ],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        return dict(json.loads(done.stdout))

    service = {"service": "vllm_batch.v1.BatchService"}
    assert curl("grpc.health.v1.Health/Check", service) == {"status": "SERVING"}
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
    request = {"custom_id": "a", "url": URL, "body": body}
    created = curl("vllm_batch.v1.BatchService/CreateBatch", {"requests": [request]})
    assert created["batch"]["counts"] == {"total": "1"}  # type: ignore[index]


@pytest.mark.skipif(not shutil.which("grpcurl"), reason="grpcurl is not on PATH")
def test_grpcurl(serving: Stack) -> None:
    """grpcurl lists the services by reflection."""
    done = subprocess.run(
        ["grpcurl", "-plaintext", serving.target, "list"], capture_output=True, text=True, timeout=30, check=True
    )
    assert "vllm_batch.v1.BatchService" in done.stdout
