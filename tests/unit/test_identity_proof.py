"""Whose a name is, and which addresses others can reach."""

from dataclasses import replace
from uuid import uuid4

import pytest

from scripts.doctor import neighbours
from service import announce
from service.config import Settings
from service.db.heartbeats import Beat, SeenBeat
from service.db.identity import is_earlier, is_free, is_ours, taken_by
from service.db.watchdogs import SeenWatchdog
from service.machine import Place

HERE = Place("m1", "boot1/pids1", "boot1/net1")
REBOOTED = Place("m1", "boot2/pids1", "boot2/net1")
CONTAINER = Place("m2", "boot1/pids2", "boot1/net2")
OTHER_HOME = Place("m2", "boot1/pids1", "boot1/net1")
ELSEWHERE = Place("m3", "boot3/pids1", "boot3/net1")
OLD = Place()


def seen(
    place: Place, age_s: float = 1.0, left_s: float = 59.0, address: str = "10.0.0.1:50052", host: str = "gpu1"
) -> SeenBeat:
    beat = Beat(f"{host}:worker", uuid4(), address, "ready", 7, place=place, start_ticks=1)
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
        # A process of another user, which /proc hides: the lease decides.
        (OTHER_HOME, None, 20, 40, False),
        (OTHER_HOME, None, 61, -1, True),
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
def test_when_a_name_is_free(place: Place, is_running: bool | None, age_s: float, left_s: float, free: bool) -> None:
    """A name is free by proof that its process is gone, by silence since a reboot, or by the end of its lease."""
    assert is_free(seen(place, age_s, left_s), HERE, is_running, 15) is free


@pytest.mark.parametrize(
    ("place", "is_running", "start_ticks", "earlier"),
    [
        (HERE, False, 2, True),
        (OTHER_HOME, False, 2, True),
        # It runs, or that cannot be seen; it began later; pids mean something else.
        (HERE, True, 2, False),
        (HERE, None, 2, False),
        (HERE, False, 1, False),
        (REBOOTED, False, 2, False),
        (CONTAINER, False, 2, False),
        (ELSEWHERE, False, 2, False),
        (OLD, False, 2, False),
    ],
)
def test_whose_heartbeat_was_restored(place: Place, is_running: bool | None, start_ticks: int, earlier: bool) -> None:
    """Only a process that began before ours in this boot, and is gone, has left its heartbeat before ours."""
    assert is_earlier(seen(place), HERE, start_ticks, is_running) is earlier
    assert not is_earlier(seen(place), replace(HERE, pid_space=""), start_ticks, is_running)


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
        # What others reach.
        ("", ELSEWHERE, 59, False),
        ("127.0.0.1", ELSEWHERE, -1, False),
        # Two stacks of one machine reach each other on loopback.
        ("127.0.0.1", OTHER_HOME, 59, False),
        # Its own last life, under another name, until the lease of that ends.
        ("127.0.0.1", REBOOTED, 59, False),
        ("127.0.0.1", OLD, 59, False),
    ],
)
def test_loopback_beside_other_hosts(host: str, place: Place, left_s: float, is_wrong: bool) -> None:
    """Announcing loopback is a problem exactly when a worker that beats cannot reach it."""
    why = announce.problem(host, "here", HERE, [seen(HERE), seen(place, left_s=left_s)])
    assert bool(why) is is_wrong
    assert not why or ("gpu1:worker at 10.0.0.1:50052" in why and host in why)
    # Nor does what ran under its name, as in a container without a volume.
    assert not announce.problem(host, "gpu1", HERE, [seen(HERE), seen(place, left_s=left_s)])


@pytest.mark.parametrize(
    ("dog", "is_wrong"),
    [
        (SeenWatchdog("front", 1, (), False, "m3", "boot3/net1", "10.0.0.1"), True),
        (SeenWatchdog("front", 61, (), False, "m3", "boot3/net1", "10.0.0.1"), False),
        (SeenWatchdog("front", 1, (), True, "m3", "boot3/net1", "10.0.0.1"), False),
        (SeenWatchdog("here", 1, (), False, "m3", "boot3/net1", "10.0.0.1"), False),
        (SeenWatchdog("front", 1, (), False, "m1", "boot2/net1", "10.0.0.1"), False),
        (SeenWatchdog("front", 1, (), False, "m2", "boot1/net1", "10.0.0.1"), False),
        (SeenWatchdog("front", 1, ()), False),
    ],
)
def test_loopback_beside_a_host_without_workers(dog: SeenWatchdog, is_wrong: bool) -> None:
    """A host that runs a gateway alone is known by its watchdog, and cannot reach loopback either."""
    why = announce.problem("127.0.0.1", "here", HERE, [], [dog])
    assert bool(why) is is_wrong
    assert not why or "front at 10.0.0.1" in why


@pytest.mark.parametrize(
    ("dog", "is_wrong"),
    [
        (SeenWatchdog("here", 1, (), False, "m3", "boot3/net1", "10.0.0.1"), True),
        (SeenWatchdog("here", 61, (), False, "m3", "boot3/net1", "10.0.0.1"), False),
        (SeenWatchdog("there", 1, (), False, "m3", "boot3/net1", "10.0.0.1"), False),
        (SeenWatchdog("here", 1, (), False, "m1", "boot2/net1", "10.0.0.1"), False),
        (SeenWatchdog("here", 1, (), False, "m2", "boot1/net1", "10.0.0.1"), False),
    ],
)
def test_a_namesake_without_workers(dog: SeenWatchdog, is_wrong: bool) -> None:
    """doctor.sh refuses the name of another machine also where only one of the two, or none, runs a worker."""
    settings = Settings(host="10.0.0.2", allow_insecure=True)
    [found] = neighbours.judge(settings, "here", [], HERE, [dog])
    assert bool(found.problem) is is_wrong
    assert not is_wrong or ("runs as here, at 10.0.0.1" in found.problem and "10.0.0.2" in found.problem)


def test_who_can_be_called() -> None:
    """A worker on another network that announces loopback cannot be called; all others can."""
    loopback = [seen(place, address="127.0.0.1:50052") for place in (HERE, OTHER_HOME, OLD, CONTAINER, ELSEWHERE)]
    others = [seen(ELSEWHERE), seen(ELSEWHERE, address="[::1]:50052")]
    assert [
        announce.is_reachable(one.beat.address, one.beat.place.network, HERE.network) for one in [*loopback, *others]
    ] == [True, True, True, False, False, True, False]
