"""What a large fleet costs Postgres while nothing is to be done."""

import sys

import pytest

from tests.support.fleet import Fleet, fleet
from tests.support.waiting import until

HOSTS, MOST = 20, 100


def connections(made: Fleet) -> dict[str, int]:
    """The connections of the fleet by program."""
    rows = made.sql(
        "SELECT application_name, count(*) FROM pg_stat_activity"
        " WHERE backend_type = 'client backend' AND pid <> pg_backend_pid() GROUP BY 1 ORDER BY 1"
    )
    return dict(rows)


def wait_for_beats(made: Fleet) -> None:
    """Waits until each host's worker has written its next heartbeat."""
    [(began,)] = made.sql("SELECT clock_timestamp()")
    beat = "SELECT count(*) FROM heartbeats WHERE last_seen > %s"
    until(lambda: made.sql(beat, began)[0][0] == HOSTS, "all to beat", 60)


@pytest.mark.thorough
@pytest.mark.timeout(1800)
def test_connections_of_twenty_hosts_at_rest() -> None:
    """Twenty hosts, each with all of its programs, have at most 100 connections at rest."""
    with fleet(HOSTS) as made:
        try:
            for host in made.hosts:
                host.supervised()
            made.wait_until_accepting()
            until(lambda: sum(connections(made).values()) <= MOST, "unused connections to be closed", 120)
            # It stays so over several heartbeats of each.
            most = 0
            for _ in range(5):
                most = max(most, sum(connections(made).values()))
                wait_for_beats(made)
            sys.stderr.write(f"{HOSTS} hosts: at most {most} connections, {connections(made)}\n")
            assert most <= MOST
        finally:
            # Twenty orderly ends, one after another, would take longer than all else.
            for host in made.hosts:
                host.lose_power()
