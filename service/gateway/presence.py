"""Presence of the workers: a look at the heartbeats every second, and the health that follows from it."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace

import peewee

from service import logs
from service.clock import Clock
from service.db import heartbeats, recoveries
from service.db.connection import Database, Unreachable, check_schema
from service.db.heartbeats import SeenBeat
from service.errors import ApiError
from service.gateway.workers import Freshness, choose, unreachable

LOOK_INTERVAL_S = 1.0

log = logs.get("presence")


@dataclass
class Presence:
    """Knows without asking the database whether new work would be accepted now.

    `on_change(True | False)` is awaited when the answer changes.
    """

    database: Database
    clock: Clock
    timeout_s: float
    on_change: Callable[[bool], Awaitable[None]]
    freshness: Freshness = field(default_factory=Freshness)
    _is_accepting: bool | None = None
    _is_schema_there: bool = False

    def choose(self) -> SeenBeat:
        """The worker for new work. Raises UNAVAILABLE with the reason."""
        return choose(self.freshness, self.clock.monotonic(), self.timeout_s)

    def unreachable(self, seen: SeenBeat, cause: str) -> ApiError:
        """UNAVAILABLE for a worker that was chosen and does not answer."""
        return unreachable(seen, self.freshness, self.clock.monotonic(), cause)

    async def follow(self) -> None:
        """Looks for ever."""
        while True:
            await self.look()
            await asyncio.sleep(LOOK_INTERVAL_S)

    async def look(self) -> None:
        """Reads all heartbeats once."""
        try:
            if not self._is_schema_there:
                await self.database.run(check_schema)
                self._is_schema_there = True
            beats, given_up = await self.database.run(_read)
        except Unreachable as error:
            cause = (str(error).strip().splitlines() or [type(error).__name__])[0]
            if not self.freshness.failure:
                log.warning("database_away", cause=cause)
            self.freshness = replace(self.freshness, failure=cause)
        else:
            if self.freshness.failure:
                log.info("database_back")
            self.freshness = Freshness(beats, self.clock.monotonic(), given_up)
        reason = ""
        try:
            self.choose()
        except ApiError as error:
            reason = f"{error.reason}: {error.message}"
        is_accepting = not reason
        if is_accepting is not self._is_accepting:
            self._is_accepting = is_accepting
            log.info("accepting" if is_accepting else "not_accepting", reason=reason)
            await self.on_change(is_accepting)


def _read(db: peewee.PostgresqlDatabase) -> tuple[list[SeenBeat], frozenset[str]]:
    return heartbeats.read(db), frozenset(recoveries.given_up(db))
