"""Starts the requests that are ready, each once Postgres knows that it may be in the engine."""

from collections.abc import Mapping
from dataclasses import dataclass

from service.db import chunks
from service.db.availability import DATABASE_ERRORS, AvailabilityLog
from service.db.chunks import Holder
from service.db.connection import Database
from service.worker.held_chunks import HeldChunks
from service.worker.window import Window


@dataclass(frozen=True)
class Starter:
    """Should this host be lost, only the requests that were in its engine are suspects.

    While Postgres keeps silent nothing is noted, and nothing waits for it. What was not noted is with the next start.
    """

    database: Database
    holder: Holder
    held: HeldChunks
    window: Window
    availability: AvailabilityLog

    async def start(self, most: int) -> None:
        """Starts up to `most` requests. Notes a window of each chunk at once, so that few statements do."""
        starting = [self.held.ready.popleft() for _ in range(min(most, len(self.held.ready)))]
        last = self.held.begin(starting, self.window.size)
        self.held.not_noted({chunk_id: last[chunk_id] for chunk_id in last.keys() - await self._note(last)})
        for request in starting:
            # Its lease may have been lost meanwhile.
            if request.chunk_id in self.held:
                self.window.start(request)

    async def _note(self, last: Mapping[int, int | None]) -> set[int]:
        """Returns the chunks of which Postgres knows it now."""
        if last and not self.availability.is_silent:
            try:
                return await self.database.run(chunks.begin, self.holder, last)
            except DATABASE_ERRORS as error:
                self.availability.away(error)
        return set()
