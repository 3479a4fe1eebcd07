"""Measures output and error files as soon as their batch has ended, so that nobody waits for it who reads them."""

import asyncio
from dataclasses import dataclass, field

from service.db.availability import DATABASE_ERRORS, AvailabilityLog
from service.db.connection import Database
from service.http import content
from service.telemetry import logs

INTERVAL_S = 2.0

log = logs.get("measuring")


@dataclass
class Measuring:
    """Uses a connection of its own. Several processes may do the same at once: the first that is done counts."""

    database: Database
    _availability: AvailabilityLog = field(default_factory=lambda: AvailabilityLog(log))

    async def follow(self) -> None:
        """For ever."""
        while True:
            try:
                is_more = await content.measure_ended(self.database)
                self._availability.back()
            except DATABASE_ERRORS as error:
                self._availability.away(error)
                is_more = False
            await asyncio.sleep(0 if is_more else INTERVAL_S)
