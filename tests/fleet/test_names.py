"""Two hosts of one name whose processes have equal pids, as in containers: nobody takes one for the other."""

from tests.fleet.test_lost_hosts import QUICK, check_each_answered_once, submit
from tests.support.fleet import fleet
from tests.support.waiting import until

REQUESTS = 240


def test_the_second_of_a_name_and_pid_is_refused() -> None:
    """In the middle of a batch the second worker of the name ends with both addresses, and the first notices nothing:
    it beats on, its life stays the same, and the batch completes."""
    with fleet(2) as made:
        a, b = made.hosts
        for host in made.hosts:
            host.in_containers()
        settings = QUICK | {"host_name": "gpu"}
        a.start(**settings)
        with a.client() as client:
            until(lambda: not client.accepting(), "the first to accept new work")
        batch = submit(a, REQUESTS)
        life = "SELECT worker_id, incarnation::text, pid, machine, address, phase FROM heartbeats"
        [first] = made.sql(life)
        name, incarnation, pid, _, address, _ = first
        assert name == "gpu:worker"
        until(lambda: made.sql("SELECT 1 FROM chunks WHERE state = 'leased'"), "the first to hold work")

        b.start("worker", **settings)
        [failed] = until(lambda: b.events("worker", "start_failed"), "the refusal of the second")
        assert b.servers["worker"].process.wait(30) == 1
        cause = str(failed["cause"])
        assert f"another machine runs as gpu:worker, at {address} (pid {pid}, seen" in cause
        assert f"this one is at {b.address}:" in cause
        assert cause.endswith(f"(pid {pid})")

        [(refused_at,)] = made.sql("SELECT clock_timestamp()")
        until(
            lambda: made.sql("SELECT 1 FROM heartbeats WHERE last_seen > %s", refused_at), "another beat of the first"
        )
        check_each_answered_once(a, batch, REQUESTS)
        assert made.sql(life) == [first]
        assert made.sql("SELECT DISTINCT incarnation::text FROM results") == [(incarnation,)]
        assert made.sql("SELECT max(deaths) FROM chunks") == [(0,)]
        assert len(a.events("worker", "identity_locked")) == 1
        assert not a.events("worker", "leases_lost")
        assert a.servers["worker"].process.poll() is None
