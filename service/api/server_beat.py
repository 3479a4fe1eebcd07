"""The heartbeat of a gateway or an OpenAI door: which host runs it, where, and of which version."""

import asyncio
import os
from contextlib import suppress
from dataclasses import dataclass, field

from service import processes
from service.db import schema, server_beats
from service.db.availability import DATABASE_ERRORS, AvailabilityLog, DatabaseUnfitError
from service.db.connection import Database
from service.telemetry import logs

END_TIMEOUT_S = 2.0

log = logs.get("beat")


@dataclass
class ServerBeat:
    """Beats every `interval_s` as `server_id`, `<host>:<supervisord process>`."""

    database: Database
    server_id: str
    program: str
    address: str
    interval_s: float
    _availability: AvailabilityLog = field(default_factory=lambda: AvailabilityLog(log))

    async def follow(self) -> None:
        """Beats for ever. Raises DatabaseUnfitError once this program is too old for the schema."""
        while True:
            try:
                await self.database.run(schema.check_version)
                await self.database.run(server_beats.write, self.server_id, self.program, self.address, os.getpid())
                self._availability.back()
            except DatabaseUnfitError:
                raise
            except DATABASE_ERRORS as error:
                self._availability.away(error)
            await asyncio.sleep(self.interval_s)

    async def end(self) -> None:
        """Says that it was stopped, if Postgres answers within END_TIMEOUT_S; not if supervisord has died."""
        if processes.has_lost_parent():
            return
        end = self.database.run(server_beats.end, self.server_id, self.address, os.getpid())
        with suppress(*DATABASE_ERRORS, TimeoutError):
            await asyncio.wait_for(end, END_TIMEOUT_S)
