"""Orders of operators about this host, which any gateway accepts and Postgres keeps, and the schema's demands."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

import peewee

from service.db import hosts, schema
from service.db.availability import DATABASE_ERRORS, AvailabilityLog, DatabaseUnfitError
from service.db.connection import Database
from service.telemetry import logs
from service.worker.state import WorkerState

log = logs.get("orders")


@dataclass
class Orders:
    """Looks every `interval_s`. `on_drain(is_drained)` is called when the order to drain is given or taken back."""

    database: Database
    host: str
    state: WorkerState
    interval_s: float
    on_drain: Callable[[bool], None]
    _availability: AvailabilityLog = field(default_factory=lambda: AvailabilityLog(log))

    async def follow(self) -> None:
        """Follows them for ever. Raises DatabaseUnfitError once this program is too old for the schema."""
        while True:
            await self.look()
            await asyncio.sleep(self.interval_s)

    async def look(self) -> None:
        """Looks once; while Postgres is away the last order holds. Raises DatabaseUnfitError as `follow` does."""
        try:
            is_drained = await self.database.run(_look, self.host)
            self._availability.back()
        except DatabaseUnfitError:
            raise
        except DATABASE_ERRORS as error:
            self._availability.away(error)
            return
        if is_drained is not self.state.is_drained:
            log.info("host_drained" if is_drained else "host_resumed")
            self.state.is_drained = is_drained
            self.on_drain(is_drained)


def _look(db: peewee.PostgresqlDatabase, host: str) -> bool:
    schema.check_version(db)
    return host in hosts.drained(db)
