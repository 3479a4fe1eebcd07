"""Health as clients, load balancers and probes read it, and how it follows a worker's state."""

import json
import os
import queue
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from service.db.connection import Database, migrate
from service.rpc.services import HOST_SERVICE, WEBHOOK_SERVICE
from tests.support.batches import inline, line, lines, refused
from tests.support.ports import free_port
from tests.support.servers import Server, Stack, new_database
from tests.support.waiting import until
from vllm_batch import CallError, Client
from vllm_batch.v1 import batch_service_pb2 as pb
from vllm_batch.v1 import batch_service_pb2_grpc

SERVICE = "vllm_batch.v1.BatchService"
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def listed(target: str) -> dict[str, int]:
    """The status of each health name of the server."""
    with grpc.insecure_channel(target) as channel:
        answer = health_pb2_grpc.HealthStub(channel).List(health_pb2.HealthListRequest(), timeout=10)
        return {name: one.status for name, one in answer.statuses.items()}


def first_listed(server: Server, target: str) -> dict[str, int]:
    """The first statuses that the server reports."""

    def answered() -> dict[str, int]:
        assert server.process.poll() is None
        try:
            return listed(target)
        except grpc.RpcError:
            return {}

    return until(answered, "an answer")


def test_names(stack: Stack) -> None:
    """From their first answer, gateway and worker report NOT_SERVING for new work until they accept it."""
    gateway = stack.gateway()
    first = first_listed(gateway, stack.target)
    others = {HOST_SERVICE, WEBHOOK_SERVICE}
    assert (set(first), first[SERVICE]) == ({"", SERVICE, *others}, NOT_SERVING)
    worker = stack.worker(simulated_load_s=1)
    address = f"127.0.0.1:{worker.port}"
    assert first_listed(worker, address) == {"": NOT_SERVING, SERVICE: NOT_SERVING}
    stack.wait_until_accepting()
    assert listed(address) == {"": SERVING, SERVICE: SERVING}
    assert listed(stack.target) == listed(address) | dict.fromkeys(others, SERVING)


def test_a_gateway_is_ready_once_the_schema_is_there(postgres: str, tmp_path: Path) -> None:
    """What reads Postgres becomes SERVING with the schema of this version, so that an upgrade can wait for that; the
    gateway itself, which must not be restarted for it, is SERVING from the start.
    """
    with new_database(postgres, "template1") as url:
        stack = Stack(url, tmp_path, free_port(), [])
        try:
            gateway = stack.gateway()
            until(lambda: gateway.events("database_away"), "the gateway to miss the schema")
            others = {HOST_SERVICE, WEBHOOK_SERVICE}
            assert listed(stack.target) == {"": SERVING, **dict.fromkeys((SERVICE, *others), NOT_SERVING)}
            database = Database(url, "test")
            database.call(migrate)
            database.close()
            until(lambda: {name for name, one in listed(stack.target).items() if one == SERVING} == {"", *others}, "it")
        finally:
            stack.end()


@pytest.mark.parametrize(
    ("begin", "end"),
    [(signal.SIGKILL, None), (signal.SIGSTOP, signal.SIGCONT), (signal.SIGUSR1, signal.SIGUSR2)],
    ids=["killed", "frozen", "blocked"],
)
def test_a_lost_worker_is_noticed(
    stack: Stack, client: Client, begin: signal.Signals, end: signal.Signals | None
) -> None:
    """A killed, frozen or blocked worker is detected without its heartbeat, and accepted again after its return.

    A call that already went to it fails too.
    """
    # Heartbeats do not become stale in this test.
    gateway = stack.gateway(heartbeat_timeout_s=3600)
    worker = stack.run("tests.support.blocking_worker", "worker", worker_port=free_port())
    stack.wait_until_accepting()
    os.kill(worker.process.pid, begin)
    with grpc.insecure_channel(stack.target) as channel, pytest.raises(grpc.RpcError) as caught:
        batch_service_pb2_grpc.BatchServiceStub(channel).CreateBatch(inline(), timeout=60)
    assert (caught.value.code(), CallError(caught.value).reason) == (grpc.StatusCode.UNAVAILABLE, "WORKER_OFFLINE")
    until(lambda: listed(stack.target)[SERVICE] == NOT_SERVING, "the gateway to report NOT_SERVING")
    error = refused(lambda: client.submit_lines(lines(1)))
    assert (error.code, error.reason, bool(error.retry_delay_s)) == (
        grpc.StatusCode.UNAVAILABLE,
        "WORKER_OFFLINE",
        True,
    )
    assert error.metadata["cause"]
    assert listed(stack.target)[""] == SERVING
    if end is None:
        worker.process.wait(10)
        worker.start()
    else:
        os.kill(worker.process.pid, end)
    until(lambda: listed(stack.target)[SERVICE] == SERVING, "the gateway to accept new work again")
    assert client.submit_lines(lines(1)).id
    assert not gateway.events("call_failed")


def broken_off(stream: Any) -> CallError:
    """Reads a stream that its server breaks off, and returns the error it ends with."""
    with pytest.raises(grpc.RpcError) as caught:
        for _ in stream:
            pass
    return CallError(caught.value)


def test_sigterm_drains_the_gateway(serving: Stack, client: Client) -> None:
    """On SIGTERM the gateway reports NOT_SERVING, ends its streams with UNAVAILABLE, and lets an upload finish."""
    gateway = serving.servers[0]
    batch = client.submit_lines([*lines(20), line("never", vllm_xargs={"simulate": 600})])
    until(lambda: client.get(batch.id).counts.completed == 20, "the quick requests to complete")
    pieces: queue.Queue[pb.UploadBatchRequest | None] = queue.Queue()
    pieces.put(pb.UploadBatchRequest(options=pb.BatchOptions()))
    pieces.put(pb.UploadBatchRequest(data=line("first")))
    with grpc.insecure_channel(serving.target) as channel:
        stub = batch_service_pb2_grpc.BatchServiceStub(channel)
        health = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=SERVICE))
        watch = stub.WatchBatch(pb.WatchBatchRequest(batch_id=batch.id))
        results = stub.StreamResults(pb.StreamResultsRequest(batch_id=batch.id, follow=True))
        upload = stub.UploadBatch.future(iter(pieces.get, None))
        assert next(health).status == SERVING
        assert next(watch).batch.id == batch.id
        assert [result.index for result in next(results).results] == list(range(20))
        # An answer shows that the upload before it, on the same connection, has reached the gateway.
        stub.GetBatch(pb.GetBatchRequest(batch_id=batch.id), timeout=30)
        gateway.process.terminate()
        assert next(health).status == NOT_SERVING
        for stream in (health, watch, results):
            error = broken_off(stream)
            assert (error.code, error.reason) == (grpc.StatusCode.UNAVAILABLE, "SHUTTING_DOWN")
            assert error.retry_delay_s
        assert gateway.process.poll() is None
        pieces.put(pb.UploadBatchRequest(data=line("second")))
        pieces.put(pb.UploadBatchRequest(end=pb.UploadEnd()))
        pieces.put(None)
        assert upload.result(timeout=60).batch.counts.total == 2
    assert gateway.process.wait(60) == 0
    assert gateway.events("gateway_ended")


def test_a_client_follows_through_a_redeployment(serving: Stack) -> None:
    """Streams of the Python client resume where they were when the gateway is restarted."""
    gateway = serving.servers[0]
    with Client(serving.target, patience_s=60) as client:
        batch = client.submit_lines(lines(600, vllm_xargs={"simulate": 0.1}))
        watch, results = client.watch(batch.id), client.results(batch.id, follow=True)
        first = [next(watch), next(watch)]
        found = [next(results).index for _ in range(10)]
        assert gateway.terminate() == 0
        gateway.start()
        found += [result.index for result in results]
        assert found == list(range(600))
        assert [*first, *watch][-1].state == pb.BATCH_STATE_COMPLETED


@pytest.mark.thorough
def test_clients_avoid_a_gateway_that_accepts_nothing(serving: Stack, postgres: str) -> None:
    """With gRPC's client-side health checking, calls go only to gateways whose BatchService is SERVING."""
    port = free_port()
    # A gateway on another database, which has no worker.
    other = serving.run("service.gateway", "other", gateway_port=port, heartbeat_timeout_s=3600)
    other.kill()
    other._env["DATABASE_URL"] = postgres % "postgres"
    other.start()
    first_listed(other, f"127.0.0.1:{port}")
    target = f"ipv4:{serving.target},127.0.0.1:{port}"

    def answers(config: dict[str, object]) -> set[grpc.StatusCode]:
        codes = set()
        with grpc.insecure_channel(target, options=[("grpc.service_config", json.dumps(config))]) as channel:
            stub = batch_service_pb2_grpc.BatchServiceStub(channel)
            for number in range(100):
                try:
                    stub.CreateBatch(inline(f"c{number}"), timeout=30, wait_for_ready=True)
                    codes.add(grpc.StatusCode.OK)
                except grpc.RpcError as error:
                    codes.add(error.code())
        return codes

    round_robin: dict[str, object] = {"loadBalancingConfig": [{"round_robin": {}}]}
    assert answers(round_robin) == {grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE}
    assert answers(round_robin | {"healthCheckConfig": {"serviceName": SERVICE}}) == {grpc.StatusCode.OK}


@pytest.mark.skipif(not shutil.which("grpc_health_probe"), reason="grpc_health_probe is not on PATH")
def test_grpc_health_probe(serving: Stack) -> None:
    """grpc_health_probe distinguishes the gateway's own health from whether new work is accepted."""

    def probe(*service: str) -> int:
        return subprocess.run(["grpc_health_probe", f"-addr={serving.target}", *service], timeout=30).returncode

    assert (probe(), probe(f"-service={SERVICE}")) == (0, 0)
    serving.servers[1].kill()
    until(lambda: probe(f"-service={SERVICE}") == 4, "NOT_SERVING for new work")
    assert probe() == 0
