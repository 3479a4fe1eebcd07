"""What a gateway says of workers whose heartbeats are missing."""

from typing import Any
from uuid import UUID

from service.db.heartbeats import Beat, Phase, SeenBeat
from service.gateway.losses import PATIENCE, LossReports
from service.insight.routing import Contact, Freshness, LinkState

STEADY_S = PATIENCE * 10
A, B, OURS = UUID(int=1), UUID(int=2), UUID(int=3)
LIVES = {A: "a:worker", B: "b:worker", OURS: "c:worker"}


class Watcher:
    """A gateway on host c that has reached all workers; `now_s` is far enough after that."""

    def __init__(self, reached: tuple[UUID, ...] = (A, B, OURS)) -> None:
        self.now_s, self.ages, self.failure = 0.0, dict.fromkeys(LIVES, 1.0), ""
        self.addresses = {life: f"{life}" for life in LIVES}
        self.links = {life: LinkState.SERVING if life in reached else LinkState.UNKNOWN for life in LIVES}
        database: Any = None
        self.reports = LossReports(database, self, "c:gateway-2", self.known)
        assert not self.said()
        self.now_s = STEADY_S

    def monotonic(self) -> float:
        return self.now_s

    def known(self) -> Freshness:
        beats = [
            SeenBeat(
                Beat(LIVES[life], life, self.addresses[life], Phase.READY, 1, detail={"interval_s": 5}),
                age_s,
                life_s=100 - life.int,
            )
            for life, age_s in self.ages.items()
        ]
        contacts = {f"{life}": Contact(link, 0, "") for life, link in self.links.items()}
        return Freshness(beats, self.now_s, failure=self.failure, contacts=contacts)

    def said(self) -> dict[UUID, bool]:
        return dict(self.reports.look())


def test_only_missing_workers_of_other_hosts_are_reported() -> None:
    """A worker is reported once two heartbeats are missing, as reached or not; one of the gateway's own host never."""
    watcher = Watcher()
    watcher.links[A] = watcher.links[OURS] = LinkState.UNREACHABLE
    assert watcher.said() == {}
    watcher.ages = {A: 10.1, B: 10.1, OURS: 10.1}
    assert watcher.said() == {A: False, B: True}
    watcher.links[B] = LinkState.NOT_SERVING
    assert watcher.said() == {A: False, B: True}


def test_a_worker_whose_address_another_has_now() -> None:
    """A worker that is gone is not reached because a later one of another name answers at its address."""
    watcher = Watcher()
    watcher.addresses[B] = watcher.addresses[A]
    assert watcher.said() == {}
    watcher.ages[A] = 10.1
    assert watcher.said() == {A: False}
    # The first is not at the address of the later one.
    watcher.ages = {A: 1, B: 10.1, OURS: 1}
    assert watcher.said() == {B: True}


def test_a_link_that_never_was_there_has_not_broken() -> None:
    """A gateway that never reached this life of a worker, for instance behind a firewall, says nothing."""
    watcher = Watcher(reached=(B,))
    watcher.links[A] = LinkState.UNREACHABLE
    watcher.ages[A] = 30
    assert watcher.said() == {}


def test_a_gateway_that_lost_postgres_reports_nothing_for_a_while() -> None:
    """After an outage all heartbeats look missing: the gateway waits until those who live have beaten again."""
    watcher = Watcher()
    watcher.links[A], watcher.ages[A] = LinkState.UNREACHABLE, 30
    watcher.failure = "away"
    assert watcher.said() == {}
    watcher.failure = ""
    watcher.now_s += STEADY_S - 0.1
    assert watcher.said() == {}
    watcher.now_s += 0.1
    assert watcher.said() == {A: False}
