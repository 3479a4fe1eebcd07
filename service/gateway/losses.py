"""Tells Postgres which workers with missing heartbeats this gateway still reaches, and which it does not."""

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from uuid import UUID

from service.clock import Clock
from service.db import losses
from service.db.availability import DATABASE_ERRORS, AvailabilityLog
from service.db.chunks import host_of
from service.db.connection import Database
from service.db.heartbeats import SeenBeat
from service.insight.presence import LOOK_INTERVAL_S
from service.insight.routing import Freshness, LinkState
from service.telemetry import logs

# An outage of Postgres makes all heartbeats look missing: after one, those who live have this many times as long to
# beat as it takes until one is missing.
PATIENCE = 1.5

log = logs.get("losses")


@dataclass
class LossReports:
    """Reports on the workers of other hosts, as the gateway `name`, `<host>:<process>`.

    `now` returns what is known about the workers.
    """

    database: Database
    clock: Clock
    name: str
    now: Callable[[], Freshness]
    # Lives of workers that were reached: a link that never was there has not broken.
    _reached: set[UUID] = field(default_factory=set)
    _unreachable: set[UUID] = field(default_factory=set)
    _availability: AvailabilityLog = field(default_factory=lambda: AvailabilityLog(log))
    _away_s: float = field(init=False)

    def __post_init__(self) -> None:
        self._away_s = self.clock.monotonic()

    async def follow(self) -> None:
        """Reports every second, for ever."""
        while True:
            await asyncio.sleep(LOOK_INTERVAL_S)
            if found := dict(self.look()):
                try:
                    await self.database.run(losses.report, self.name, found)
                    self._availability.back()
                except DATABASE_ERRORS as error:
                    self._availability.away(error)
                    self._away_s = self.clock.monotonic()

    def look(self) -> Iterator[tuple[UUID, bool]]:
        """Yields the lives of workers with missing heartbeats that were ever reached, and whether they are now."""
        known, now_s = self.now(), self.clock.monotonic()
        if known.failure:
            self._away_s = now_s
        lives = {seen.beat.incarnation for seen in known.beats}
        self._reached &= lives
        self._unreachable &= lives
        for seen in known.beats:
            life, health = seen.beat.incarnation, known.contact(seen).health
            if health in (LinkState.SERVING, LinkState.NOT_SERVING):
                self._reached.add(life)
                self._unreachable.discard(life)
            silence_s = losses.silence_s(seen.beat.detail)
            is_missing = known.age_s(seen, now_s) > silence_s and now_s - self._away_s >= PATIENCE * silence_s
            is_ours = host_of(seen.beat.worker_id) == host_of(self.name)
            if not is_missing or is_ours or life not in self._reached:
                continue
            cause = known.contact(seen).cause
            if successor := _at_its_address(known, seen):
                health, cause = LinkState.UNREACHABLE, f"its address is that of {successor} now"
            if health is LinkState.UNREACHABLE and life not in self._unreachable:
                self._unreachable.add(life)
                log.warning("worker_lost", worker_id=seen.beat.worker_id, life=str(life), cause=cause)
            if health is not LinkState.UNKNOWN:
                yield life, health is not LinkState.UNREACHABLE


def _at_its_address(known: Freshness, gone: SeenBeat) -> str:
    """The worker of another name that began later at the same address, as pods of one node do; "" if there is none.

    The link to that address reaches it, and not the one that is gone.
    """
    for seen in known.beats:
        if seen.beat.address == gone.beat.address and seen.life_s < gone.life_s:
            return seen.beat.worker_id
    return ""
