"""One trace and one id lead from the client through gateway and worker to the requests in the engine."""

from collections.abc import Iterator

import grpc
import psycopg2
import pytest

from tests.support.batches import lines
from tests.support.collector import CLIENT_SPAN, TRACE, TRACEPARENT, Collector, Span, collecting
from tests.support.servers import Stack
from tests.support.waiting import until
from vllm_batch import Client
from vllm_batch.v1 import batch_service_pb2 as pb
from vllm_batch.v1 import batch_service_pb2_grpc

UNSAMPLED = TRACEPARENT.removesuffix("01") + "00"


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    """A collector, with the environment that makes processes send to it."""
    with collecting() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.endpoint)
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
        yield collector


def upload(stack: Stack, count: int, traceparent: str = TRACEPARENT) -> pb.Batch:
    """Uploads a batch with a trace context and an id, as an instrumented client does."""
    messages = [pb.UploadBatchRequest(options=pb.BatchOptions())]
    messages += [pb.UploadBatchRequest(data=line) for line in lines(count)]
    messages += [pb.UploadBatchRequest(end=pb.UploadEnd())]
    metadata = (("traceparent", traceparent), ("x-request-id", "upload-of-monday"))
    with grpc.insecure_channel(stack.target) as channel:
        stub = batch_service_pb2_grpc.BatchServiceStub(channel)
        return stub.UploadBatch(iter(messages), timeout=30, metadata=metadata).batch


def test_one_trace_from_client_to_engine(collector: Collector, serving: Stack, client: Client) -> None:
    """Client, gateway, worker and each request form one trace, and a trace that is not sampled is sent nowhere."""
    upload(serving, 3, UNSAMPLED)
    batch = upload(serving, 3)
    assert len(list(client.results(batch.id, follow=True))) == 3

    def of_trace() -> list[Span]:
        spans = [span for span in collector.spans if span.trace == TRACE]
        return spans if len(spans) >= 5 else []

    spans = until(of_trace, "five spans of the trace")
    assert len(spans) == 5
    by_id = {span.id: span for span in spans}
    runs = [span for span in spans if span.name == "run_request"]
    number = batch.id.removeprefix("batch_")
    assert {run.attributes["request"] for run in runs} == {f"batch_req_{number}_{index}" for index in range(3)}
    for run in runs:
        worker = by_id[run.parent]
        gateway = by_id[worker.parent]
        assert gateway.parent == CLIENT_SPAN
        services = [span.service for span in (run, worker, gateway)]
        assert services == ["vllm-batch-worker", "vllm-batch-worker", "vllm-batch-gateway"]
        assert worker.name == gateway.name == "vllm_batch.v1.BatchService/UploadBatch"


def test_an_upload_is_followed_through_the_logs(stack: Stack, client: Client) -> None:
    """Gateway and worker log an upload under one call id, and its trace context is kept without a collector."""
    stack.gateway()
    stack.worker()
    stack.wait_until_accepting()
    batches = [upload(stack, 1), client.submit_lines(lines(1)), client.submit_lines(lines(1))]
    gateway, worker = stack.servers
    forwarded, stored = gateway.events("batch_forwarded"), worker.events("batch_stored")
    for key in ("call_id", "batch", "worker_id"):
        assert [event[key] for event in forwarded] == [event[key] for event in stored]
    assert [event["batch"] for event in stored] == [batch.id for batch in batches]
    ids = [event["call_id"] for event in stored]
    assert ids[0] == "upload-of-monday"
    assert len(set(ids)) == 3
    lives = {event["incarnation"] for event in stored + worker.events("phase_entered")}
    assert len(lives) == 1
    with psycopg2.connect(stack.database_url) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT traceparent FROM batches ORDER BY id")
        assert cursor.fetchall() == [(TRACEPARENT,), (None,), (None,)]
