"""Fake engine and Postgres for tests of the runner's parts: they record calls and answer as the test tells them."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any
from uuid import UUID

from service.db import chunks, results, suspects, work
from service.db.availability import DatabaseAwayError
from service.db.chunks import Chunk, Request
from service.db.results import Result
from service.db.suspects import Burial
from service.db.work import Work
from service.worker.engine.protocol import Answer, EngineDeadError

INCARNATION = UUID(int=7)
DEADLINE_S = 10


def result(index: int, chunk_id: int = 1) -> Result:
    return Result(chunk_id, 1, index, status_code=200, body="{}", custom_id=f"c{index}")


def request(index: int, chunk_id: int = 1) -> Request:
    return Request(chunk_id, 1, index, f"c{index}", "/v1/completions", f"body {index}")


def work_of(*chunk_ids: int, deaths: int = 0, are_alone_waiting: bool = False) -> Work:
    """Chunks of one request each; a request's index is ten times its chunk's number."""
    taken = [(Chunk(number, 1, 10 * number, 1, deaths), [request(10 * number, number)]) for number in chunk_ids]
    return Work(taken, are_alone_waiting)


class Journal:
    """Records what happened, in order. Tests can wait for an entry."""

    def __init__(self) -> None:
        self.entries: list[tuple[object, ...]] = []
        self._changed = asyncio.Event()

    def note(self, *entry: object) -> None:
        self.entries.append(entry)
        self._changed.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Waits for the condition, checking it after each new entry."""
        async with asyncio.timeout(DEADLINE_S):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    async def seen(self, *entry: object) -> None:
        await self.until(lambda: entry in self.entries)


class FakePostgres:
    """Stores results and hands out suspects. `refuse` returns the exception that a statement raises, or None."""

    def __init__(self, journal: Journal) -> None:
        self.journal = journal
        self.stored: list[Result] = []
        self.alone: list[int] = []
        self.refuse: Callable[[Any, Sequence[Any]], Exception | None] = lambda function, arguments: None

    def away(self) -> None:
        self.refuse = lambda function, arguments: DatabaseAwayError("gone")

    def back(self) -> None:
        self.refuse = lambda function, arguments: None

    async def run(self, function: Any, *arguments: Any) -> Any:
        await asyncio.sleep(0)
        error = self.refuse(function, arguments)
        if error is not None:
            self.journal.note("refused", function.__name__)
            raise error
        if function is results.write:
            group, incarnation = arguments
            assert incarnation == INCARNATION
            self.stored += group
            self.journal.note("stored", *(one.index for one in group))
            return len(group)
        if function is chunks.release:
            self.journal.note("released", *arguments[1])
            return len(arguments[1])
        if function is work.take_alone:
            taken = [self.alone.pop(0)] if self.alone else []
            self.journal.note("taken", *taken)
            return work_of(*taken, deaths=2, are_alone_waiting=bool(taken))
        if function is chunks.begin:
            self.journal.note("begun", *arguments[1])
            return set(arguments[1])
        if function is suspects.bury:
            self.journal.note("buried", *arguments)
            return Burial(0, 1, 0)
        raise AssertionError(function)


class FakeEngine:
    """Answers each request when the test tells it to."""

    models = ("tiny",)
    window = 4
    concurrency = 2
    steps = 0

    def __init__(self, journal: Journal, urls: Sequence[str] = ("/v1/completions",)) -> None:
        self.journal = journal
        self.urls = frozenset(urls)
        self.is_dead = False
        self.running: dict[str, asyncio.Future[Answer]] = {}

    async def run(self, url: str, body: str, headers: object = None) -> Answer:
        self.running[body] = asyncio.get_running_loop().create_future()
        self.journal.note("asked", body)
        try:
            return await self.running[body]
        finally:
            del self.running[body]

    def answer(self, body: str) -> None:
        self.running[body].set_result(Answer(200, "{}"))

    def fail(self, body: str, error: Exception) -> None:
        self.running[body].set_exception(error)

    def die(self) -> None:
        self.is_dead = True
        for waiting in self.running.values():
            waiting.set_exception(EngineDeadError("killed"))
