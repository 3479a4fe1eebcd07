"""How suspects run: alone, after the engine has been proven, in turns with other work."""

import asyncio
import itertools
from collections.abc import Callable, Coroutine, Sequence
from datetime import UTC, datetime
from typing import Any

import pytest

from service.db import results
from service.db.availability import AvailabilityLog, DatabaseAwayError
from service.db.chunks import Holder
from service.db.results import Result
from service.telemetry import logs
from service.worker import result_writer
from service.worker.held_chunks import HeldChunks
from service.worker.result_writer import ResultWriter
from service.worker.starter import Starter
from service.worker.suspects import TURN_S, Suspects
from service.worker.wakeup import Wakeup
from service.worker.window import PROOF, Window
from tests.support.engine_fakes import INCARNATION, FakeEngine, FakePostgres, Journal, request, work_of
from tests.support.loops import in_loop

ASKED_TO_PROVE = ("asked", PROOF["/v1/completions"])
# The bodies of the suspects in chunks 5 and 6.
FIVE, SIX = "body 50", "body 60"


class StandingClock:
    """A clock that the test moves."""

    now_s = 100.0

    def monotonic(self) -> float:
        return self.now_s

    def now(self) -> datetime:
        return datetime(2026, 1, 1, tzinfo=UTC)


class Parts:
    """A worker's parts around an engine and a Postgres that the test controls. Suspects wait in chunks 5 and 6."""

    def __init__(self, urls: Sequence[str] = ("/v1/completions",)) -> None:
        self.journal = Journal()
        self.postgres, self.engine = FakePostgres(self.journal), FakeEngine(self.journal, urls)
        self.clock = StandingClock()
        self.held, self.wakeup = HeldChunks(), Wakeup()
        self.availability = AvailabilityLog(logs.get("test"))
        database: Any = self.postgres
        self.writer = ResultWriter(database, INCARNATION, 0, self.availability, self._on_stored)
        self.window = Window(self.engine, self.writer, self.wakeup)
        holder = Holder("w", INCARNATION, 60.0)
        self.suspects = Suspects(
            database,
            holder,
            self.held,
            self.window,
            Starter(database, holder, self.held, self.window, self.availability),
            self.writer,
            self.wakeup,
            self.availability,
            self.clock,
            are_waiting=True,
        )
        self.postgres.alone = [5, 6]

    def _on_stored(self, stored: Sequence[Result]) -> None:
        for result in stored:
            self.held.result_stored(result.chunk_id, result.index)
        self.wakeup.set()

    async def turn(self, direct: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """One turn of the suspects, while `direct` controls engine and Postgres."""
        writing = asyncio.create_task(self.writer.follow())
        turn = asyncio.create_task(self.suspects.take_turn())
        await direct()
        await turn
        writing.cancel()

    async def answered(self, body: str) -> None:
        """Answers this body once the engine is asked for it."""
        await self.journal.seen("asked", body)
        self.engine.answer(body)


def reluctant() -> Callable[[Any, Sequence[Any]], Exception | None]:
    """Postgres accepts a result only at every fifth attempt, which exposes code that does not wait for it."""
    attempts = itertools.count(1)

    def refuse(function: Any, arguments: Sequence[Any]) -> Exception | None:
        return DatabaseAwayError("slow") if function is results.write and next(attempts) % 5 else None

    return refuse


@in_loop
async def test_suspects_run_one_at_a_time_with_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other work is finished or released first, and each suspect's result is stored before the next is claimed."""
    monkeypatch.setattr(result_writer, "IDLE_S", 0)
    parts = Parts()
    parts.window.is_proven = True
    parts.postgres.refuse = reluctant()
    parts.held.load(work_of(1, 2))
    parts.window.start(parts.held.ready.popleft())

    async def direct() -> None:
        await parts.answered("body 10")
        await parts.answered(FIVE)
        await parts.answered(SIX)

    await parts.turn(direct)
    assert [entry for entry in parts.journal.entries if entry != ("refused", "write")] == [
        ("asked", "body 10"),
        ("stored", 10),
        ("released", 2),
        ("taken", 5),
        ("begun", 5),
        ("asked", FIVE),
        ("stored", 50),
        ("taken", 6),
        ("begun", 6),
        ("asked", SIX),
        ("stored", 60),
        ("taken",),
    ]
    assert (parts.held.ids, list(parts.held.ready), parts.suspects.are_waiting) == ([], [], False)


@in_loop
async def test_an_engine_that_has_answered_nothing_is_proven_first() -> None:
    """An engine that has answered nothing yet first answers a harmless request, so that no suspect is blamed for it."""
    parts = Parts()

    async def direct() -> None:
        await parts.journal.seen(*ASKED_TO_PROVE)
        assert ("taken", 5) not in parts.journal.entries
        parts.engine.answer(PROOF["/v1/completions"])
        await parts.answered(FIVE)
        await parts.answered(SIX)

    await parts.turn(direct)
    assert parts.journal.entries[0] == ASKED_TO_PROVE
    assert parts.journal.entries.count(ASKED_TO_PROVE) == 1


@in_loop
async def test_no_suspect_is_taken_for_an_engine_that_dies_of_the_proof() -> None:
    """When the engine dies of the harmless request, no suspect is claimed and none is blamed."""
    parts = Parts()

    async def direct() -> None:
        await parts.journal.seen(*ASKED_TO_PROVE)
        parts.engine.die()

    await parts.turn(direct)
    assert parts.journal.entries == [ASKED_TO_PROVE]
    assert (parts.window.is_dead, parts.window.died_with) == (True, set())


@in_loop
async def test_an_engine_without_a_harmless_endpoint_needs_no_proof() -> None:
    """An engine whose endpoints have no known harmless request runs suspects without that proof."""
    parts = Parts(urls=("/v1/audio/transcriptions",))
    parts.postgres.alone = []
    await parts.turn(lambda: parts.journal.seen("taken"))
    assert parts.journal.entries == [("released",), ("taken",)]


@in_loop
async def test_who_is_alone_when_the_engine_dies_is_named() -> None:
    """When the engine dies the turn ends, only the chunk of the running suspect is held, and the next stays queued."""
    parts = Parts()
    parts.window.is_proven = True

    async def direct() -> None:
        await parts.journal.seen("asked", FIVE)
        parts.engine.die()

    await parts.turn(direct)
    assert (parts.window.died_with, parts.held.ids, parts.postgres.alone) == ({5}, [5], [6])
    await parts.suspects.bury()
    assert parts.journal.entries[-1] == ("buried", "w", INCARNATION)


@in_loop
async def test_other_work_has_its_turn_for_as_long() -> None:
    """When its time is over the turn ends, and other work gets as much time before the next turn."""
    parts = Parts()
    parts.window.is_proven = True
    assert parts.suspects.have_turn

    async def direct() -> None:
        await parts.journal.seen("asked", FIVE)
        parts.clock.now_s += TURN_S + 10
        parts.engine.answer(FIVE)

    await parts.turn(direct)
    assert (parts.postgres.alone, parts.suspects.are_waiting) == ([6], True)
    parts.clock.now_s += TURN_S + 9
    assert not parts.suspects.have_turn
    parts.clock.now_s += 1
    assert parts.suspects.have_turn
    parts.suspects.are_waiting = False
    assert not parts.suspects.have_turn


@in_loop
async def test_a_worker_that_drains_takes_no_further_suspect() -> None:
    """A draining worker finishes the suspect in the engine and claims no other."""
    parts = Parts()
    parts.window.is_proven = True

    async def direct() -> None:
        await parts.journal.seen("asked", FIVE)
        parts.window.close()
        parts.engine.answer(FIVE)

    await parts.turn(direct)
    assert (parts.postgres.alone, [one.index for one in parts.postgres.stored]) == ([6], [50])


@in_loop
async def test_nothing_runs_alone_beside_chunks_that_could_not_be_given_back() -> None:
    """If Postgres is away and chunks cannot be released, they stay held, no suspect runs, and the turn is retried."""
    parts = Parts()
    parts.window.is_proven = True
    parts.held.load(work_of(1))
    parts.postgres.away()
    await parts.turn(lambda: parts.journal.seen("refused", "release"))
    assert (parts.held.ids, list(parts.held.ready), parts.availability.is_away) == ([1], [request(10)], True)
    assert parts.suspects.have_turn


@in_loop
async def test_an_outage_of_postgres_ends_the_turn() -> None:
    """If Postgres goes away before a suspect can be claimed, the turn ends so that other work continues."""
    parts = Parts()
    parts.window.is_proven = True
    parts.postgres.refuse = lambda function, arguments: (
        DatabaseAwayError("gone") if function.__name__ == "take_alone" else None
    )
    await parts.turn(lambda: parts.journal.seen("refused", "take_alone"))
    assert parts.availability.is_away
    assert parts.journal.entries == [("released",), ("refused", "take_alone")]
