"""What Postgres knows of requests before they are in the engine."""

from typing import Any

import pytest

from service.db.availability import AvailabilityLog, DatabaseAwayError
from service.db.chunks import Holder
from service.telemetry import logs
from service.worker.held_chunks import HeldChunks
from service.worker.starter import Starter
from tests.support.engine_fakes import INCARNATION, work_of
from tests.support.loops import in_loop


class Window:
    """Keeps what starts. A window of one request."""

    size = 1

    def __init__(self) -> None:
        self.started: list[int] = []

    def start(self, one: Any) -> None:
        self.started.append(one.index)


class Postgres:
    """Answers each note with what it noted, or raises it."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)
        self.told: list[dict[int, int | None]] = []

    async def run(self, function: object, holder: object, last: dict[int, int | None]) -> Any:
        self.told.append(dict(last))
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest.mark.parametrize("first", [set(), DatabaseAwayError("gone")])
@in_loop
async def test_what_was_locked_is_noted_with_the_next_start(first: Any) -> None:
    """A chunk whose results were being written when a request of it started is noted with the next one."""
    held, window, postgres = HeldChunks(), Window(), Postgres(first, {1, 2, 3})
    availability = AvailabilityLog(logs.get("test"))
    held.load(work_of(1, 2, 3))
    starter = Starter(postgres, Holder("w", INCARNATION, 60), held, window, availability)  # type: ignore[arg-type]
    await starter.start(1)
    availability.away(DatabaseAwayError("gone"))
    await starter.start(1)
    availability.answered()
    await starter.start(1)
    assert window.started == [10, 20, 30]
    assert postgres.told == [{1: 10, 2: None, 3: None}, {1: 10, 2: 20, 3: 30}]
    assert held.begin([], 1) == {}
