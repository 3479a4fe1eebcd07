"""Claim: the path of a request through the worker (claimed, run, stored) never makes an engine wait.

Against: psql's `\\copy` of exactly the rows of the results into a table like `results`, with its indexes, in the same
Postgres.
Target: at least 5,000 requests/s on 2 cores; the ratio is stated.

From the first claim to the last result, by the batch's own times. The engine is simulated, and so fast that everything
else takes the time.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.lib import chats
from benchmarks.lib.harness import Figure, Sizes, alternate, at_least, main, timed
from benchmarks.lib.memory import peak_mb
from benchmarks.lib.stacks import processor_s, psql, simulated
from vllm_batch import Client
from vllm_batch.v1 import batch_service_pb2 as pb

SIZES: Sizes = {"requests": (200_000, 10_000), "rounds": (5, 3)}
FAST = {"BATCH_SIMULATED_REQUEST_S": "0", "BATCH_SIMULATED_WINDOW": "1024"}


def measure(requests: int, rounds: int) -> Iterator[Figure]:
    """Batches and copies, in turns."""
    with tempfile.TemporaryDirectory() as folder, simulated(**FAST) as stack, Client(stack.target) as client:
        given, rows = chats.write(Path(folder) / "in.jsonl", requests), Path(folder) / "results.tsv"
        count = 0
        programs = {"worker": stack.pid("worker"), "postgres": stack.pid("postgres")}
        took_us: dict[str, list[float]] = {name: [] for name in programs}

        def batch() -> float:
            nonlocal count
            with given.open("rb") as file:
                made = client.submit(file)
            before = {name: processor_s(pid) for name, pid in programs.items()}
            *_, done = client.watch(made.id)
            assert (done.state, done.counts.completed) == (pb.BATCH_STATE_COMPLETED, requests)
            for name, pid in programs.items():
                took_us[name].append((processor_s(pid) - before[name]) / requests * 1e6)
            psql(
                stack,
                f"\\copy (SELECT * FROM results WHERE batch_id = {made.id.rpartition('_')[2]} ORDER BY sequence)"
                f" TO '{rows}'",
            )
            count += 1
            took_s = (done.end_time.ToNanoseconds() - done.start_time.ToNanoseconds()) / 1e9
            return requests / took_s

        def copy() -> float:
            psql(stack, f"CREATE TABLE copied_{count} (LIKE results INCLUDING ALL)")
            return requests / timed(lambda: psql(stack, f"\\copy copied_{count} FROM '{rows}'"))

        values = alternate(rounds, batch=batch, copy=copy)
        worker_mb = peak_mb(stack.pid("worker"))
    yield Figure(
        f"{requests:,} requests claimed, run, stored", "requests/s", values["batch"], "psql \\copy", values["copy"],
        at_least("median", 5000),
    )  # fmt: skip
    for name, values_us in took_us.items():
        yield Figure(f"processor time of {name}", "µs/request", values_us)
    yield Figure("peak of the worker", "MB", [worker_mb])


if __name__ == "__main__":
    main(__file__, __doc__, SIZES, measure)
