"""Helpers for tests of a stack: small batches, their results, refusals, rows."""

import json
from collections.abc import Callable, Iterator

import grpc
import psycopg2
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.support.servers import Stack
from vllm_batch import CallError, Client
from vllm_batch.v1 import batch_service_pb2 as pb

URL = "/v1/chat/completions"


def line(custom_id: str, **body: object) -> bytes:
    body = {"model": "tiny", "messages": [{"role": "user", "content": f"hello {custom_id}"}]} | body
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": URL, "body": body}).encode() + b"\n"


def lines(count: int, **body: object) -> Iterator[bytes]:
    return (line(f"c{i}", **body) for i in range(count))


def finished(client: Client, batch_id: str) -> pb.Batch:
    *_, last = client.watch(batch_id)
    return last


def refused(call: Callable[[], object]) -> CallError:
    with pytest.raises(CallError) as caught:
        call()
    return caught.value


def count(stack: Stack, table: str) -> int:
    with psycopg2.connect(stack.database_url) as connection, connection.cursor() as cursor:
        cursor.execute(f"SELECT count(*) FROM {table}")
        [found] = cursor.fetchone() or (0,)
        return int(found)


def ready(stack: Stack) -> int:
    """Number of workers whose heartbeat says `ready`."""
    return count(stack, "heartbeats WHERE phase = 'ready'")


def run_sql(stack: Stack, statement: str) -> None:
    with psycopg2.connect(stack.database_url) as connection, connection.cursor() as cursor:
        cursor.execute(statement)


def health(target: str, service: str) -> str:
    with grpc.insecure_channel(target) as channel:
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=service), timeout=5)
        return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))


def inline(custom_id: str = "a") -> pb.CreateBatchRequest:
    body = '{"model": "tiny", "messages": []}'
    request = pb.InlineRequest(custom_id=custom_id, url="/v1/chat/completions", body_json=body)
    return pb.CreateBatchRequest(requests=[request])
