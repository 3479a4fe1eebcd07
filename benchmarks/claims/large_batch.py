"""Claim: a batch of 20 million requests is one like any other.

Against: batches of 10 thousand, on the same stack.
Target: it is accepted with the default limits; at most 300 MB in client, gateway and worker each; its first result and
a claim of one of its chunks take at most 1.2 times as long.

The first result is timed from the answer to the upload, over which the worker has no other work. The engine is
simulated: 50 ms a request. Claims are measured as in `claim`, while the worker is stopped.
"""

import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

from benchmarks.claims.claim import CLAIMS_A_ROUND, claim_ms
from benchmarks.lib import chats
from benchmarks.lib.harness import Figure, Sizes, alternate, at_most, main, timed
from benchmarks.lib.memory import peak_mb
from benchmarks.lib.stacks import TIMEOUT_S, psql, python, simulated, url
from service.db import chunks, turns
from service.db.chunks import Holder
from service.db.connection import Database, migrate
from tests.support.queue import queued
from tests.support.waiting import until
from vllm_batch import Client
from vllm_batch.v1 import batch_service_pb2 as pb

SIZES: Sizes = {"requests": (20_000_000, 200_000), "few": (10_000, 10_000), "rounds": (10, 3)}
BEGUN = 20
# Runs in a process of its own, whose start is not timed.
FIRST_RESULT = """
import json, sys, time
from benchmarks.lib.memory import peak_mb
from vllm_batch import Client
with Client(sys.argv[1]) as client, open(sys.argv[2], "rb") as file:
    begin_s = time.monotonic()
    batch = client.submit(file)
    took_s = time.monotonic() - begin_s
    next(iter(client.results(batch.id, follow=True, order="RESULT_ORDER_FINISHED")))
    first_s = time.monotonic() - begin_s - took_s
    print(json.dumps({"took_s": took_s, "first_s": first_s, "mb": peak_mb(), "batch": batch.id}))
"""


def measure(requests: int, few: int, rounds: int) -> Iterator[Figure]:
    """First the small batches, then the large one."""
    with (
        tempfile.TemporaryDirectory() as folder,
        simulated(BATCH_SIMULATED_REQUEST_S="0.05") as stack,
        Client(stack.target) as client,
    ):

        def cancel(batch: str) -> None:
            client.cancel(batch)
            until(lambda: client.get(batch).state == pb.BATCH_STATE_CANCELLED, "the batch to be cancelled", TIMEOUT_S)

        def submitted(path: Path) -> Any:
            return python(FIRST_RESULT, stack.target, str(path))

        small = chats.write(Path(folder) / "small.jsonl", few)
        firsts = []
        for _ in range(rounds):
            done = submitted(small)
            firsts.append(done["first_s"])
            cancel(done["batch"])
        large = submitted(chats.write(Path(folder) / "large.jsonl", requests))
        peaks = {name: peak_mb(stack.pid(name)) for name in ("gateway", "worker")} | {"client": large["mb"]}
        stack.supervisorctl("stop", "worker")
        claims = claimed(stack, few, rounds)
        stack.supervisorctl("start", "worker")
        cancel_s = timed(lambda: cancel(large["batch"]))
    rate = requests / large["took_s"]
    name, against = f"{requests:,} requests", f"{few:,}"
    yield Figure(f"upload of {name}", "lines/s", [rate])
    for program, peak in peaks.items():
        yield Figure(f"peak of the {program}", "MB", [peak], target=at_most("high", 300))
    yield Figure(f"first result of {name}", "s", [large["first_s"]], against, firsts, at_most("ratio", 1.2))
    yield Figure(f"claim with {name}", "ms", claims["large"], against, claims["small"], at_most("ratio", 1.2))
    yield Figure(f"cancelling {name}", "s", [cancel_s])


def claimed(stack: Any, few: int, rounds: int) -> dict[str, list[float]]:
    """Claims in the stack's database and in one with few requests, in turns; the worker is stopped."""
    psql(stack, "CREATE DATABASE few")
    small = Database(url(stack).replace("/batch?", "/few?"), "benchmark", TIMEOUT_S)
    large = Database(url(stack), "benchmark", TIMEOUT_S)
    try:
        small.call(migrate)
        queued(small, few // 100, size=100)
        small.call(lambda db: db.execute_sql("ANALYZE"))
        for database in (small, large):
            database.call(turns.mend)
        # Those that the worker had begun, which are no whole chunks any more.
        aside = Holder("aside", uuid4(), TIMEOUT_S)
        begun = large.call(chunks.claim, aside, ["tiny"], BEGUN)

        def median_ms(database: Database) -> float:
            return statistics.median(claim_ms(database) for _ in range(CLAIMS_A_ROUND))

        values = alternate(1 + rounds, large=lambda: median_ms(large), small=lambda: median_ms(small))
        large.call(chunks.release, aside, [chunk.id for chunk in begun])
        return values
    finally:
        small.close()
        large.close()


if __name__ == "__main__":
    main(__file__, __doc__, SIZES, measure)
