"""Claim: near its end a batch uses all workers, however fast each is; uploads spread over them; other models cost none.

Against: the time in which workers that are never idle would be done; all of the uploads; a claim with nothing else.
Target: beside a worker 20 times slower at most 1.15 times the ideal; 1,000 requests of 1 s on four workers at most 1.3
times; of 60 uploads at three gateways with three idle workers none gets more than half; a claim beside 100,000 chunks
of a model that the worker does not serve costs at most 1.2 times as much.

The engine is simulated. Times are from the creation of a batch to its end, by the clock of Postgres. The ideal is the
number of requests divided by what all engines could do together, in whole rounds if all begin at once.
"""

import math
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

from benchmarks.claims.turns import claim_ms
from benchmarks.lib import chats
from benchmarks.lib.harness import Figure, Sizes, alternate, at_most, main
from service.db.connection import Database, migrate
from tests.support.ports import free_port
from tests.support.queue import queued
from tests.support.servers import PostgresServer, Stack, new_database
from tests.support.waiting import until
from vllm_batch import Client

SIZES: Sizes = {"requests": (6_720, 1_680), "foreign": (100_000, 5_000), "rounds": (5, 1)}
# Seconds of a request on the fast and the slow worker, and how many each runs at once.
FAST_S, SLOW_S, AT_ONCE = 0.05, 1.0, 16
FEW, WORKERS, REQUEST_S, FOUR_AT_ONCE = 1_000, 4, 1.0, 256
UPLOADS, GATEWAYS, IDLE = 60, 3, 3
# Their requests outlast the uploads, so that nothing but these counts.
UPLOADED, UPLOADED_S = 20, 0.2


@contextmanager
def fleet(url: str, gateways: int, *workers: dict[str, object]) -> Iterator[list[Stack]]:
    """Workers with these settings, and gateways, each with a stack of its own, on a fresh database."""
    with new_database(url) as address, ExitStack() as ending, tempfile.TemporaryDirectory() as folder:
        stacks = []
        for number in range(gateways):
            home = Path(folder) / str(number)
            home.mkdir()
            stacks.append(Stack(address, home, free_port(), []))
            ending.callback(stacks[-1].end)
            gateway = stacks[-1].gateway(heartbeat_interval_s=5)
        for number, settings in enumerate(workers):
            stacks[0].worker(f"w{number}", heartbeat_interval_s=5, **settings)
        for stack in stacks:
            gateway = stack.servers[0]
            until(lambda: serving(gateway) == len(workers), "the gateway to know all workers")  # noqa: B023
            stack.wait_until_accepting()
        yield stacks


def serving(gateway: object) -> int:
    """The workers that serve, as the gateway has logged it."""
    found = {event["address"] for event in gateway.events("worker_contact") if event["health"] == "serving"}  # type: ignore[attr-defined]
    return len(found)


def took_s(stack: Stack, requests: int) -> float:
    """Runs a batch and returns how long it took."""
    with Client(stack.target) as client:
        done = client.wait(client.submit_lines(chats.lines(requests)).id)
    assert done.counts.completed == requests
    return (done.end_time.ToNanoseconds() - done.create_time.ToNanoseconds()) / 1e9


def uploads(url: str) -> float:
    """Sends the uploads, some at a time. Returns the largest part of them that one worker got."""
    workers: list[dict[str, object]] = [{"simulated_request_s": UPLOADED_S} for _ in range(IDLE)]
    with fleet(url, GATEWAYS, *workers) as stacks, ThreadPoolExecutor(GATEWAYS) as pool:

        def send(number: int) -> None:
            with Client(stacks[number % GATEWAYS].target) as client:
                client.submit_lines(chats.lines(UPLOADED))

        list(pool.map(send, range(UPLOADS)))
        events = [event for stack in stacks for event in stack.servers[0].events("batch_forwarded")]
    assert len(events) == UPLOADS
    return max(Counter(str(event["worker_id"]) for event in events).values())


def claims(url: str, foreign: int, rounds: int) -> Iterator[Figure]:
    """Claims of one chunk with and without chunks of another model, in turns."""
    with new_database(url) as alone, new_database(url) as beside:
        databases = {"alone": Database(alone, "benchmark"), "beside": Database(beside, "benchmark")}
        for database in databases.values():
            queued(database, 1_000)
        queued(databases["beside"], foreign, models=("foreign",))
        for database in databases.values():
            database.call(lambda db: db.execute_sql("VACUUM ANALYZE"))
            claim_ms(database)
        values = alternate(
            2 + rounds,
            alone=lambda: claim_ms(databases["alone"]),
            beside=lambda: claim_ms(databases["beside"]),
        )
        for database in databases.values():
            database.close()
    name = f"claim beside {foreign:,} chunks of another model"
    yield Figure(name, "ms", values["beside"], "without", values["alone"], at_most("ratio", 1.2))


def measure(requests: int, foreign: int, rounds: int) -> Iterator[Figure]:
    """Two workers of different speeds, four of the same, uploads, claims."""
    with tempfile.TemporaryDirectory(prefix="vbb-", ignore_cleanup_errors=True) as home:
        server = PostgresServer(Path(home))
        server.start()
        try:
            template = Database(server.url % "batch", "benchmark")
            template.call(migrate)
            template.close()
            yield from times(server.url, requests, rounds)
            most = [uploads(server.url) for _ in range(rounds)]
            name = f"{UPLOADS} uploads, {GATEWAYS} gateways, {IDLE} idle workers: the most that one got"
            yield Figure(name, "uploads", most, "all", [UPLOADS], at_most("ratio", 0.5))
            yield from claims(server.url, foreign, rounds)
        finally:
            server.stop()


def times(url: str, requests: int, rounds: int) -> Iterator[Figure]:
    """How long batches take."""
    two: list[dict[str, object]] = [
        {"simulated_request_s": each, "simulated_window": AT_ONCE} for each in (FAST_S, SLOW_S)
    ]
    with fleet(url, 1, *two) as [stack]:
        ours = [took_s(stack, requests) for _ in range(rounds)]
    ideal_s = requests / (AT_ONCE / FAST_S + AT_ONCE / SLOW_S)
    name = f"{requests:,} requests on a worker and one {SLOW_S / FAST_S:.0f} times slower"
    yield Figure(name, "s", ours, "ideal", [ideal_s], at_most("ratio", 1.15))
    same: dict[str, object] = {"simulated_request_s": REQUEST_S, "simulated_window": FOUR_AT_ONCE}
    with fleet(url, 1, *[same] * WORKERS) as [stack]:
        ours = [took_s(stack, FEW) for _ in range(rounds)]
    ideal_s = math.ceil(FEW / WORKERS / FOUR_AT_ONCE) * REQUEST_S
    name = f"{FEW:,} requests of {REQUEST_S:.0f} s on {WORKERS} workers"
    yield Figure(name, "s", ours, "ideal", [ideal_s], at_most("ratio", 1.3))


if __name__ == "__main__":
    main(__file__, __doc__, SIZES, measure)
