"""How often a file is checked: what counts as an attempt, and what is only an answer that was lost."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from service.db import file_batches, files
from service.db.availability import DatabaseAwayError
from service.db.connection import Database
from service.db.file_batches import MAX_ATTEMPTS, Spec
from service.db.heartbeats import Phase
from service.db.limits import Limits
from service.worker import checking
from service.worker.checking import Checking
from service.worker.intake import Intake
from service.worker.state import WorkerState
from tests.support.loops import in_loop
from tests.support.store import OFFER, SIZES, holder, line

LIMITS = Limits(100, 10_000)


class Cut:
    """Connections to a real database. The answers of `lost` are lost after it has done what was asked."""

    def __init__(self, database: Database, *lost: Callable[..., object]) -> None:
        self.database = database
        self.lost = lost
        self.left = 2 * MAX_ATTEMPTS

    def run(self, *called: Any, **named: Any) -> asyncio.Future[Any]:
        return asyncio.ensure_future(self._run(*called, **named))

    async def _run(self, function: Callable[..., Any], *given: Any, **named: Any) -> Any:
        found = await self.database.run(function, *given, **named)
        if function in self.lost and self.left:
            self.left -= 1
            raise DatabaseAwayError("the connection was cut")
        return found


class Away(Cut):
    """Connections to a database that is not there for what is `lost`."""

    async def _run(self, function: Callable[..., Any], *given: Any, **named: Any) -> Any:
        if function in self.lost and self.left:
            self.left -= 1
            raise DatabaseAwayError("Postgres does not answer")
        return await self.database.run(function, *given, **named)


@pytest.fixture
def batch_id(database: Database) -> int:
    """A batch of three requests, to be checked."""
    file_id, part_id = database.call(files.begin, "default", LIMITS)
    content = b"".join(map(line, range(3)))
    database.call(files.add_piece, part_id, 0, content)
    database.call(files.finish, file_id, part_id, "in.jsonl", len(content), None, LIMITS)
    spec = Spec("default", None, "", file_id, "/v1/chat/completions", "24h", 86_400, {}, None, (), "call", None)
    made = database.call(file_batches.create, spec, LIMITS, False)
    assert made is not None
    return made[0].batch.id


def worker(database: Any) -> Checking:
    """A worker that is ready."""
    mine = holder()
    state = WorkerState(mine.worker_id, mine.incarnation, Phase.READY, OFFER)
    return Checking(database, Intake(database, SIZES, LIMITS), mine, state, lambda: None)


def state_of(database: Database, batch_id: int) -> str:
    found = database.call(file_batches.get, batch_id)
    assert found is not None
    return found.batch.state


async def checked(database: Database, batch_id: int, checking: Checking, most: int) -> str:
    """The state of the batch after it has been looked for, up to so often."""
    for _ in range(most):
        await checking._once()
        if (state := state_of(database, batch_id)) != "validating":
            return state
        # What waits for a while is due.
        await database.run(lambda db: db.execute_sql("UPDATE file_batches SET lease_until = now()"))
    return "validating"


@in_loop
async def test_a_lost_answer_is_no_attempt(database: Database, batch_id: int) -> None:
    """However many claims succeed without the worker learning of it, the next one checks the file at once."""
    cut = Cut(database, file_batches.claim)
    assert await checked(database, batch_id, worker(cut), cut.left + 1) == "in_progress"


@in_loop
async def test_an_outage_is_no_attempt(database: Database, batch_id: int) -> None:
    """A check that an outage ends, in which the worker cannot give the batch back either, counts as none."""
    away = Away(database, file_batches.begin, file_batches.release)
    assert await checked(database, batch_id, worker(away), away.left) == "in_progress"


@in_loop
async def test_faults_and_deaths_are_attempts(
    database: Database, batch_id: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file whose checks end with their worker, or with an error that nobody knows, is given up after some."""
    monkeypatch.setattr(checking, "fill", None)
    assert await checked(database, batch_id, worker(database), MAX_ATTEMPTS - 1) == "validating"
    # Which dies, and the next life finds it.
    assert await database.run(file_batches.claim, holder(), ["tiny"])
    assert await checked(database, batch_id, worker(database), 1) == "failed"
