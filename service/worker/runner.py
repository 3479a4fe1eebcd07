"""The runner: claims chunks, keeps the window full of their requests, and releases what it does not finish."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from service.clock import Clock
from service.db import chunks, sharing, work
from service.db.availability import DATABASE_ERRORS, AvailabilityLog
from service.db.chunks import Holder, Request
from service.db.connection import Database
from service.db.results import Result
from service.db.run_order import CHUNK_SIZE
from service.db.sharing import Wish
from service.telemetry import logs
from service.worker import counters
from service.worker.engine.protocol import Engine, EngineDeadError
from service.worker.held_chunks import HeldChunks
from service.worker.result_writer import MAX_CAUSE, ResultWriter
from service.worker.sharing import ASK_INTERVAL_S, Sharing, look_again_s
from service.worker.starter import Starter
from service.worker.suspects import Suspects
from service.worker.wakeup import IDLE_S, Wakeup
from service.worker.window import Window

# Between looks for work that notices cause: many batches may come at once.
NOTICE_INTERVAL_S = 0.05
# An engine with requests that made no step for so long asks for no more.
STILL_S = 2.0

log = logs.get("runner")


class Runner:
    """Runs in the engine's loop. Claims chunks as the window needs them, never the whole batch.

    Every claimed request either gets a stored result or goes back to the queue with its chunk: when the engine dies,
    the lease is lost, or the worker drains.
    """

    def __init__(
        self,
        engine: Engine,
        database: Database,
        holder: Holder,
        group_interval_s: float,
        clock: Clock,
        on_end: Callable[[], None] = lambda: None,
    ) -> None:
        self._engine = engine
        self._database = database
        self._holder = holder
        self._clock = clock
        # Called when `run` ends, unless the engine is dead.
        self._on_end = on_end
        self._wakeup = Wakeup()
        self._availability = AvailabilityLog(log)
        self._held = HeldChunks()
        self._writer = ResultWriter(
            database, holder.incarnation, group_interval_s, AvailabilityLog(logs.get("results")), self._results_stored
        )
        self._window = Window(engine, self._writer, self._wakeup)
        self._starter = Starter(database, holder, self._held, self._window, self._availability)
        self._suspects = Suspects(
            database,
            holder,
            self._held,
            self._window,
            self._starter,
            self._writer,
            self._wakeup,
            self._availability,
            clock,
        )
        self._sharing = Sharing()
        # When to look for work again, and when it was last looked for.
        self._look_at_s = 0.0
        self._looked_s = float("-inf")
        # Something was created or given since.
        self._is_noticed = False
        # The engine's steps as last seen to change, and when.
        self._steps, self._moved_s = 0, float("-inf")
        # When others were last asked in vain.
        self._asked_s = float("-inf")
        # Until when a claim may turn up whose answer was lost in an outage: then its lease ends.
        self._unsure_until_s = 0.0
        # A batch was created, and no claim has followed.
        self._has_arrival = False
        # Takes no new work until told otherwise, and has nothing left.
        self._is_resting = False
        self._rests = False
        self._task: asyncio.Task[None] | None = None

    @property
    def held(self) -> list[int]:
        """Ids of the chunks held. May be read from any thread."""
        return self._held.ids

    @property
    def queued(self) -> int:
        """Number of requests held whose results are not stored yet."""
        return len(self._held.ready) + len(self._window) + self._writer.unstored

    @property
    def in_engine(self) -> int:
        """Number of requests in the engine."""
        return len(self._window)

    @property
    def refused(self) -> dict[str, Any]:
        """What Postgres refuses, for the heartbeat; {} if nothing. May be read from any thread."""
        found = {"results": self._writer.refused, "claims": self._availability.cause[:MAX_CAUSE]}
        found = {name: why for name, why in found.items() if why}
        return {"refused": found} if found else {}

    def work_arrived(self) -> None:
        """Looks for work now: a new batch may be next. Call this and the methods below in the runner's loop."""
        self._look_at_s = 0
        self._has_arrival = True
        self._wakeup.set()

    def work_noticed(self) -> None:
        """Looks for work as soon as there is room for it: there is something to claim."""
        self._is_noticed = True
        self._look_at_s = min(self._look_at_s, self._looked_s + NOTICE_INTERVAL_S)
        self._wakeup.set()

    def wished(self, wish: Wish) -> None:
        """Gives an idle worker what it wishes of what waits here."""
        if wish.worker_id != self._holder.worker_id:
            self._sharing.wished(wish, self._clock.monotonic())
            self._wakeup.set()

    def leases_lost(self, ids: Sequence[int]) -> None:
        """Stops work on chunks that belong to others now, so that no inference is wasted on them."""
        lost = set(ids) & set(self._held.ids)
        if not lost:
            return
        # A chunk whose last results have just been stored is done, and not lost: they are not counted here yet.
        at_work = lost & (self._held.waiting | self._window.chunks)
        if at_work:
            log.warning("leases_lost", chunks=sorted(at_work))
        self._held.drop(lost)
        self._window.cancel(lost)
        self._wakeup.set()

    def drain(self) -> None:
        """Takes no new work and releases what is not in the engine. `run` returns once the engine is empty."""
        self._window.close()

    def rest(self, is_resting: bool) -> None:
        """Takes no new work until called with False, finishes what is in the engine and releases the rest."""
        self._is_resting = is_resting
        self._look_at_s = 0
        self._wakeup.set()

    @property
    def rests(self) -> bool:
        """True while it takes no new work and has none left. May be read from any thread."""
        return self._rests

    def abandon(self) -> None:
        """Ends `run` without waiting for the engine: its requests go back to the queue."""
        if self._task is not None:
            self._task.cancel()

    async def prove(self) -> None:
        """Runs a harmless request through the engine."""
        await self._window.prove()

    async def run(self) -> None:
        """Works until drained. Raises EngineDeadError if the engine dies, after releasing all chunks."""
        self._task = asyncio.current_task()
        writing = asyncio.create_task(self._writer.follow())
        # Nobody waits for it: it goes on as long as we do.
        writing.add_done_callback(self._writing_ended)
        try:
            while self._window.is_open:
                await self._feed()
                await self._window.empty()
                # Wait until all results are stored, unless the engine is dead and Postgres is away or refuses them.
                while self._writer.unstored and not (self._window.is_dead and self._writer.are_held_up):
                    await self._wakeup.wait()
                if self._window.is_open:
                    await self._rest()
        finally:
            self._window.cancel()
            writing.cancel()
            await asyncio.wait({writing})
            if not self._window.is_dead:
                # Before a call that may last longer than this process.
                self._on_end()
            await self._give_back()
            if not writing.cancelled():
                writing.result()
        if self._window.is_dead:
            raise EngineDeadError("the engine died; its requests went back to the queue")

    def _writing_ended(self, writing: "asyncio.Task[None]") -> None:
        """Without it nothing is stored any more: the run ends, and with it the process."""
        if not writing.cancelled() and self._task is not None:
            self._task.cancel()

    async def _rest(self) -> None:
        """Releases what is left, and waits until work may be taken again."""
        await self._give_back()
        log.info("work_put_down")
        # What an outage hides from us keeps its lease until that ends, and others see it.
        self._rests = True
        while self._is_resting and self._window.is_open:
            await self._wakeup.wait()
            self._window.watch_engine()
        self._rests = False

    async def _feed(self) -> None:
        size = self._window.size
        while self._window.is_open and not self._is_resting:
            if self._suspects.have_turn:
                await self._suspects.take_turn()
            self._held.returned(self._window.take_returned())
            is_scarce = self._sharing.is_scarce(self._clock.monotonic())
            most = self._engine.concurrency if is_scarce else size
            # While Postgres is away results pile up: hold at most a few windows of them in memory.
            room = most - len(self._window) if self._writer.unstored < 4 * size else 0
            await self._starter.start(max(0, room))
            await self._share()
            claimed, wait_s = False, IDLE_S
            if (wanted := self._wanted(is_scarce)) > 0:
                wait_s = min(IDLE_S, self._look_at_s - self._clock.monotonic())
                if wait_s <= 0:
                    self._has_arrival = self._is_noticed = False
                    claimed = await self._claim(wanted)
                    # What came meanwhile was perhaps not seen.
                    wait_s = NOTICE_INTERVAL_S if self._is_noticed else look_again_s(self._looked_s, self._asked_s)
                    self._look_at_s = 0 if claimed else self._clock.monotonic() + wait_s
            if not claimed:
                await self._wakeup.wait(wait_s)
            self._window.watch_engine()

    @property
    def _room(self) -> int:
        """How many requests more could begin at once."""
        return self._engine.concurrency - len(self._window) - len(self._held.ready)

    def _wanted(self, is_scarce: bool) -> int:
        """How many requests to claim; not positive if there are enough."""
        if is_scarce:
            return self._room
        size = self._window.size
        enough = max(CHUNK_SIZE, size // 4) * (2 if self._has_arrival else 1)
        return CHUNK_SIZE + size // 4 if len(self._held.ready) < enough else 0

    async def _claim(self, wanted: int) -> bool:
        """Claims chunks and loads their requests. Returns False if there are none or Postgres is away."""
        self._looked_s = self._clock.monotonic()
        known = self._held.ids if self._availability.is_away or self._looked_s < self._unsure_until_s else None
        try:
            taken = await self._database.run(
                work.take,
                *(self._holder, self._engine.models, wanted, self._held.suspects, known),
                room := self._room if self._may_ask() else 0,
            )
        except DATABASE_ERRORS as error:
            # Chunks may have been claimed all the same, or be claimed once Postgres goes on.
            self._unsure_until_s = self._clock.monotonic() + self._holder.lease_s
            self._availability.away(error)
            return False
        self._availability.back(unstored=self._writer.unstored)
        self._suspects.are_waiting = taken.are_alone_waiting
        if taken.is_scarce:
            self._sharing.note_scarcity(self._clock.monotonic())
        if room > 0 or taken.chunks:
            self._asked_s = float("-inf") if taken.chunks else self._looked_s
        self._held.load(taken)
        return bool(taken.chunks)

    def _may_ask(self) -> bool:
        """False if others were just asked in vain, or while the engine may hang: what they gave would hang with it."""
        now_s = self._clock.monotonic()
        if self._engine.steps != self._steps or not len(self._window):
            self._steps, self._moved_s = self._engine.steps, now_s
        return now_s - self._moved_s < STILL_S and now_s - self._asked_s >= ASK_INTERVAL_S

    async def _share(self) -> None:
        """Gives idle workers what waits here, also in the engine. Whatever is given does not begin here any more."""
        batches = self._sharing.batches(self._clock.monotonic())
        if batches:
            is_of_these = self._held.may_give(batches)

            def may_give(request: Request) -> bool:
                return is_of_these(request) and self._sharing.is_wished(request)

            waiting = sum(map(may_give, self._held.ready)) + sum(map(may_give, self._window.waiting))
            wanted = self._sharing.wanted(waiting)
            given = self._held.ready.take_last(wanted, may_give)
            self._held.offer(self._sharing.parts(given))
            self._window.take_back(wanted - len(given), may_give)
        if self._held.giving or self._window.leaving:
            self._sharing.note_scarcity(self._clock.monotonic())
        if not self._held.giving:
            return
        parts = list(self._held.giving)
        try:
            requests = await self._database.run(sharing.give, self._holder, parts)
        except DATABASE_ERRORS as error:
            # It may have been given all the same: it does not begin here until that is known.
            self._availability.away(error)
            return
        self._held.given(parts)
        log.info("requests_given", requests=requests, parts=len(parts))

    def _results_stored(self, stored: Sequence[Result]) -> None:
        self._availability.answered()
        counters.results_stored([result for result in stored if result.chunk_id in self._held])
        for result in stored:
            if self._held.result_stored(result.chunk_id, result.index):
                # Few suspects are claimed at a time: now there is room for the next.
                self._look_at_s = 0
        self._wakeup.set()

    async def _give_back(self) -> None:
        """Releases all chunks. While Postgres is away that is left to the next life, or to the end of their leases.

        If the engine died, the requests that were in it become suspects; those that only waited for it do not.
        """
        held = self._held.ids
        died_with = self._window.died_with & set(held)
        self._held.clear()
        if not held:
            return
        try:
            innocent = [chunk for chunk in held if chunk not in died_with]
            released = await self._database.run(chunks.release, self._holder, innocent)
            log.info("chunks_given_back", chunks=released)
            if died_with:
                await self._suspects.bury()
        except DATABASE_ERRORS as error:
            self._availability.away(error)
