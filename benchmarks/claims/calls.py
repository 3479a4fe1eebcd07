"""Claim: the gateway answers small calls as fast as Python's gRPC can, above all when it refuses new work.

Against: a bare grpc.aio servicer that returns the same message, called in the same way, in turns.
Target: at least 0.8 of its rate for a refused CreateBatch; for GetBatch, which queries Postgres, the ratio is stated.

16 concurrent calls on one channel. The refusal comes from a gateway whose worker was stopped.

Where the time goes: for a refused call the bare servicer takes about 280 µs of processor time, nearly all of it in
gRPC. Identifying and counting the call (id, count, duration, trace, rights, rate, details of the error) adds 60 to 80
µs, which puts the ratio close to the target: runs fall on either side of it. GetBatch queries Postgres from a thread,
which competes with all others for Python's global interpreter lock.
"""

import asyncio
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc

from benchmarks.lib import chats
from benchmarks.lib.bare_servicer import Message, bare
from benchmarks.lib.harness import Figure, Sizes, alternate, at_least, main, percentile
from benchmarks.lib.stacks import simulated
from vllm_batch import Client
from vllm_batch.v1 import batch_service_pb2 as pb
from vllm_batch.v1 import batch_service_pb2_grpc

SIZES: Sizes = {"calls": (10_000, 1_000), "rounds": (5, 3)}
AT_ONCE = 16
TIMEOUT_S = 30


async def latencies(target: str, call: Callable[[Any], Any], count: int) -> tuple[float, list[float]]:
    """Calls per second, and each call's latency in milliseconds."""
    took_ms: list[float] = []

    async def one_after_another(stub: Any) -> None:
        for _ in range(count // AT_ONCE):
            begin_s = time.perf_counter()
            try:
                await call(stub)
            except grpc.RpcError as error:
                if error.code() is not grpc.StatusCode.UNAVAILABLE:
                    raise
            took_ms.append((time.perf_counter() - begin_s) * 1000)

    async with grpc.aio.insecure_channel(target) as channel:
        stub: Any = batch_service_pb2_grpc.BatchServiceStub(channel)
        await asyncio.gather(*(one_after_another(stub) for _ in range(AT_ONCE)))
        took_ms.clear()
        begin_s = time.perf_counter()
        await asyncio.gather(*(one_after_another(stub) for _ in range(AT_ONCE)))
        return len(took_ms) / (time.perf_counter() - begin_s), took_ms


def refusal(target: str) -> grpc.RpcError:
    """The error with which new work is refused."""
    with grpc.insecure_channel(target) as channel:
        try:
            batch_service_pb2_grpc.BatchServiceStub(channel).CreateBatch(pb.CreateBatchRequest(), timeout=TIMEOUT_S)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNAVAILABLE:
                return error
    raise AssertionError("new work is not refused")


def measure(calls: int, rounds: int) -> Iterator[Figure]:
    """Measures each call at the gateway and at the bare servicer, in turns."""
    # Calls are counted per client as usual, but never rejected.
    with simulated(BATCH_RATE_LIMIT_PER_S="1000000") as stack:
        with Client(stack.target) as client:
            made = client.submit_lines(chats.lines(10))
            *_, batch = client.watch(made.id)
        stack.supervisorctl("stop", "worker")
        get, create = pb.GetBatchRequest(batch_id=batch.id), pb.CreateBatchRequest()
        kinds: dict[str, Callable[[Any], Any]] = {
            "GetBatch": lambda stub: stub.GetBatch(get, timeout=TIMEOUT_S),
            "CreateBatch, refused": lambda stub: stub.CreateBatch(create, timeout=TIMEOUT_S),
        }
        with bare(Message.of(batch, refusal(stack.target))) as bare_target:
            for name, call in kinds.items():
                p99_ms: dict[str, list[float]] = {stack.target: [], bare_target: []}

                def rate(target: str, call: Callable[[Any], Any] = call, p99_ms: Any = p99_ms) -> float:
                    per_s, took_ms = asyncio.run(latencies(target, call, calls))
                    p99_ms[target].append(percentile(took_ms, 99))
                    return per_s

                values = alternate(rounds, gateway=lambda: rate(stack.target), bare=lambda: rate(bare_target))
                target = at_least("ratio", 0.8) if "refused" in name else None
                yield Figure(name, "calls/s", values["gateway"], "bare servicer", values["bare"], target)
                yield Figure(f"{name}: p99", "ms", p99_ms[stack.target], "bare servicer", p99_ms[bare_target])


if __name__ == "__main__":
    main(__file__, __doc__, SIZES, measure)
