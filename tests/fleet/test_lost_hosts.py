"""A fleet loses hosts: what they held runs elsewhere, once, and nobody is blamed for it."""

import json
import time
from collections.abc import Iterator

import pytest

from tests.support.fleet import Fleet, Host, fleet
from tests.support.waiting import until
from vllm_batch.v1 import host_service_pb2 as hpb

REQUESTS = 600
# Shorter intervals than users have, so that evidence comes sooner; leases still last longer than it takes.
QUICK = {
    "heartbeat_interval_s": 1,
    "lease_s": 12,
    "database_timeout_s": 2,
    "simulated_request_s": 0.5,
    "simulated_window": 8,
}


def line(number: int, **faults: object) -> bytes:
    body = {"model": "tiny", "messages": [{"role": "user", "content": str(number)}], "vllm_xargs": faults}
    return json.dumps({"custom_id": f"c{number}", "url": "/v1/chat/completions", "body": body}).encode()


def submit(host: Host, count: int = REQUESTS, **faults: object) -> str:
    with host.client(patience_s=60) as client:
        return client.submit_lines(line(number, **faults) for number in range(count)).id


def check_each_answered_once(host: Host, batch: str, count: int = REQUESTS) -> None:
    with host.client(patience_s=60) as client:
        done = client.wait(batch)
        assert (done.counts.completed, done.counts.failed) == (count, 0)
        assert [result.custom_id for result in client.results(batch)] == [f"c{number}" for number in range(count)]


def holds_work(made: Fleet, host: Host) -> int:
    """How many chunks its workers hold."""
    held = "SELECT count(*) FROM chunks WHERE state = 'leased' AND worker_id LIKE %s"
    return int(made.sql(held, f"{host.name}:%")[0][0])


def replaced(*hosts: Host) -> list[dict[str, object]]:
    """What these hosts have taken over from workers that were lost."""
    return [event for host in hosts for event in host.events("worker", "lost_worker_replaced")]


@pytest.fixture(scope="module")
def three() -> Iterator[Fleet]:
    """Three hosts that accept new work."""
    with fleet(3) as made:
        for host in made.hosts:
            host.start(**QUICK)
        made.wait_until_accepting()
        yield made


def test_a_worker_without_postgres_refuses_nothing(three: Fleet) -> None:
    """While an idle worker alone cannot reach Postgres, each new batch is stored by another one."""
    a, b, _ = three.hosts
    a.cut_off(three.postgres)
    with b.client() as client:
        # The first by ties in the queue's length is the one that is cut off.
        batches = [client.submit_lines([line(number)]).id for number in range(5)]
        for batch in batches:
            assert client.wait(batch).counts.completed == 1
    a.heal()
    three.wait_until_accepting()


def test_the_work_of_a_host_that_lost_power_runs_elsewhere(three: Fleet) -> None:
    """Its leases end on evidence, before they run out; each request is answered once, and none is blamed."""
    a, b, c = three.hosts
    batch = submit(b)
    until(lambda: holds_work(three, a), "the host to hold work")
    a.lose_power()
    check_each_answered_once(b, batch)
    [event] = replaced(b, c)
    assert event["lost"] == "a:worker"


@pytest.mark.thorough
@pytest.mark.timeout(600)
def test_a_whole_host_loses_power_and_comes_back() -> None:
    """The others report a host without power within 90 s; started again under its name, it accepts new work within
    60 s, its watchdog restarts nothing, and the others report that it is back."""
    with fleet(3) as made:
        a, b, _ = made.hosts
        made.supervise_all()
        # Nobody is judged before Postgres has been up for as long as a heartbeat may be old.
        up = "SELECT 1 WHERE pg_postmaster_start_time() < clock_timestamp() - interval '60 s'"
        until(lambda: made.sql(up), "Postgres to be up for a minute")
        reported = "SELECT 1 FROM recovery_events WHERE kind = %s AND worker_id = 'a'"
        a.lose_power()
        until(lambda: made.sql(reported, "host_lost"), "the others to report the loss", 90)
        with b.client() as client:
            assert {host.name: host.state for host in client.hosts()} == {
                "a": hpb.HOST_STATE_LOST,
                "b": hpb.HOST_STATE_ALIVE,
                "c": hpb.HOST_STATE_ALIVE,
            }
        a.return_power()
        began_s = time.monotonic()
        a.supervised()
        with a.client() as client:
            until(lambda: not client.accepting(), "the host to accept new work", 60 - (time.monotonic() - began_s))
        until(lambda: made.sql(reported, "host_back"), "the others to report that it is back")
        assert not made.sql("SELECT 1 FROM recovery_events WHERE kind = 'restart'")
