"""Hosts lose power again and again while a long batch runs."""

import os
import statistics
import sys
import time

import pytest

from tests.fleet.test_lost_hosts import check_each_answered_once, holds_work, submit
from tests.support.fleet import Fleet, Host, fleet
from tests.support.waiting import until

KILLS = int(os.environ.get("FLEET_KILLS", 20))
# Three hosts run 48 requests a second, and a kill may take a minute.
REQUESTS = 2_400 * KILLS


def in_hand(made: Fleet, incarnation: str) -> set[tuple[int, int]]:
    """The requests without a result of the chunks that this life holds."""
    rows = made.sql(
        """
        SELECT c.batch_id, i FROM chunks c
        CROSS JOIN LATERAL unnest(coalesce(c.indexes, ARRAY(SELECT generate_series(c.first_index,
                                                                                  c.first_index + c.count - 1)))) i
        WHERE c.state = 'leased' AND c.incarnation = %s::uuid
          AND NOT EXISTS (SELECT FROM results r WHERE r.batch_id = c.batch_id AND r.index = i)
        """,
        incarnation,
    )
    return set(rows)


def life(made: Fleet, host: Host, name: str) -> str:
    return str(made.sql("SELECT incarnation FROM heartbeats WHERE worker_id = %s", f"{host.name}:{name}")[0][0])


def lose(made: Fleet, host: Host, mine: str) -> tuple[float, float, float]:
    """Ends a host. Returns after how many seconds its leases ended, the first of its requests ran, and all had run."""
    elsewhere = f"""
        SELECT c.batch_id, c.first_index FROM chunks c WHERE c.state = 'leased' AND c.deaths > 0
        UNION SELECT batch_id, index FROM results WHERE incarnation <> '{mine}'
    """
    lost, began_s, times = in_hand(made, mine), time.monotonic(), []
    host.lose_power()
    lost = in_hand(made, mine) or lost
    for what, look in (
        ("its leases to end", lambda: not in_hand(made, mine)),
        ("its requests to run elsewhere", lambda: lost & set(made.sql(elsewhere))),
        ("its requests to be answered", lambda: lost <= set(made.sql("SELECT batch_id, index FROM results"))),
    ):
        until(look, what, 300)
        times.append(round(time.monotonic() - began_s, 1))
    return times[0], times[1], times[2]


@pytest.mark.thorough
@pytest.mark.timeout(300 + 90 * KILLS)
def test_twenty_hosts_lose_power() -> None:
    """0 lost, 0 doubled, nobody blamed; prints how long until the first of its requests, and all, ran elsewhere."""
    first, whole, freed = [], [], []
    with fleet(3) as made:
        for host in made.hosts:
            host.start(simulated_request_s=1, simulated_window=16)
        made.wait_until_accepting()
        time.sleep(65)
        a, b, _ = made.hosts
        batch = submit(b, REQUESTS)
        for kill in range(KILLS):
            name = "worker" if not kill else f"worker{kill}"
            until(lambda: holds_work(made, a), "the host to hold work")
            time.sleep(kill * 5.0 / KILLS + 5)
            mine = life(made, a, name)
            times = lose(made, a, mine)
            for found, time_s in zip((freed, first, whole), times, strict=True):
                found.append(time_s)
            sys.stderr.write(f"kill {kill}: freed, first elsewhere, all answered after {times}\n")
            a.return_power()
            a.start("gateway")
            a.run("service.worker", f"worker{kill + 1}", simulated_request_s=1, simulated_window=16)
        check_each_answered_once(b, batch, REQUESTS)
    for name, found in (("freed", freed), ("first elsewhere", first), ("all answered", whole)):
        p95 = sorted(found)[max(0, round(0.95 * len(found)) - 1)]
        sys.stderr.write(f"{name}: median {statistics.median(found):.1f} s, p95 {p95:.1f} s, max {max(found):.1f} s\n")
