"""When a worker looks for batches whose files are to be checked."""

import asyncio
from typing import Any
from uuid import uuid4

import pytest

from service.db.heartbeats import Phase
from service.worker import checking
from service.worker.checking import Checking
from service.worker.state import WorkerState
from tests.support.loops import in_loop


class Database:
    """Has nothing to check, and counts who asks."""

    def __init__(self) -> None:
        self.looks = asyncio.Semaphore(0)

    async def run(self, *_: Any) -> None:
        self.looks.release()


@pytest.fixture(autouse=True)
def _seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checking, "LOOK_INTERVAL_S", 3600)


@in_loop
async def test_a_notice_ends_the_wait() -> None:
    """A batch that was made of a file is looked for at once, not at the next look; each notice counts."""
    database, state = Database(), WorkerState("worker", uuid4())
    state.enter(Phase.READY)
    made = Checking(database, None, None, state, lambda: None)  # type: ignore[arg-type]
    following = asyncio.create_task(made.follow())
    await database.looks.acquire()
    for _ in range(3):
        made.look()
        await database.looks.acquire()
    following.cancel()
