"""Presence of the workers: their heartbeats, read every second, and the links to them; and the health that follows."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import TypeVar

import peewee

from service import logs
from service.clock import Clock
from service.db import heartbeats, recoveries, watchdogs
from service.db.connection import Database, Unreachable, check_schema
from service.db.heartbeats import SeenBeat
from service.errors import ApiError
from service.gateway.channels import Channels
from service.gateway.links import Links
from service.gateway.workers import Freshness, live, unreachable

LOOK_INTERVAL_S = 1.0
# A worker whose health changes writes that into its heartbeat at the same time.
LOOK_AGAIN_S = 0.1

# With no worker there, however many call: they are told the same for this long, unless something is heard meanwhile.
REFUSAL_S = 0.2

T = TypeVar("T")

log = logs.get("presence")


@dataclass(frozen=True)
class _Refused:
    """What a batch naming `models` was refused with."""

    models: Set[str]
    until_s: float
    error: ApiError


@dataclass
class Presence:
    """Knows without asking anybody whether new work would be accepted now.

    `on_change(True | False)` is awaited when the answer changes.
    """

    database: Database
    channels: Channels
    clock: Clock
    timeout_s: float
    on_change: Callable[[bool], Awaitable[None]]
    freshness: Freshness = field(default_factory=Freshness)
    _links: Links = field(init=False)
    _refused: "_Refused | None" = None
    _is_accepting: bool | None = None
    _is_schema_there: bool = False
    _judge_now: asyncio.Event = field(default_factory=asyncio.Event)
    _look_now: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self._links = Links(self.channels, self.clock, self._contact_changed)

    def live(self, models: Set[str]) -> Sequence[SeenBeat]:
        """The workers for a batch naming `models`, best first. Raises UNAVAILABLE with the reason."""
        now_s = self.clock.monotonic()
        refused = self._refused
        if refused is not None and refused.models == models and now_s < refused.until_s:
            raise refused.error.with_traceback(None)
        try:
            return live(self._now(), now_s, self.timeout_s, models)
        except ApiError as error:
            self._refused = _Refused(models, now_s + REFUSAL_S, error)
            raise

    def unreachable(self, seen: SeenBeat, cause: str, request_id: str) -> ApiError:
        """UNAVAILABLE for a worker that was chosen and does not answer."""
        return unreachable(seen, self._now(), self.clock.monotonic(), cause, request_id)

    async def call(self, seen: SeenBeat, call: Awaitable[T]) -> T:
        """Awaits a call to a worker. Raises LostError as soon as that cannot be reached any more."""
        return await self._links.call(seen.beat.address, call)

    async def follow(self) -> None:
        """Looks and judges for ever."""
        try:
            # Apart, as a look waits for the database, and what a link says must not.
            await asyncio.gather(self._look(), self._judge())
        finally:
            await self._links.close()

    def _now(self) -> Freshness:
        return replace(self.freshness, contacts=self._links.contacts)

    def _contact_changed(self) -> None:
        self._refused = None
        self._judge_now.set()
        self._look_now.set()

    async def _look(self) -> None:
        while True:
            await self.look()
            self._judge_now.set()
            if await _wait(self._look_now, LOOK_INTERVAL_S):
                await asyncio.sleep(LOOK_AGAIN_S)

    async def look(self) -> None:
        """Reads all heartbeats once, and has links to whose are fresh."""
        try:
            if not self._is_schema_there:
                await self.database.run(check_schema)
                self._is_schema_there = True
            beats, given_up, timings, dogs = await self.database.run(_read)
        except Unreachable as error:
            cause = (str(error).strip().splitlines() or [type(error).__name__])[0]
            if not self.freshness.failure:
                log.warning("database_away", cause=cause)
            self.freshness = replace(self.freshness, failure=cause)
        else:
            if self.freshness.failure:
                log.info("database_back")
            _tell_news(self.freshness.beats, beats)
            self.freshness = Freshness(beats, self.clock.monotonic(), given_up, timings, dogs)
            self._refused = None
            await self._links.keep({seen.beat.address for seen in beats if seen.age_s <= self.timeout_s})

    async def _judge(self) -> None:
        while True:
            reason = ""
            try:
                self.live(frozenset())
            except ApiError as error:
                reason = f"{error.reason}: {error.message}"
            is_accepting = not reason
            if is_accepting is not self._is_accepting:
                self._is_accepting = is_accepting
                log.info("accepting" if is_accepting else "not_accepting", reason=reason)
                await self.on_change(is_accepting)
            # Also without any news: heartbeats grow stale by themselves.
            await _wait(self._judge_now, LOOK_INTERVAL_S)


async def _wait(event: asyncio.Event, timeout_s: float) -> bool:
    """Waits for an event and takes it back. False: it did not come within `timeout_s`."""
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(event.wait(), timeout_s)
        event.clear()
        return True
    return False


def _tell_news(before: Sequence[SeenBeat], now: Sequence[SeenBeat]) -> None:
    known = {(seen.beat.incarnation, seen.beat.phase) for seen in before}
    for beat in (seen.beat for seen in now):
        if (beat.incarnation, beat.phase) not in known:
            log.info(
                "worker_phase", worker_id=beat.worker_id, address=beat.address, phase=beat.phase, models=beat.models
            )


def _read(
    db: peewee.PostgresqlDatabase,
) -> tuple[list[SeenBeat], frozenset[str], dict[str, dict[str, float]], dict[str, float]]:
    timings = {worker_id: dict(found) for worker_id, found in recoveries.last_timings(db).items()}
    dogs = {seen.watchdog_id: seen.age_s for seen in watchdogs.read(db)}
    return heartbeats.read(db), frozenset(recoveries.given_up(db)), timings, dogs
