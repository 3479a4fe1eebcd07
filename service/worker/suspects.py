"""Suspects: requests in an engine when it died. After two deaths they run alone; one that dies alone is guilty."""

from dataclasses import asdict, dataclass

from service.api import messages
from service.clock import Clock
from service.db import chunks, suspects, work
from service.db.availability import DATABASE_ERRORS, AvailabilityLog
from service.db.chunks import Holder
from service.db.connection import Database
from service.telemetry import logs
from service.worker.held_chunks import HeldChunks
from service.worker.result_writer import ResultWriter
from service.worker.starter import Starter
from service.worker.wakeup import Wakeup
from service.worker.window import Window

# Suspects run alone for this long at a time; then other work has its turn for as long as they took.
TURN_S = 30.0

log = logs.get("runner")


@dataclass
class Suspects:
    """Takes turns with other work. During a turn of suspects nothing else is in the engine or held."""

    database: Database
    holder: Holder
    held: HeldChunks
    window: Window
    starter: Starter
    writer: ResultWriter
    wakeup: Wakeup
    availability: AvailabilityLog
    clock: Clock

    # Whether the last claim saw suspects that must run alone.
    are_waiting: bool = False
    _next_turn_s: float = 0

    @property
    def have_turn(self) -> bool:
        """True when suspects are waiting and other work has had its turn."""
        return self.are_waiting and self.clock.monotonic() >= self._next_turn_s

    async def take_turn(self) -> None:
        """Runs suspects one at a time, so that a death can only be the fault of the one in the engine."""
        await self._clear_the_way()
        if self.writer.unstored and self.window.is_open:
            # What a trigger of others refuses cannot be released; other work goes on meanwhile.
            self._next_turn_s = self.clock.monotonic() + TURN_S
            return
        if not self.window.is_open or not await self._release_held():
            return
        began_s = self.clock.monotonic()
        while self.window.is_open and self.clock.monotonic() - began_s < TURN_S:
            if not await self._run_next():
                break
        now_s = self.clock.monotonic()
        self._next_turn_s = now_s + (now_s - began_s)

    async def bury(self) -> None:
        """Marks the requests that were in the engine when it died as suspects; one that was alone gets an error result.

        Raises DatabaseAwayError.
        """
        burial = await self.database.run(suspects.bury, self.holder.worker_id, self.holder.incarnation)
        log.warning("suspects_made", **asdict(burial))

    async def _clear_the_way(self) -> None:
        """Waits until the engine is empty and proven, and all its results are stored that can be."""
        await self.window.empty()
        if not self.window.is_proven and not self.window.is_dead:
            await self.window.prove()
        while self.writer.unstored and not (self.window.is_dead or self.writer.are_put_off):
            await self.wakeup.wait()

    async def _release_held(self) -> bool:
        """Releases all chunks. Returns False if Postgres is away."""
        try:
            await self.database.run(chunks.release, self.holder, self.held.ids)
        except DATABASE_ERRORS as error:
            self.availability.away(error)
            return False
        self.held.clear()
        return True

    async def _run_next(self) -> bool:
        """Runs the next suspect until its result is stored. Returns False if there is none or Postgres is away."""
        try:
            taken = await self.database.run(work.take_alone, self.holder, self.window.engine.models)
        except DATABASE_ERRORS as error:
            self.availability.away(error)
            return False
        self.are_waiting = taken.are_alone_waiting
        self.held.load(taken)
        if not taken.chunks:
            return False
        [(chunk, _)] = taken.chunks
        suspect = messages.request_name(chunk.batch_id, chunk.first_index)
        log.warning("suspect_runs_alone", chunk=chunk.id, request=suspect)
        await self.starter.start(len(self.held.ready))
        await self.window.empty()
        while self.held.ids and not self.window.is_dead:
            await self.wakeup.wait()
        return True
