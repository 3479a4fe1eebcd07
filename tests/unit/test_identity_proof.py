"""Whose a name is, and which addresses others can reach."""

from dataclasses import replace
from uuid import uuid4

import pytest

from service import announce
from service.db.heartbeats import Beat, SeenBeat
from service.db.identity import is_free, is_ours, taken_by
from service.machine import Place

HERE = Place("m1", "boot1/pids1", "boot1/net1")
REBOOTED = Place("m1", "boot2/pids1", "boot2/net1")
CONTAINER = Place("m2", "boot1/pids2", "boot1/net2")
OTHER_HOME = Place("m2", "boot1/pids1", "boot1/net1")
ELSEWHERE = Place("m3", "boot3/pids1", "boot3/net1")
OLD = Place()


def seen(place: Place, age_s: float = 1.0, left_s: float = 59.0, address: str = "10.0.0.1:50052") -> SeenBeat:
    beat = Beat("gpu1:worker", uuid4(), address, "ready", 7, place=place, start_ticks=1)
    return SeenBeat(beat, age_s, lease_left_s=left_s)


@pytest.mark.parametrize(
    ("place", "is_running", "age_s", "left_s", "free"),
    [
        # The pid proves it, both ways, whatever the lease says.
        (HERE, False, 1, 59, True),
        (HERE, True, 1, 59, False),
        (HERE, True, 300, -240, False),
        (OTHER_HOME, False, 1, 59, True),
        # Where pids mean something else, one that happens to exist, or not to, proves nothing.
        (REBOOTED, True, 20, 40, True),
        (REBOOTED, False, 2, 58, False),
        (CONTAINER, False, 20, 40, False),
        (ELSEWHERE, False, 20, 40, False),
        # The lease decides.
        (CONTAINER, True, 61, -1, True),
        (ELSEWHERE, True, 61, -1, True),
        (ELSEWHERE, False, 1, 0, True),
        (OLD, True, 61, -1, True),
        (OLD, False, 20, 40, False),
    ],
)
def test_when_a_name_is_free(place: Place, is_running: bool, age_s: float, left_s: float, free: bool) -> None:
    """A name is free by proof that its process is gone, by silence since a reboot, or by the end of its lease."""
    assert is_free(seen(place, age_s, left_s), HERE, is_running, 15) is free


def test_without_proofs_the_lease_decides() -> None:
    """On a system that tells neither its boot nor its namespaces, nothing but the lease ends a name."""
    unknown = replace(HERE, pid_space="", network="")
    elsewhere = replace(unknown, machine="m3")
    assert not is_free(seen(elsewhere), unknown, is_running=False, silence_s=15)
    assert is_free(seen(elsewhere, 61, -1), unknown, is_running=True, silence_s=15)


def test_whose_heartbeat_it_is() -> None:
    """A heartbeat is ours if this machine wrote it since its boot; those of older versions count as ours."""
    assert [is_ours(seen(place), HERE) for place in (HERE, OLD)] == [True, True]
    others = (REBOOTED, CONTAINER, OTHER_HOME, ELSEWHERE)
    assert [is_ours(seen(place), HERE) for place in others] == [False] * 4
    told = "another machine runs as gpu1:worker, at 10.0.0.1:50052 (pid 7)"
    assert taken_by(seen(ELSEWHERE), HERE, is_running=False, silence_s=15) == told
    assert taken_by(seen(ELSEWHERE, 61, -1), HERE, is_running=False, silence_s=15) == ""
    assert taken_by(seen(HERE), HERE, is_running=True, silence_s=15) == ""


@pytest.mark.parametrize(
    ("host", "place", "left_s", "is_wrong"),
    [
        ("127.0.0.1", ELSEWHERE, 59, True),
        ("[::1]", CONTAINER, 59, True),
        ("localhost", ELSEWHERE, 59, True),
        ("10.0.0.2", ELSEWHERE, 59, False),
        ("gpu2", ELSEWHERE, 59, False),
        ("127.0.0.1", ELSEWHERE, -1, False),
        # Two stacks of one machine reach each other on loopback.
        ("127.0.0.1", OTHER_HOME, 59, False),
        ("127.0.0.1", OLD, 59, False),
    ],
)
def test_loopback_beside_other_hosts(host: str, place: Place, left_s: float, is_wrong: bool) -> None:
    """Announcing loopback is a problem exactly when a worker that beats cannot reach it."""
    why = announce.problem(host, [seen(HERE), seen(place, left_s=left_s)], HERE)
    assert bool(why) is is_wrong
    assert not why or ("gpu1:worker at 10.0.0.1:50052" in why and host in why)


def test_who_can_be_called() -> None:
    """A worker on another network that announces loopback cannot be called; all others can."""
    loopback = [seen(place, address="127.0.0.1:50052") for place in (HERE, OTHER_HOME, OLD, CONTAINER, ELSEWHERE)]
    assert [announce.is_reachable(one, HERE) for one in loopback] == [True, True, True, False, False]
    assert announce.is_reachable(seen(ELSEWHERE), HERE)
    assert not announce.is_reachable(seen(ELSEWHERE, address="[::1]:50052"), HERE)
