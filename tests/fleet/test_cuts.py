"""Hosts are cut off from Postgres, from one another or from everything while a batch runs, and come back."""

import sys
import time
from collections.abc import Callable, Iterator

import pytest

from tests.fleet.test_lost_hosts import QUICK, check_each_answered_once, line, submit
from tests.support.fleet import Fleet, Host, fleet
from tests.support.waiting import until

CUTS: dict[str, Callable[[Fleet, Host], None]] = {
    "postgres": lambda made, host: host.cut_off(made.postgres),
    "others": lambda made, host: host.cut_off(*(other for other in made.hosts if other is not host)),
    "everything": lambda made, host: host.cut_off(),
}


@pytest.fixture(scope="module")
def guarded() -> Iterator[Fleet]:
    """Three hosts, each with its watchdog."""
    with fleet(3) as made:
        for host in made.hosts:
            host.supervised(simulated_request_s=1, simulated_window=8)
        made.wait_until_accepting()
        yield made


def works(made: Fleet, host: Host, incarnation: str) -> bool:
    """True once this life of the host's worker has taken new work."""
    claimed = "SELECT 1 FROM chunks WHERE state = 'leased' AND incarnation = %s::uuid"
    return bool(made.sql(claimed, incarnation))


def events(made: Fleet, name: str) -> int:
    """How many events of this name the workers have logged."""
    return sum(len(host.events("worker", name)) for host in made.hosts)


@pytest.mark.thorough
@pytest.mark.timeout(900)
@pytest.mark.parametrize("healed_after_s", [10, 60, 300])
@pytest.mark.parametrize("what", CUTS)
def test_a_cut_costs_nothing(guarded: Fleet, what: str, healed_after_s: int) -> None:
    """0 lost, 0 doubled, 0 restarts of healthy workers; prints how long until the host works again."""
    a, b, _ = guarded.hosts
    count = 26 * (healed_after_s + 40)
    batch = submit(b, count)
    pids = {host.name: host.worker_pid for host in guarded.hosts}
    [(life,)] = guarded.sql("SELECT incarnation::text FROM heartbeats WHERE worker_id = 'a:worker'")
    until(lambda: works(guarded, a, life), "the host to hold work")
    CUTS[what](guarded, a)
    # How long the cut lasts, not a wait for a condition.
    time.sleep(healed_after_s)
    a.heal()
    began_s = time.monotonic()
    seen = "SELECT 1 FROM heartbeats WHERE incarnation = %s::uuid AND last_seen > clock_timestamp() - interval '2 s'"
    until(lambda: guarded.sql(seen, life), "the host to beat again")
    beats_s = time.monotonic() - began_s
    until(lambda: works(guarded, a, life), "the host to work again")
    works_s = time.monotonic() - began_s
    with a.client() as client:
        until(lambda: not client.accepting(), "the host to accept new work")
    sys.stderr.write(
        f"cut off from {what} for {healed_after_s} s: beats again after {beats_s:.1f} s, works after {works_s:.1f} s,"
        f" accepts after {time.monotonic() - began_s:.1f} s\n"
    )
    check_each_answered_once(b, batch, count)
    assert {host.name: host.worker_pid for host in guarded.hosts} == pids


@pytest.mark.thorough
@pytest.mark.timeout(600)
def test_one_host_back_before_the_others_takes_nothing(guarded: Fleet) -> None:
    """Postgres is unreachable for all for 70 s; the host that is back 6 s early leaves the others what they hold."""
    a, b, c = guarded.hosts
    batch = submit(a, 4000)
    quiet = [events(guarded, name) for name in ("lost_worker_replaced", "leases_lost")]
    held = "SELECT worker_id, id FROM chunks WHERE state = 'leased' ORDER BY 1, 2"
    until(lambda: len({worker for worker, _ in guarded.sql(held)}) == 3, "all to hold work")
    for host in guarded.hosts:
        host.cut_off(guarded.postgres)
    time.sleep(64)
    a.heal()
    time.sleep(6)
    before = [row for row in guarded.sql(held) if row[0] != "a:worker"]
    assert before
    b.heal()
    c.heal()
    check_each_answered_once(a, batch, 4000)
    assert [events(guarded, name) for name in ("lost_worker_replaced", "leases_lost")] == quiet


@pytest.mark.thorough
@pytest.mark.timeout(400)
def test_a_request_that_takes_its_host_down_is_found() -> None:
    """It is blamed after at most three deaths; all others are answered."""
    with fleet(3) as made:
        for host in made.hosts:
            host.start(**QUICK)
        made.wait_until_accepting()
        a, b, c = made.hosts
        with c.client(patience_s=60) as client:
            lines = [line(number, **({"simulate": "crash"} if number == 40 else {})) for number in range(300)]
            batch = client.submit_lines(lines).id
            deaths, running = 0, {host.name: host.servers["worker"] for host in made.hosts}
            while not (done := client.get(batch)).end_time.seconds:
                for host in (a, b, c):
                    if running[host.name].process.poll() is not None:
                        deaths += 1
                        # A name of its own: its predecessor's next life would bury it, instead of the others.
                        running[host.name] = host.run("service.worker", f"worker{deaths}", **QUICK)
                time.sleep(0.2)
            assert (done.counts.completed, done.counts.failed) == (299, 1)
            assert client.result(batch, "c40").error.code == "REQUEST_CRASHED_ENGINE"
            assert deaths == 3
