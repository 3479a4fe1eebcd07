"""Claim: nobody waits for what others have in the queue, and a claim costs no more however many they are.

Against: half of all tokens; an idle system; a claim of one tenant with one batch, in turns.
Target: a tenant beside one with a million requests has 0.5 ± 0.05 of all tokens in each 30 s; the first result of ten
requests behind a million of the same tenant comes in at most twice the time of an idle system; a claim with 1,000
tenants, 10,000 open batches and 10 million requests costs at most 1.2 times as much.

The engine is simulated: 64 requests at once, 1 s each on average, and a window of 128 (twice as many, as with vLLM).
The requests of the second tenant have three times as many tokens as those of the first. Tokens are those of stored
results, by the time at which they were stored.
"""

import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import peewee

from benchmarks.lib import chats
from benchmarks.lib.harness import Figure, Sizes, alternate, at_most, main
from benchmarks.lib.stacks import postgres, simulated
from service.auth import tokens
from service.auth.roles import Role
from service.db import chunks, turns
from service.db.chunks import Holder
from service.db.connection import Database
from vllm_batch import Client

SIZES: Sizes = {
    "queued": (1_000_000, 20_000),
    "requests": (3_000, 300),
    "tenants": (1_000, 100),
    "batches": (10_000, 1_000),
    "rounds": (20, 5),
}
PERIOD_S = 30.0
CLAIMS_A_ROUND = 50
REQUEST_S, CONCURRENCY, WINDOW = 1.0, 64, 128
ENGINE = {
    "BATCH_SIMULATED_REQUEST_S": str(REQUEST_S),
    "BATCH_SIMULATED_WINDOW": str(CONCURRENCY),
    "BATCH_WINDOW": str(WINDOW),
}
# Batches of 1,000 requests, as chunks alone: a claim reads no requests.
FILL = """
INSERT INTO batches (state, tenant, digest, metadata, priority, models, total)
SELECT 'in_progress', 'tenant-' || b %% %(tenants)s, '', '{}', 0, '{tiny}', %(each)s
FROM generate_series(1, %(batches)s) b;
INSERT INTO chunks (batch_id, first_index, count, unfinished, priority, models)
SELECT b, i * 100, 100, 100, 0, '{tiny}'
FROM generate_series(0, %(each)s / 100 - 1) i, generate_series(1, %(batches)s) b;
ANALYZE
"""
USED = """
SELECT b.tenant, sum((b.prompt_tokens + b.completion_tokens) / (b.completed + b.failed))::float8
FROM results r JOIN batches b ON b.id = r.batch_id
WHERE r.finish_time >= to_timestamp({begin}) AND r.finish_time < to_timestamp({end}) GROUP BY b.tenant
"""


def fill(db: peewee.PostgresqlDatabase, tenants: int, batches: int, each: int) -> None:
    """Puts batches into the queue."""
    db.execute_sql(FILL, {"tenants": tenants, "batches": batches, "each": each})
    turns.mend(db)


def claim_ms(database: Database) -> float:
    """Median of some claims of one chunk, each released afterwards."""
    took_ms = []
    for _ in range(CLAIMS_A_ROUND):
        mine = Holder("w", uuid4(), 60.0)
        begin_s = time.perf_counter()
        [chunk] = database.call(chunks.claim, mine, ["tiny"], 1)
        took_ms.append((time.perf_counter() - begin_s) * 1000)
        database.call(chunks.release, mine, [chunk.id])
    return statistics.median(took_ms)


def claims(tenants: int, batches: int, rounds: int) -> Iterator[Figure]:
    """The cost of a claim, in turns."""
    with postgres("one", "many") as databases:
        databases["one"].call(fill, 1, 1, 10_000)
        databases["many"].call(fill, tenants, batches, 1_000)
        for database in databases.values():
            # The first claims take over what has come into the queue.
            for _ in range(2 + batches // 500):
                claim_ms(database)
            database.call(lambda db: db.execute_sql("VACUUM ANALYZE"))
        values = alternate(rounds, one=lambda: claim_ms(databases["one"]), many=lambda: claim_ms(databases["many"]))
    name = f"claim with {tenants:,} tenants, {batches:,} batches, {batches * 1000:,} requests"
    yield Figure(name, "ms", values["many"], "1, 1, 10,000", values["one"], at_most("ratio", 1.2))


def line(index: int) -> bytes:
    """A request of the first tenant: from half to three halves as long, so that they do not all end together."""
    return chats.line(index, vllm_xargs={"simulate": REQUEST_S * (0.5 + index * 7919 % 1000 / 1000)})


def first_result_s(client: Client) -> float:
    """Time from the submission of ten requests to the first result."""
    begin_s = time.monotonic()
    batch = client.submit_lines(chats.lines(10))
    next(state for state in client.watch(batch.id) if state.counts.completed)
    took_s = time.monotonic() - begin_s
    client.wait(batch.id)
    return took_s


def shares(queued: int, requests: int) -> Iterator[Figure]:
    """Two tenants on a stack of their own, and ten requests more of the first."""
    with tempfile.TemporaryDirectory() as folder:
        secrets = {}
        file = Path(folder) / "hashes"
        file.touch(0o600)
        for name in ("a", "b"):
            secrets[name], token = tokens.new(name, Role.SUBMIT)
            with file.open("a") as lines:
                lines.write(f"{token.line()}\n")
        operator, token = tokens.new("operator", Role.OPERATE)
        with file.open("a") as lines:
            lines.write(f"{token.line()}\n")
        (Path(folder) / "operator").write_text(operator)
        (Path(folder) / "operator").chmod(0o600)
        settings = {"BATCH_TOKEN_HASHES": str(file), "BATCH_TOKEN_FILE": str(Path(folder) / "operator")}
        with (
            simulated(**ENGINE, **settings) as stack,
            Client(stack.target, token=secrets["a"]) as a,
            Client(stack.target, token=secrets["b"]) as b,
        ):
            idle_s = [first_result_s(a) for _ in range(3)]
            a.submit_lines(line(index) for index in range(queued))
            time.sleep(3 * WINDOW / CONCURRENCY * REQUEST_S)
            behind_s = [first_result_s(a) for _ in range(3)]
            begin_s = time.time()
            batch = b.submit_lines(chats.lines(requests, max_tokens=112))
            done = b.wait(batch.id)
            end_s = done.end_time.ToNanoseconds() / 1e9
            share = []
            for period in range(max(1, int((end_s - begin_s) / PERIOD_S))):
                first_s = begin_s + period * PERIOD_S
                used = dict(stack.sql(USED.format(begin=first_s, end=min(first_s + PERIOD_S, end_s))))
                share.append(used["b"] / sum(used.values()))
    name = f"share of {requests:,} requests beside {queued:,} of another, each {PERIOD_S:.0f} s"
    yield Figure(name, "", share, "half", [0.5])
    yield Figure("its distance from half", "", [abs(each - 0.5) for each in share], target=at_most("high", 0.05))
    behind = f"first result of 10 requests behind {queued:,}"
    yield Figure(behind, "s", behind_s, "idle", idle_s, at_most("ratio", 2))
    more_s = [each - statistics.median(idle_s) for each in behind_s]
    yield Figure(
        "by how much it is later",
        "s",
        more_s,
        "time of a window",
        [WINDOW / CONCURRENCY * REQUEST_S],
        at_most("ratio", 1),
    )


def measure(queued: int, requests: int, tenants: int, batches: int, rounds: int) -> Iterator[Figure]:
    """First claims alone, then whole stacks."""
    yield from claims(tenants, batches, rounds)
    yield from shares(queued, requests)


if __name__ == "__main__":
    main(__file__, __doc__, SIZES, measure)
