"""Claim: a request that kills the engine costs itself and three deaths; the rest of its batch completes.

Against: a runner that restarts with its remaining requests as often as the budget allows (10 times), and meets the same
request each time.
Target: at most 3 deaths.

Deaths of the engine, each answered by the watchdog with a restart, and the time until all other requests of the batch
have their results. The engine is simulated and loads at once: a real one adds its loading time to each death.
"""

import time
from collections.abc import Iterator
from typing import Any

from benchmarks.lib import chats
from benchmarks.lib.harness import Figure, Sizes, alternate, at_most, main
from benchmarks.lib.stacks import python, simulated
from tests.support.waiting import until
from vllm_batch import Client
from vllm_batch.v1 import batch_service_pb2 as pb

SIZES: Sizes = {"requests": (5_000, 500), "rounds": (5, 1)}
BUDGET = 10
REQUEST_S = 0.02
KILL: dict[str, Any] = {"vllm_xargs": {"simulate": "engine_dead"}}
# Sends as many requests at once as the engine takes, and keeps answers across the engine's deaths.
NAIVE = """
import asyncio, json, sys, time
from service.worker.engine.protocol import EngineDeadError
from service.worker.engine.simulated import SimulatedEngine
from benchmarks.claims.poison import body
count, budget, request_s = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])

async def life(left):
    engine = SimulatedEngine("tiny", request_s, 0.1)
    await engine.start()
    async def one(index):
        await engine.run("/v1/chat/completions", body(index, count))
        left.discard(index)
    answers = await asyncio.gather(*map(one, sorted(left)), return_exceptions=True)
    await engine.stop()
    return any(isinstance(answer, EngineDeadError) for answer in answers)

left, deaths = set(range(count)), 0
while left and deaths < budget and asyncio.run(life(left)):
    deaths += 1
print(json.dumps({"deaths": deaths, "left": len(left)}))
"""


def body(index: int, count: int) -> str:
    """Request `index` as the engine gets it; the one in the middle kills the engine."""
    return chats.body(index, **(KILL if index == count // 2 else {}))


def lines(count: int) -> Iterator[bytes]:
    """The lines of the batch."""
    return (chats.line(index, **(KILL if index == count // 2 else {})) for index in range(count))


def measure(requests: int, rounds: int) -> Iterator[Figure]:
    """Batches run by our stack and by the naive runner, in turns."""
    settings = {"BATCH_MAX_RESTARTS_PER_HOUR": "1000", "BATCH_RESTART_BACKOFF_MAX_S": "0.1"}
    with simulated(**settings, BATCH_SIMULATED_REQUEST_S=str(REQUEST_S)) as stack, Client(stack.target) as client:
        took_s: list[float] = []
        left: list[float] = []

        def ours() -> float:
            before, begin_s, complete_s = len(stack.restarts()), time.monotonic(), 0.0
            batch = client.submit_lines(lines(requests))
            for seen in client.watch(batch.id):
                if seen.counts.completed == requests - 1:
                    complete_s = complete_s or time.monotonic() - begin_s
            assert seen.state == pb.BATCH_STATE_COMPLETED
            assert client.result(batch.id, f"c{requests // 2}").error.code == "REQUEST_CRASHED_ENGINE"
            took_s.append(complete_s)
            # An earlier restart may have failed: its engine may have died before it was seen healthy.
            until(lambda: stack.restarts()[-1].outcome == "recovered", "the last restart", 120)
            until(lambda: not client.accepting(), "new work to be accepted", 120)
            return float(len(stack.restarts()) - before)

        def naive() -> float:
            done = python(NAIVE, str(requests), str(BUDGET), str(REQUEST_S))
            left.append(done["left"])
            return float(done["deaths"])

        values = alternate(rounds, ours=ours, naive=naive)
    against = "restart until the budget is gone"
    name = f"deaths by 1 killer in {requests:,}"
    yield Figure(name, "deaths", values["ours"], against, values["naive"], at_most("high", 3))
    yield Figure("time until all others are complete", "s", took_s, f"{against}: never")
    yield Figure("requests without a result at the end", "requests", [0.0] * rounds, against, left)


if __name__ == "__main__":
    main(__file__, __doc__, SIZES, measure)
