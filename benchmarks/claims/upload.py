"""Claim: an upload costs little more than copying its rows, and memory does not grow with its size.

Against: psql's `\\copy` of the same rows into a table like `requests`, with its indexes, in the same Postgres.
Target: at least half its rate; at most 300 MB in client, gateway and worker each, whatever the size.

From the first byte that the client sends to the stored batch.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.lib import chats
from benchmarks.lib.harness import Figure, Sizes, alternate, at_least, at_most, main, timed
from benchmarks.lib.memory import peak_mb
from benchmarks.lib.stacks import psql, python, simulated
from vllm_batch import Client

SIZES: Sizes = {"requests": (1_000_000, 50_000), "rounds": (5, 3)}
# The simulated engine never answers these, so nothing else is stored meanwhile.
NEVER: dict[str, Any] = {"vllm_xargs": {"simulate": 1_000_000}}
# Runs in a process of its own, whose start is not timed.
UPLOAD = """
import json, sys, time
from benchmarks.lib.memory import peak_mb
from vllm_batch import Client
with Client(sys.argv[1]) as client, open(sys.argv[2], "rb") as file:
    begin_s = time.monotonic()
    batch = client.submit(file)
    print(json.dumps({"took_s": time.monotonic() - begin_s, "mb": peak_mb(), "batch": batch.id}))
"""


def rows(path: Path, count: int) -> Path:
    """Writes the rows of the batch in COPY's text format."""
    with path.open("w") as file:
        for index in range(count):
            file.write(f"1\t{index}\tc{index}\t/v1/chat/completions\t{chats.body(index, **NEVER)}\n")
    return path


def measure(requests: int, rounds: int) -> Iterator[Figure]:
    """Uploads and copies, in turns."""
    with (
        tempfile.TemporaryDirectory() as folder,
        simulated() as stack,
        Client(stack.target) as client,
    ):
        given, copied = (
            chats.write(Path(folder) / "in.jsonl", requests, **NEVER),
            rows(Path(folder) / "in.tsv", requests),
        )
        client_mb: list[float] = []

        def upload() -> float:
            done = python(UPLOAD, stack.target, str(given))
            client_mb.append(done["mb"])
            # The worker drops the batch, and its chunks do not queue ahead of the next one's.
            client.cancel(done["batch"])
            return requests / float(done["took_s"])

        def copy() -> float:
            # A table for each round, because each upload has its own rows too; none is dropped while others are timed.
            psql(stack, f"CREATE TABLE copied_{len(client_mb)} (LIKE requests INCLUDING ALL)")
            into = f"copied_{len(client_mb)} (batch_id, index, custom_id, url, body)"
            return requests / timed(lambda: psql(stack, f"\\copy {into} FROM '{copied}'"))

        values = alternate(rounds, upload=upload, copy=copy)
        gateway_mb, worker_mb = peak_mb(stack.pid("gateway")), peak_mb(stack.pid("worker"))
    name = f"upload of {requests:,} lines"
    yield Figure(name, "lines/s", values["upload"], "psql \\copy", values["copy"], at_least("ratio", 0.5))
    yield Figure(f"{name}: peak of the client", "MB", client_mb, target=at_most("high", 300))
    yield Figure(f"{name}: peak of the gateway", "MB", [gateway_mb], target=at_most("high", 300))
    yield Figure(f"{name}: peak of the worker", "MB", [worker_mb], target=at_most("high", 300))


if __name__ == "__main__":
    main(__file__, __doc__, SIZES, measure)
