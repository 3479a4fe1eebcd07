"""Claim: after a failover of Postgres new work is acknowledged within seconds, and health is right all the time.

Against: 60 s, which a stack took that left it to libpq to try the hosts of `DATABASE_URL` one after the other.
Target: 15 s at most from the promotion to the first acknowledgement.

A primary and its standby, both named in `DATABASE_URL`; the primary is frozen or killed, and as soon as health tells
that, the standby is promoted. The engine is simulated.
"""

import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from benchmarks.lib.harness import Figure, Sizes, at_most, main
from service.db.connection import Database, migrate
from tests.support.batches import lines
from tests.support.ports import free_port
from tests.support.servers import Stack
from tests.support.standbys import pair
from tests.support.waiting import until
from vllm_batch import CallError, Client

SIZES: Sizes = {"freezes": (5, 1), "kills": (5, 1)}
BEFORE_S = 60.0


def acknowledged(client: Client) -> bool:
    """True if a new batch is."""
    with suppress(CallError):
        client.submit_lines(lines(1))
        return True
    return False


def once(is_frozen: bool) -> tuple[float, float]:
    """The seconds until health tells that the primary is gone, and from the promotion to an acknowledgement."""
    with pair() as both, tempfile.TemporaryDirectory(prefix="vbb-") as folder:
        database = Database(both.url, "benchmark")
        database.call(migrate)
        database.close()
        stack = Stack(both.url, Path(folder), free_port(), [])
        try:
            stack.gateway()
            stack.worker()
            stack.wait_until_accepting()
            with Client(stack.target, patience_s=0) as client:
                assert acknowledged(client)
                until(both.is_replayed, "the standby to have everything")
                begin_s = time.monotonic()
                both.signal_first(signal.SIGSTOP if is_frozen else signal.SIGKILL)
                until(client.accepting, "health to tell that Postgres is gone")
                told_s = time.monotonic() - begin_s
                both.promote()
                begin_s = time.monotonic()
                until(lambda: acknowledged(client), "an acknowledgement")
                return told_s, time.monotonic() - begin_s
        finally:
            stack.end()


def measure(freezes: int, kills: int) -> Iterator[Figure]:
    """All freezes, then all kills."""
    for name, is_frozen, count in (("frozen", True, freezes), ("killed", False, kills)):
        found = [once(is_frozen) for _ in range(count)]
        told, back = ([each[place] for each in found] for place in (0, 1))
        yield Figure(f"primary {name}, until health tells it", "s", told)
        first = f"primary {name}, promotion to the first acknowledgement"
        yield Figure(first, "s", back, "hosts in turn", [BEFORE_S], at_most("high", 15))


if __name__ == "__main__":
    main(__file__, __doc__, SIZES, measure)
