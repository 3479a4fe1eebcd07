"""Several workers behind one gateway: each batch reaches one that can serve it, and is stored once."""

import signal
from collections.abc import Callable

import grpc
import pytest

from tests.support.batches import count, finished, inline, line, lines, refused
from tests.support.ports import free_port
from tests.support.servers import Server, Stack
from tests.support.waiting import until
from vllm_batch import CallError, Client
from vllm_batch.v1 import batch_service_pb2 as pb
from vllm_batch.v1 import batch_service_pb2_grpc


def knows(gateway: Server, count: int) -> bool:
    """True when the gateway has seen this many workers both ready in their heartbeats and serving on their links."""
    ready = [event for event in gateway.events("worker_phase") if event["phase"] == "ready"]
    serving = {event["address"] for event in gateway.events("worker_contact") if event["health"] == "serving"}
    return len(ready) == len(serving) == count


def two_workers(stack: Stack, **first: object) -> Server:
    """Starts two workers and returns the one that is chosen first. Heartbeats do not become stale here."""
    gateway = stack.gateway(heartbeat_timeout_s=3600)
    module = "tests.support.blocking_worker"
    stack.run(module, "b", worker_port=free_port())
    until(lambda: knows(gateway, 1), "the gateway to know one worker")
    # Who has had no call yet comes before who has.
    with Client(stack.target) as client:
        refused(lambda: client.submit_lines(lines(1, model="unknown")))
    worker = stack.run(module, "a", worker_port=free_port(), **first)
    until(lambda: knows(gateway, 2), "the gateway to know both workers")
    return worker


def created(stack: Stack) -> pb.Batch:
    """Creates an inline batch."""
    with grpc.insecure_channel(stack.target) as channel:
        return batch_service_pb2_grpc.BatchServiceStub(channel).CreateBatch(inline(), timeout=60).batch


def uploaded(stack: Stack, padding: int = 0, request_id: str = "") -> pb.Batch:
    """Uploads a batch with one attempt, under a request_id only if one is given."""
    pieces = [
        pb.UploadBatchRequest(options=pb.BatchOptions(request_id=request_id)),
        pb.UploadBatchRequest(data=line("a", padding="x" * padding)),
        pb.UploadBatchRequest(end=pb.UploadEnd()),
    ]
    with grpc.insecure_channel(stack.target) as channel:
        return batch_service_pb2_grpc.BatchServiceStub(channel).UploadBatch(iter(pieces), timeout=60).batch


def test_models_of_different_workers(stack: Stack, client: Client) -> None:
    """A batch reaches a worker that serves its model, and one for the model of an absent worker gets UNAVAILABLE."""
    gateway = stack.gateway(heartbeat_timeout_s=3600)
    stack.worker("a", model="alpha")
    beta = stack.worker("b", model="beta")
    until(lambda: knows(gateway, 2), "the gateway to know both workers")
    batches = [client.submit_lines([b"\n", *lines(30, model=model)]) for model in ("alpha", "beta") * 3]
    text = pb.InlineRequest(custom_id="b", url="/v1/chat/completions", body_json='{"model": "beta", "messages": []}')
    structure = pb.InlineRequest(custom_id="a", url="/v1/chat/completions")
    structure.body.update({"model": "beta", "messages": []})
    with grpc.insecure_channel(stack.target) as channel:
        stub = batch_service_pb2_grpc.BatchServiceStub(channel)
        batches += [
            stub.CreateBatch(pb.CreateBatchRequest(requests=[one]), timeout=30).batch for one in (text, structure)
        ]
    done = [finished(client, batch.id) for batch in batches]
    assert [list(batch.models) for batch in done] == [["alpha"], ["beta"]] * 3 + [["beta"]] * 2
    assert all(batch.counts.completed == batch.counts.total for batch in done)
    error = refused(lambda: client.submit_lines(lines(1, model="gamma")))
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert error.violations[0][0] == "line 1: body.model"
    beta.kill()
    until(lambda: gateway.events("worker_contact")[-1]["health"] == "unreachable", "the link to break")
    error = refused(lambda: client.submit_lines(lines(1, model="beta")))
    assert (error.code, error.reason) == (grpc.StatusCode.UNAVAILABLE, "WORKER_OFFLINE")
    assert error.metadata["worker_id"].endswith(":b")
    assert finished(client, client.submit_lines(lines(3, model="alpha")).id).counts.completed == 3


@pytest.mark.parametrize("create", [created, uploaded])
@pytest.mark.parametrize("when", ["before", "after"])
def test_create_crash_after_store(stack: Stack, client: Client, create: Callable[[Stack], pb.Batch], when: str) -> None:
    """If a worker dies before or after storing a batch, the next worker takes the call and the batch exists once.

    The client gave no request_id and tries once.
    """
    first = two_workers(stack, failpoint=f"store.{when}_commit")
    batch = create(stack)
    assert first.process.wait(30) == -signal.SIGKILL
    assert [found.id for found in client.list()] == [batch.id]
    assert finished(client, batch.id).counts.completed == 1


def test_an_upload_that_cannot_be_repeated(stack: Stack, client: Client) -> None:
    """A client of a failed large upload gets a request_id, and a retry under it returns the batch already stored."""
    first = two_workers(stack, failpoint="store.after_commit")
    with pytest.raises(grpc.RpcError) as caught:
        uploaded(stack, padding=1_000_000)
    error = CallError(caught.value)
    assert first.process.wait(30) == -signal.SIGKILL
    assert (error.code, error.reason) == (grpc.StatusCode.UNAVAILABLE, "WORKER_OFFLINE")
    again = uploaded(stack, padding=1_000_000, request_id=error.metadata["request_id"])
    assert [found.id for found in client.list()] == [again.id]


def test_a_worker_that_hangs_is_passed_over(stack: Stack, client: Client) -> None:
    """A call that went to a blocked worker moves on to the next, and the batch exists once."""
    first = two_workers(stack)
    first.process.send_signal(signal.SIGUSR1)
    batch = created(stack)
    first.process.send_signal(signal.SIGUSR2)
    assert finished(client, batch.id).counts.completed == 1
    assert (count(stack, "batches"), len(list(client.list()))) == (1, 1)


def test_refusals_of_one_worker(stack: Stack, client: Client) -> None:
    """While one worker drains, the other accepts every batch."""
    first = two_workers(stack)
    first.process.terminate()
    ids = {client.submit_lines(lines(1), request_id=f"r{number}").id for number in range(50)}
    assert first.process.wait(30) == 0
    assert len(ids) == 50
    assert {finished(client, batch_id).counts.completed for batch_id in ids} == {1}
