"""The runner: keeps a window of requests in the engine and stores their results in groups."""

import asyncio
import contextlib
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from uuid import UUID

from service import logs, messages, tracing
from service.db import chunks, results
from service.db.batches import CHUNK_SIZE
from service.db.chunks import Request, Work
from service.db.connection import Database, Unreachable
from service.db.results import Result
from service.worker import counts
from service.worker.engine import Answer, Engine, EngineDeadError

# How long to wait before looking for work again when there was none, or when Postgres was away.
IDLE_S = 1.0
# Results stored by one statement at most.
GROUP = 500
# Suspects run alone for this long at a time; then the other work has its turn for as long as that took.
APART_S = 30.0
# What the engine must answer before a suspect runs alone: one that dies of nothing must not be a suspect's fault.
# And what it answers when it is idle, to show that it moves. Completions first: they need no chat template.
PROOF = {
    "/v1/completions": '{"prompt": "Hello", "max_tokens": 1}',
    "/v1/embeddings": '{"input": "Hello"}',
    "/classify": '{"input": "Hello"}',
    "/pooling": '{"input": "Hello"}',
    "/score": '{"text_1": "Hello", "text_2": "Hello"}',
}

log = logs.get("runner")


@dataclass
class Runner:
    """Runs in the engine's loop. Chunks are claimed as the window needs them, never the whole batch.

    Every request that it takes ends as a result that was handed to Postgres, or goes back to the queue with its
    chunk: when the engine dies, the lease is lost, or the worker drains.
    """

    engine: Engine
    database: Database
    worker_id: str
    incarnation: UUID
    lease_s: float
    group_interval_s: float

    # Requests of our chunks that are not in the engine yet.
    _ready: deque[Request] = field(default_factory=deque)
    # What runs in the engine.
    _running: dict[asyncio.Task[None], Request] = field(default_factory=dict)
    # Finished and not stored yet.
    _finished: deque[Result] = field(default_factory=deque)
    # Requests of each chunk held that are not stored yet.
    _unstored: dict[int, int] = field(default_factory=dict)
    _wake: asyncio.Event = field(default_factory=asyncio.Event)
    _wake_writer: asyncio.Event = field(default_factory=asyncio.Event)
    # When to look for work again, in the loop's time; and when suspects may run alone again.
    _look_at: float = 0
    _apart_at: float = 0
    # Chunks that are one suspect each.
    _suspects: set[int] = field(default_factory=set)
    _are_alone_waiting: bool = False
    _is_proven: bool = False
    # The chunks that had a request in the engine when it died.
    _died_with: set[int] = field(default_factory=set)
    _task: "asyncio.Task[None] | None" = None
    _is_draining: bool = False
    _is_dead: bool = False
    _is_database_away: bool = False

    @property
    def held(self) -> list[int]:
        """Ids of the chunks that are held. May be read from any thread."""
        return list(self._unstored)

    @property
    def queued(self) -> int:
        """Requests held that are not stored yet."""
        return len(self._ready) + len(self._running) + len(self._finished)

    @property
    def in_engine(self) -> int:
        """Requests in the engine."""
        return len(self._running)

    def work_arrived(self) -> None:
        """Looks for work now rather than at the next interval. Call in the runner's loop, as all that follow."""
        self._look_at = 0
        self._wake.set()

    def leases_lost(self, ids: Sequence[int]) -> None:
        """Stops the work on chunks that belong to others now, so that no inference is burnt on them."""
        lost = set(ids) & self._unstored.keys()
        if not lost:
            return
        log.warning("leases_lost", chunks=sorted(lost))
        self._drop(lost)

    def drain(self) -> None:
        """Takes no new work; what is in the engine may finish, the rest goes back. `run` returns once it has."""
        self._is_draining = True
        self._wake.set()

    def abandon(self) -> None:
        """Ends `run` without waiting for what is in the engine: that goes back too."""
        if self._task is not None:
            self._task.cancel()

    async def run(self) -> None:
        """Works until drained. Raises EngineDeadError when the engine dies, with all chunks given back."""
        self._task = asyncio.current_task()
        writer = asyncio.create_task(self._write_groups())
        try:
            await self._feed()
            await self._empty()
            # What has finished is worth waiting for, except for the dead with Postgres away too.
            while self._finished and not (self._is_dead and self._is_database_away):
                await self._wait()
        finally:
            for task in list(self._running):
                task.cancel()
            writer.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await writer
            await self._give_back()
        if self._is_dead:
            raise EngineDeadError("the engine died; its requests went back to the queue")

    async def _feed(self) -> None:
        window = self.engine.window
        loop = asyncio.get_running_loop()
        while not (self._is_draining or self._is_dead):
            if self._are_alone_waiting and loop.time() >= self._apart_at:
                await self._run_apart()
            # With Postgres away results pile up; a few windows of them is all that is held in memory.
            while self._ready and len(self._running) < window and len(self._finished) < 4 * window:
                self._start(self._ready.popleft())
            claimed = False
            if len(self._ready) < max(CHUNK_SIZE, window // 4) and loop.time() >= self._look_at:
                claimed = await self._claim(1 + window // (4 * CHUNK_SIZE))
                self._look_at = 0 if claimed else loop.time() + IDLE_S
            if not claimed:
                await self._wait()
            self._watch_engine()

    def _watch_engine(self) -> None:
        """Takes note of an engine that died without anybody waiting for it."""
        if self.engine.is_dead:
            self._note_death("found dead")

    def _note_death(self, cause: str) -> None:
        if self._is_dead:
            return
        self._is_dead = True
        self._died_with = {request.chunk_id for request in self._running.values()}
        log.error("engine_died", cause=cause, in_engine=len(self._running))
        self._wake.set()

    async def _empty(self) -> None:
        """Waits until nothing is in the engine, or the engine is dead."""
        while self._running and not self._is_dead:
            await self._wait()
            self._watch_engine()

    async def _run_apart(self) -> None:
        """Runs suspects of two deaths, one at a time with nothing else in the engine and nothing else held.

        Whatever dies now dies of the one request that is held. Other work has its turn in between.
        """
        await self._empty()
        if not self._is_proven and not self._is_dead:
            await self.prove()
        while self._finished and not self._is_dead:
            await self._wait()
        if self._is_dead or self._is_draining or not await self._release_ready():
            return
        loop = asyncio.get_running_loop()
        began = loop.time()
        while not (self._is_dead or self._is_draining) and loop.time() - began < APART_S:
            try:
                work = await self.database.run(
                    chunks.take_alone, self.worker_id, self.incarnation, self.engine.models, self.lease_s
                )
            except Unreachable as error:
                self._database_away(error)
                break
            self._load(work)
            if not work.chunks:
                break
            [(chunk, _)] = work.chunks
            suspect = messages.request_name(chunk.batch_id, chunk.first_index)
            log.warning("suspect_runs_alone", chunk=chunk.id, request=suspect)
            while self._ready:
                self._start(self._ready.popleft())
            await self._empty()
            while self._unstored and not self._is_dead:
                await self._wait()
        self._apart_at = loop.time() + (loop.time() - began)

    async def prove(self) -> None:
        """Has the engine answer a harmless request."""
        url = next((url for url in PROOF if url in self.engine.urls), None)
        if url is None:
            self._is_proven = True
            return
        try:
            await self.engine.run(url, PROOF[url])
        except EngineDeadError as error:
            self._note_death(str(error))
        else:
            self._is_proven = True

    async def _release_ready(self) -> bool:
        """Puts back what is held and not in the engine. False: Postgres is away."""
        try:
            await self.database.run(chunks.release, self.held, self.incarnation)
        except Unreachable as error:
            self._database_away(error)
            return False
        self._unstored.clear()
        self._suspects.clear()
        self._ready.clear()
        return True

    async def _claim(self, limit: int) -> bool:
        """Takes chunks and loads their requests. False: there are none, or Postgres is away."""
        held = len(self._suspects & self._unstored.keys())
        mine = (self.worker_id, self.incarnation, self.engine.models)
        try:
            work = await self.database.run(chunks.take, *mine, limit, held, self.lease_s)
        except Unreachable as error:
            # A chunk that was claimed and not loaded is not renewed, so its lease ends by itself.
            self._database_away(error)
            return False
        self._database_back()
        self._load(work)
        return bool(work.chunks)

    def _load(self, work: Work) -> None:
        self._are_alone_waiting = work.are_alone_waiting
        for chunk, requests in work.chunks:
            if requests:
                self._unstored[chunk.id] = len(requests)
                self._ready.extend(requests)
            if chunk.deaths:
                self._suspects.add(chunk.id)
            batch = messages.batch_name(chunk.batch_id)
            log.debug("chunk_claimed", chunk=chunk.id, batch=batch, requests=len(requests))

    def _start(self, request: Request) -> None:
        task = asyncio.create_task(self._run_one(request))
        self._running[task] = request
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._running.pop(task, None)
        self._wake.set()

    async def _run_one(self, request: Request) -> None:
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        try:
            answer = await self._ask(request)
        except EngineDeadError as error:
            self._note_death(str(error))
            return
        except Exception as error:
            name = messages.request_name(request.batch_id, request.index)
            log.error("request_failed", request=name, exc_info=error)
            message = f"{type(error).__name__} in the worker"
            self._finished.append(_error(request, "INTERNAL_ERROR", message))
        else:
            self._is_proven = True
            counts.answered(request.url, loop.time() - began_s)
            self._finished.append(_result(request, answer))
        self._wake_writer.set()

    async def _ask(self, request: Request) -> Answer:
        """Runs it under the name of its result and, if its client has one, in the client's trace."""
        name = messages.request_name(request.batch_id, request.index)
        headers = {"x-request-id": name}
        if request.traceparent is None:
            return await self.engine.run(request.url, request.body, headers)
        with tracing.span("run_request", request.traceparent) as span:
            headers[tracing.HEADER] = span.traceparent or request.traceparent
            answer = await self.engine.run(request.url, request.body, headers)
            span.note({"request": name, "http.response.status_code": answer.status_code})
            return answer

    async def _write_groups(self) -> None:
        while True:
            await self._wake_writer.wait()
            self._wake_writer.clear()
            await asyncio.sleep(self.group_interval_s)
            while self._finished:
                group = [self._finished[i] for i in range(min(GROUP, len(self._finished)))]
                try:
                    await self.database.run(results.write, group, self.incarnation)
                except Unreachable as error:
                    self._database_away(error)
                    await asyncio.sleep(IDLE_S)
                    continue
                except Exception as error:  # noqa: BLE001 - one result that cannot be stored must not stop the rest
                    group = await self._write_singly(group, error)
                self._database_back()
                counts.stored([result for result in group if result.chunk_id in self._unstored])
                for result in group:
                    self._finished.popleft()
                    self._stored(result)
                self._wake.set()

    async def _write_singly(self, group: list[Result], error: Exception) -> list[Result]:
        """Stores a refused group one by one, with an error for each result that Postgres will not have."""
        log.error("result_group_refused", results=len(group), exc_info=error)
        for place, result in enumerate(group):
            try:
                await self.database.run(results.write, [result], self.incarnation)
            except Unreachable:
                return group[:place]
            except Exception as refused:  # noqa: BLE001 - becomes the result
                message = f"its result cannot be stored: {type(refused).__name__}"
                substitute = _error(result, "RESULT_NOT_STORABLE", message)
                await self.database.run(results.write, [substitute], self.incarnation)
        return group

    def _stored(self, result: Result) -> None:
        left = self._unstored.get(result.chunk_id)
        if left is None:
            return
        if left == 1:
            del self._unstored[result.chunk_id]
            if result.chunk_id in self._suspects:
                self._suspects.discard(result.chunk_id)
                # The next suspects are few at a time: they wait for this.
                self._look_at = 0
        else:
            self._unstored[result.chunk_id] = left - 1

    def _drop(self, ids: set[int]) -> None:
        for chunk_id in ids:
            self._unstored.pop(chunk_id, None)
        self._ready = deque(request for request in self._ready if request.chunk_id not in ids)
        for task, request in list(self._running.items()):
            if request.chunk_id in ids:
                task.cancel()
        self._wake.set()

    async def _give_back(self) -> None:
        """Releases what is held, for whoever is next. Without Postgres the leases end by themselves.

        After a death of the engine what was in it is suspect; what only waited for it is not.
        """
        held = self.held
        died_with = self._died_with & self._unstored.keys()
        self._unstored.clear()
        self._ready.clear()
        if not held:
            return
        try:
            released = await self.database.run(
                chunks.release, [chunk for chunk in held if chunk not in died_with], self.incarnation
            )
            log.info("chunks_given_back", chunks=released)
            if died_with:
                burial = await self.database.run(chunks.bury, self.worker_id)
                log.warning("suspects_made", **asdict(burial))
        except Unreachable as error:
            self._database_away(error)

    async def _wait(self) -> None:
        """Until something happened, or the interval is over."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._wake.wait(), IDLE_S)
        self._wake.clear()

    def _database_away(self, error: Exception) -> None:
        if not self._is_database_away:
            log.warning("database_away", cause=str(error).strip())
        self._is_database_away = True

    def _database_back(self) -> None:
        if self._is_database_away:
            log.info("database_back", unstored=len(self._finished))
        self._is_database_away = False


def _error(of: Request | Result, code: str, message: str) -> Result:
    return Result(of.chunk_id, of.batch_id, of.index, error_code=code, error_message=message, custom_id=of.custom_id)


def _result(request: Request, answer: Answer) -> Result:
    return Result(
        request.chunk_id,
        request.batch_id,
        request.index,
        status_code=answer.status_code,
        # One line, so that it can be one of a file; within a text JSON has no line breaks of its own.
        body=answer.body.replace("\n", " ").replace("\r", " "),
        prompt_tokens=answer.prompt_tokens,
        completion_tokens=answer.completion_tokens,
        custom_id=request.custom_id,
    )
