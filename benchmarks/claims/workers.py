"""Claim: workers on one Postgres add up until its processors are used up, even if all of them work on one batch.

Against: the rate of a single worker, alone on the same Postgres, in turns.
Target: none; docs/capacity.md draws the conclusions.

Only what a worker asks of Postgres: chunks claimed, their requests read, 100 results stored at a time. Each worker is a
process of its own on the same machine, so with few cores the workers themselves use most of them.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from uuid import uuid4

from benchmarks.lib.harness import Figure, Sizes, alternate, main
from benchmarks.lib.stacks import postgres
from service.db import chunks, results, turns
from service.db.chunks import Holder
from service.db.connection import Database
from service.db.run_order import CHUNK_SIZE
from tests.support.stacks import ROOT

SIZES: Sizes = {"requests": (50_000, 4_000), "rounds": (5, 1)}
# (workers, batches that they share)
CASES = ((1, 1), (2, 1), (4, 1), (8, 1), (8, 8))
BODY = json.dumps({"choices": [{"message": {"role": "assistant", "content": "An answer of some length. " * 10}}]})
FILL = """
TRUNCATE batches, requests, chunks, results, queue, queue_changes, pool_tenants CASCADE;
INSERT INTO batches (id, state, digest, metadata, priority, models, total)
SELECT b, 'in_progress', '', '{}', 0, '{tiny}', %(count)s FROM generate_series(1, %(batches)s) b;
INSERT INTO requests SELECT b, i, 'c' || i, '/v1/chat/completions', repeat('x', 200)
FROM generate_series(1, %(batches)s) b, generate_series(0, %(count)s - 1) i;
INSERT INTO chunks (batch_id, first_index, count, unfinished, priority, models)
SELECT b, i * %(chunk)s, %(chunk)s, %(chunk)s, 0, '{tiny}'
FROM generate_series(0, %(count)s / %(chunk)s - 1) i, generate_series(1, %(batches)s) b;
ANALYZE
"""


def work(url: str) -> None:
    """Claims and answers requests until none are left."""
    database, incarnation = Database(url, "benchmark-worker"), uuid4()
    mine = Holder(str(incarnation), incarnation, 60.0)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    sys.stdin.readline()
    while taken := database.call(chunks.claim, mine, ["tiny"], 1):
        requests = database.call(chunks.unanswered, taken[0])
        group = [results.Result(r.chunk_id, r.batch_id, r.index, status_code=200, body=BODY) for r in requests]
        database.call(results.write, group, incarnation)
    database.close()


def rate(database: Database, url: str, workers: int, batches: int, requests: int) -> float:
    """Requests per second of this many workers together."""
    each = requests // batches // CHUNK_SIZE * CHUNK_SIZE
    values = {"count": each, "batches": batches, "chunk": CHUNK_SIZE}
    database.call(lambda db: db.execute_sql(FILL, values))
    database.call(turns.mend)
    database.call(lambda db: db.execute_sql("CHECKPOINT"))
    command = [sys.executable, "-m", "benchmarks.claims.workers", "--work", url]
    processes = [
        subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(workers)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    begin_s = time.monotonic()
    for process in processes:
        assert process.stdin is not None
        process.stdin.close()
    for process in processes:
        assert process.wait(600) == 0
    took_s = time.monotonic() - begin_s
    [state] = database.call(lambda db: db.execute_sql("SELECT DISTINCT state FROM batches").fetchall())
    assert state == ("completed",)
    return each * batches / took_s


def measure(requests: int, rounds: int) -> Iterator[Figure]:
    """All cases, in turns."""
    with postgres("shared") as databases:
        [database] = databases.values()
        url = database.call(lambda db: db.execute_sql("SHOW unix_socket_directories").fetchone()[0])

        def case(workers: int, batches: int) -> Callable[[], float]:
            address = f"postgresql:///shared?host={url}&user=postgres"
            return lambda: rate(database, address, workers, batches, requests)

        values = alternate(rounds, **{f"{workers} on {batches}": case(workers, batches) for workers, batches in CASES})
    for workers, batches in CASES[1:]:
        name = f"{workers} workers on {batches} batch{'es' if batches > 1 else ''}"
        yield Figure(name, "requests/s", values[f"{workers} on {batches}"], "1 worker", values["1 on 1"])


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(sys.argv[2])
    else:
        main(__file__, __doc__, SIZES, measure)
