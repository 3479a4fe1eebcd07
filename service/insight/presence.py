"""Presence of the workers: their heartbeats, read every second, the links to them, and the health that results."""

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable, Iterator, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import TypeVar
from uuid import UUID

import peewee

from service import announce
from service.announce import AddressError
from service.api.named_models import ANY, Named
from service.clock import Clock, is_set_within
from service.db import heartbeats, losses, recoveries, standby, unserved
from service.db.availability import DATABASE_ERRORS, AvailabilityLog, DatabaseAwayError, DatabaseUnfitError, first_line
from service.db.connection import Database, check_schema
from service.db.heartbeats import Beat, SeenBeat
from service.errors import ApiError
from service.insight import waiting
from service.insight.channels import Channels
from service.insight.links import Links
from service.insight.routing import Freshness, LinkState, Load, live, spread, unreachable
from service.insight.waiting import Worker
from service.machine import Place
from service.telemetry import logs

LOOK_INTERVAL_S = 1.0
# How often to read what changes rarely, as long as new work is accepted.
RARELY_S = 5.0
# Reading them takes milliseconds: after this long, Postgres counts as away.
AWAY_S = 6.0
# A worker whose health changes writes it to its heartbeat at the same time.
LOOK_AGAIN_S = 0.1

# Without a live worker all callers get the same error for this long, unless news arrives.
REFUSAL_S = 0.2
# So many workers that are gone are still known, those seen last.
MOST_GONE = 100

T = TypeVar("T")

log = logs.get("presence")


@dataclass(frozen=True)
class _Refused:
    """The error that refused a batch naming these models, reused until `until_s`."""

    named: Named
    until_s: float
    error: ApiError


@dataclass
class Presence:
    """Knows without a call or a query whether new work would be accepted now.

    `on_change(is_accepting)` is awaited when that changes.
    """

    database: Database
    channels: Channels
    clock: Clock
    timeout_s: float
    on_change: Callable[[bool], Awaitable[None]]
    # Where this process runs, and what its host announces and others cannot reach (`Settings.advertised_loopback`).
    place: Place
    loopback: str = ""
    # The name of its host.
    name: str = ""
    draw: Callable[[], float] = random.random
    freshness: Freshness = field(default_factory=Freshness)
    _links: Links = field(init=False)
    _refused: "_Refused | None" = None
    _loads: dict[str, Load] = field(default_factory=dict)
    _is_accepting: bool | None = None
    # Set once the schema was found that this version needs.
    has_schema: asyncio.Event = field(default_factory=asyncio.Event)
    _are_addresses_checked: bool = False
    # Workers that announce an address of which only their own host knows.
    _unreachable: frozenset[UUID] = frozenset()
    _has_looked: bool = False
    # When to read what changes rarely again.
    _rest_due_s: float = float("-inf")
    _availability: AvailabilityLog = field(default_factory=lambda: AvailabilityLog(log))
    _judge_now: asyncio.Event = field(default_factory=asyncio.Event)
    _look_now: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self._links = Links(self.channels, self.clock, self._contact_changed)

    def live(self, named: Named = ANY) -> Sequence[SeenBeat]:
        """The workers for a batch naming these models, best first. Raises UNAVAILABLE with the reason."""
        now_s = self.clock.monotonic()
        refused = self._refused
        if refused is not None and refused.named == named and now_s < refused.until_s:
            raise refused.error.with_traceback(None)
        try:
            now = self.now()
            able = live(now, now_s, self.timeout_s, named.models, named.are_all)
            return spread(able, now, now_s, self._loads, self.draw, named.models)
        except ApiError as error:
            self._refused = _Refused(named, now_s + REFUSAL_S, error)
            raise

    def refusal(self) -> ApiError | None:
        """Why new work is refused now, whatever models it names; None if it is accepted."""
        try:
            self.live()
        except ApiError as error:
            return error
        return None

    def serves(self, model: str) -> bool:
        """True if a live worker serves the model."""
        with contextlib.suppress(ApiError):
            return any(model in seen.beat.models for seen in self.live())
        return False

    def unreachable(self, seen: SeenBeat, cause: str, request_id: str) -> ApiError:
        """UNAVAILABLE for a chosen worker that does not answer."""
        return unreachable(seen, self.now(), self.clock.monotonic(), cause, request_id)

    async def call(self, seen: SeenBeat, call: Awaitable[T]) -> T:
        """Awaits a call to a worker. Raises LostError as soon as the link to the worker is lost."""
        return await self._links.call(seen.beat.address, call)

    @contextlib.contextmanager
    def forwarding(self, seen: SeenBeat) -> Iterator[None]:
        """Counts a call that is forwarded to the worker, as long as the block runs."""
        name, now_s = seen.beat.worker_id, self.clock.monotonic()
        self._loads[name] = Load(self._loads.get(name, Load()).in_flight + 1, now_s)
        try:
            yield
        finally:
            self._loads[name] = replace(self._loads[name], in_flight=self._loads[name].in_flight - 1)

    def workers(self) -> list[Worker]:
        """What each worker can do for a batch, as far as known now."""
        return waiting.workers_of(self.now(), self.clock.monotonic(), self.timeout_s)

    def is_unserved(self, models: Set[str]) -> bool:
        """True if no worker serves `models` or is about to. Unknown before the first look: False."""
        return self._has_looked and waiting.is_unserved({frozenset(models)}, self.workers())

    async def follow(self) -> None:
        """Reads heartbeats and updates the health, for ever."""
        try:
            # Separate tasks: reading waits for the database, and news from a link must not.
            await asyncio.gather(self._look(), self._judge())
        finally:
            await self._links.close()

    def now(self) -> Freshness:
        """What is known about the workers, with the state of their links."""
        return replace(self.freshness, contacts=self._links.contacts)

    def unreached(self) -> dict[str, str]:
        """Why workers that beat cannot be called from here, by their address.

        One that has just died counts only once its heartbeats would be missing.
        """
        known, now_s = self.now(), self.clock.monotonic()
        found = ((seen, known.contact(seen)) for seen in known.beats)
        return {
            seen.beat.address: contact.cause
            for seen, contact in found
            if contact.health is LinkState.UNREACHABLE and now_s - contact.since_s > losses.silence_s(seen.beat.detail)
        }

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
        """Reads all heartbeats once, and keeps links to the workers whose heartbeat is fresh.

        Raises DatabaseUnfitError as long as the schema was never found, and AddressError at the first read if other
        hosts are there that cannot reach this one.
        """
        try:
            if not self.has_schema.is_set():
                await self.database.run(check_schema)
                self.has_schema.set()
            now_s = self.clock.monotonic()
            # Refusals tell why, and for how long.
            is_all = not self._is_accepting or now_s >= self._rest_due_s
            reading = asyncio.ensure_future(
                self.database.read(_read, self.timeout_s, None if is_all else self.freshness)
            )
            if not (await asyncio.wait({reading}, timeout=AWAY_S))[0]:
                # It still waits: for a frozen server, or to connect.
                self._note_away(DatabaseAwayError(f"Postgres did not answer within {AWAY_S:.3g} s"))
                self._judge_now.set()
            found = await reading
        except DATABASE_ERRORS as error:
            if isinstance(error, DatabaseUnfitError) and not self.has_schema.is_set():
                raise
            self._note_away(error)
        else:
            self._availability.back()
            if is_all:
                self._rest_due_s = now_s + RARELY_S
            beats, unreachable = self._divided(found.beats)
            found = replace(found, beats=beats, unreachable=unreachable, read_at_s=self.clock.monotonic())
            _tell_news(self.freshness.beats, found.beats)
            self.freshness = found
            self._has_looked = True
            names = {seen.beat.worker_id for seen in found.beats}
            self._loads = {name: load for name, load in self._loads.items() if load.in_flight or name in names}
            self._refused = None
            contacts = self._links.contacts
            serving = {address for address in contacts if contacts[address].health is LinkState.SERVING}
            # One that works and cannot write its heartbeat is known by its link, as long as that holds.
            await self._links.keep(
                {
                    seen.beat.address
                    for seen in found.beats
                    if seen.age_s <= self.timeout_s or seen.beat.address in serving
                }
            )

    def _divided(self, beats: Sequence[SeenBeat]) -> tuple[list[SeenBeat], list[SeenBeat]]:
        """The workers that can be called from here, and those that cannot. Raises AddressError at the first call."""
        if not self._are_addresses_checked:
            if why := announce.problem(self.loopback, self.name, self.place, beats):
                raise AddressError(f"{why}. {announce.ADVICE}")
            self._are_addresses_checked = True
        lost = [seen for seen in beats if not self._is_reachable(seen.beat)]
        for beat in (seen.beat for seen in lost):
            if beat.incarnation not in self._unreachable:
                log.warning("worker_not_reachable", worker_id=beat.worker_id, address=beat.address)
        self._unreachable = frozenset(seen.beat.incarnation for seen in lost)
        return [seen for seen in beats if seen not in lost], lost

    def _is_reachable(self, beat: Beat) -> bool:
        return announce.is_reachable(beat.address, beat.place.network, self.place.network)

    def _note_away(self, error: Exception) -> None:
        self._availability.away(error)
        self.freshness = replace(self.freshness, failure=first_line(error))

    async def _judge(self) -> None:
        while True:
            refusal = self.refusal()
            is_accepting = refusal is None
            if is_accepting is not self._is_accepting:
                self._is_accepting = is_accepting
                reason = f"{refusal.reason}: {refusal.message}" if refusal else ""
                log.info("accepting" if is_accepting else "not_accepting", reason=reason)
                await self.on_change(is_accepting)
            # Also without news: heartbeats become stale by themselves.
            await _wait(self._judge_now, LOOK_INTERVAL_S)


async def _wait(event: asyncio.Event, timeout_s: float) -> bool:
    """Waits for an event and clears it. False: it was not set within `timeout_s`."""
    if await is_set_within(event, timeout_s):
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


def _read(db: peewee.PostgresqlDatabase, timeout_s: float, before: Freshness | None) -> Freshness:
    """Reads the heartbeats. All else is taken from `before`, or read too."""
    standby.check(db)
    beats = heartbeats.read_recent(db, timeout_s, MOST_GONE)
    if before is not None:
        return replace(before, beats=beats, failure="")
    worker_ids = [seen.beat.worker_id for seen in beats]
    return Freshness(
        beats,
        given_up=frozenset(recoveries.given_up(db, worker_ids)),
        paused=recoveries.paused(db, worker_ids),
        timings={worker_id: dict(found) for worker_id, found in recoveries.last_timings(db, worker_ids).items()},
        awaited=unserved.awaited(db),
    )
