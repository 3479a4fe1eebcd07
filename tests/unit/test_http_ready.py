"""Readiness of OpenAI's door, for which no token is needed: it costs Postgres little, whoever asks how often."""

import asyncio
from typing import Any, cast

import pytest

from service.db.availability import DatabaseAwayError
from service.http import app
from service.http.app import Ready


class Postgres:
    """Answers each question with the next of these."""

    def __init__(self, *answers: Exception | None) -> None:
        self.answers = list(answers)

    async def _answer(self) -> None:
        answer = self.answers.pop(0)
        await asyncio.sleep(0)
        if answer is not None:
            raise answer

    def read(self, *_: object) -> asyncio.Future[None]:
        return asyncio.ensure_future(self._answer())


def ready(*answers: Exception | None) -> Ready:
    return Ready(cast("Any", Postgres(*answers)))


def test_one_answer_for_all() -> None:
    """All who ask within a second share an answer, whatever it is; one who leaves takes it from nobody."""

    async def run() -> None:
        fine, away = ready(None), ready(DatabaseAwayError("away"))
        first, *others = (asyncio.create_task(fine.check()) for _ in range(50))
        await asyncio.sleep(0)
        first.cancel()
        await asyncio.gather(*others)
        await fine.check()
        for _ in range(3):
            with pytest.raises(DatabaseAwayError):
                await away.check()

    asyncio.run(run())


def test_answers_are_fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Afterwards Postgres is asked again."""
    monkeypatch.setattr(app, "READY_S", 0)

    async def run() -> None:
        asked = ready(None, DatabaseAwayError("away"), None)
        await asked.check()
        with pytest.raises(DatabaseAwayError):
            await asked.check()
        await asked.check()

    asyncio.run(run())
