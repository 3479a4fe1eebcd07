"""Hosts are cut off from Postgres, from one another or from everything while a batch runs, and come back."""

import sys
import time
from collections.abc import Callable, Iterator

import pytest

from tests.fleet.test_lost_hosts import QUICK, check_each_answered_once, holds_work, line, replaced, submit
from tests.support.fleet import Fleet, Host, fleet
from tests.support.waiting import until

CUTS: dict[str, Callable[[Fleet, Host], None]] = {
    "postgres": lambda made, host: host.cut_off(made.postgres),
    "others": lambda made, host: host.cut_off(*(other for other in made.hosts if other is not host)),
    "everything": lambda made, host: host.cut_off(),
}
# After healing a host must work, and accept new work, within this time.
BACK_S = 15.0


@pytest.fixture(scope="module")
def guarded() -> Iterator[Fleet]:
    """Three hosts, each with its watchdog."""
    with fleet(3) as made:
        if not made.can_cut:
            pytest.skip("lines between hosts can be cut only where network namespaces can be made")
        made.supervise_all(simulated_request_s=1, simulated_window=8)
        yield made


def holds(made: Fleet, incarnation: str) -> bool:
    """True while this life of a worker has leases."""
    leased = "SELECT 1 FROM chunks WHERE state = 'leased' AND incarnation = %s::uuid"
    return bool(made.sql(leased, incarnation))


def works(made: Fleet, incarnation: str, since: object) -> bool:
    """True once this life of a worker has finished a request that its engine ran after `since`.

    A request takes a second. What it finished without Postgres is stored at once when Postgres is back.
    """
    stored = (
        "SELECT 1 FROM results WHERE incarnation = %s::uuid AND finish_time > %s"
        " HAVING max(finish_time) - min(finish_time) > interval '1 s'"
    )
    return bool(made.sql(stored, incarnation, since))


def events(made: Fleet, name: str) -> int:
    """How many events of this name the workers have logged."""
    return sum(len(host.events("worker", name)) for host in made.hosts)


@pytest.mark.thorough
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("what", "healed_after_s"), [(what, after_s) for what in CUTS for after_s in (10, 60, 300)])
def test_a_cut_costs_nothing(guarded: Fleet, what: str, healed_after_s: int) -> None:
    """0 lost, 0 doubled, 0 restarts of healthy workers, and the host works and accepts again within 15 s."""
    a, b, _ = guarded.hosts
    # Enough for three workers until it must work again.
    count = 26 * (healed_after_s + 20)
    batch = submit(b, count)
    pids = {host.name: host.worker_pid for host in guarded.hosts}
    taken_over = len(replaced(*guarded.hosts))
    [(life,)] = guarded.sql("SELECT incarnation::text FROM heartbeats WHERE worker_id = 'a:worker'")
    until(lambda: holds(guarded, life), "the host to hold work")
    CUTS[what](guarded, a)
    # How long the cut lasts, not a wait for a condition.
    time.sleep(healed_after_s)
    [(healed,)] = guarded.sql("SELECT clock_timestamp()")
    a.heal()
    began_s = time.monotonic()

    def comes_back(look: Callable[[], bool], what: str) -> float:
        until(look, what, BACK_S - (time.monotonic() - began_s))
        return time.monotonic() - began_s

    seen = "SELECT 1 FROM heartbeats WHERE incarnation = %s::uuid AND last_seen > %s"
    beats_s = comes_back(lambda: bool(guarded.sql(seen, life, healed)), "the host to beat again")
    works_s = comes_back(lambda: works(guarded, life, healed), "the host to work again")
    with a.client() as client:
        accepts_s = comes_back(lambda: not client.accepting(), "the host to accept new work")
    sys.stderr.write(
        f"cut off from {what} for {healed_after_s} s: beats again after {beats_s:.1f} s, works after {works_s:.1f} s,"
        f" accepts after {accepts_s:.1f} s\n"
    )
    check_each_answered_once(b, batch, count)
    assert {host.name: host.worker_pid for host in guarded.hosts} == pids
    if what != "everything":
        # Somebody reaches it, so nobody may take it for lost.
        assert len(replaced(*guarded.hosts)) == taken_over


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
@pytest.mark.timeout(300)
def test_uploads_go_on_while_a_worker_has_no_postgres(guarded: Fleet) -> None:
    """While one worker of an idle fleet cannot reach Postgres, none of 30 uploads within a minute is refused."""
    a, b, _ = guarded.hosts
    a.cut_off(guarded.postgres)
    with b.client() as client:
        batches = []
        for number in range(30):
            batches.append(client.submit_lines([line(number)]).id)
            # How often users upload, not a wait for a condition.
            time.sleep(2)
        for batch in batches:
            assert client.wait(batch).counts.completed == 1
    a.heal()
    guarded.wait_until_accepting()


@pytest.mark.thorough
@pytest.mark.timeout(300)
def test_a_host_that_is_back_drops_what_others_took_over(guarded: Fleet) -> None:
    """A host that was cut off stops running what others have taken over within 5 s after healing."""
    a, b, c = guarded.hosts
    batch = submit(b, 60, simulate=600)
    try:
        until(lambda: holds_work(guarded, a), "the host to hold work")
        taken_over, dropped = len(replaced(b, c)), len(a.events("worker", "leases_lost"))
        a.cut_off()
        until(lambda: len(replaced(b, c)) > taken_over, "others to take over its work")
        a.heal()
        until(lambda: len(a.events("worker", "leases_lost")) > dropped, "the host to drop it", 5)
    finally:
        a.heal()
        with b.client(patience_s=60) as client:
            client.cancel(batch)
            client.wait(batch)
    # The engines have room again for the tests after this one.
    until(lambda: not any(holds_work(guarded, host) for host in guarded.hosts), "all to drop the cancelled batch")


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
