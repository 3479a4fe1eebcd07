"""The result writer stores each result once, in groups, whatever Postgres does meanwhile."""

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any
from unittest.mock import MagicMock

import psycopg2.errors
import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from service.db import results
from service.db.availability import AvailabilityLog, DatabaseAwayError
from service.db.results import Result
from service.telemetry import logs
from service.worker import result_writer
from service.worker.result_writer import GROUP, ResultWriter
from tests.support.engine_fakes import INCARNATION, FakePostgres, Journal, result
from tests.support.loops import in_loop


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries are sent to Postgres without a pause."""
    monkeypatch.setattr(result_writer, "IDLE_S", 0)


class Parts:
    """A writer on a Postgres that the test controls. `told` is what `on_stored` was called with."""

    def __init__(self) -> None:
        self.journal = Journal()
        self.postgres = FakePostgres(self.journal)
        self.availability = AvailabilityLog(logs.get("test"))
        self.told: list[Result] = []
        self.writer = ResultWriter(self.postgres, INCARNATION, 0, self.availability, self._on_stored)  # type: ignore[arg-type]

    def _on_stored(self, stored: Sequence[Result]) -> None:
        self.told += stored
        self.journal.note("told", *(one.index for one in stored))

    @contextlib.asynccontextmanager
    async def writing(self) -> AsyncIterator[None]:
        task = asyncio.create_task(self.writer.follow())
        yield
        assert not task.done(), "the writer ended"
        task.cancel()

    async def all_stored(self) -> None:
        await self.journal.until(lambda: self.writer.unstored == 0)

    def attempts(self) -> int:
        return self.journal.entries.count(("refused", "write"))


@in_loop
async def test_what_finishes_together_is_stored_by_one_statement() -> None:
    """Results that wait at the same time are stored by one statement, in the order in which they finished."""
    parts = Parts()
    async with parts.writing():
        for index in (3, 1, 2):
            parts.writer.add(result(index))
        await parts.all_stored()
        parts.writer.add(result(4))
        await parts.all_stored()
    assert parts.journal.entries == [("stored", 3, 1, 2), ("told", 3, 1, 2), ("stored", 4), ("told", 4)]


@in_loop
async def test_no_statement_has_more_than_a_group() -> None:
    """No statement stores more than GROUP results, however many are waiting."""
    parts = Parts()
    for index in range(2 * GROUP + 10):
        parts.writer.add(result(index))
    async with parts.writing():
        await parts.all_stored()
    sizes = [len(entry) - 1 for entry in parts.journal.entries if entry[0] == "stored"]
    assert sizes == [GROUP, GROUP, 10]
    assert [one.index for one in parts.postgres.stored] == list(range(2 * GROUP + 10))


@in_loop
async def test_an_outage_of_postgres_loses_and_repeats_nothing() -> None:
    """Results that finish before or during an outage of Postgres are held and stored exactly once afterwards."""
    parts = Parts()
    parts.postgres.away()
    async with parts.writing():
        parts.writer.add(result(1))
        await parts.journal.until(lambda: parts.attempts() >= 2)
        parts.writer.add(result(2))
        assert (parts.availability.is_away, parts.writer.unstored, parts.told) == (True, 2, [])
        parts.postgres.back()
        await parts.all_stored()
    assert parts.postgres.stored == parts.told == [result(1), result(2)]
    assert not parts.availability.is_away


def refuse_index(index: int) -> Any:
    """Postgres rejects the response of one request, but accepts an error in its place."""

    def refuse(function: Any, arguments: Sequence[Any]) -> Exception | None:
        is_in = any(one.index == index and one.body is not None for one in arguments[0])
        return ValueError("cannot be encoded") if is_in else None

    return refuse


@in_loop
async def test_a_result_that_cannot_be_stored_becomes_an_error() -> None:
    """A result that Postgres rejects is stored as an error, and the rest of its group is stored unchanged."""
    parts = Parts()
    parts.postgres.refuse = refuse_index(2)
    for index in (1, 2, 3):
        parts.writer.add(result(index))
    async with parts.writing():
        await parts.all_stored()
    first, second, third = parts.postgres.stored
    assert (first, third) == (result(1), result(3))
    assert (second.index, second.custom_id, second.error_code) == (2, "c2", "RESULT_NOT_STORABLE")
    assert (second.body, second.error_message) == (None, "Postgres refused the result: ValueError")
    assert parts.told == parts.postgres.stored


def raised_by_a_trigger() -> DatabaseAwayError:
    """The error of a call that a trigger of others has refused."""

    class Raised(psycopg2.errors.RaiseException):
        pgcode = "P0001"

    away = DatabaseAwayError("not wanted")
    away.__cause__ = Raised("not wanted")
    return away


@in_loop
async def test_a_row_that_a_trigger_refuses_holds_up_no_other() -> None:
    """A result that a trigger of others refuses waits, however many come after it; all are stored, each once."""
    parts = Parts()
    parts.postgres.refuse = lambda function, arguments: (
        raised_by_a_trigger() if any(one.index == 2 for one in arguments[0]) else None
    )
    for index in (1, 2, 3):
        parts.writer.add(result(index))
    async with parts.writing():
        await parts.journal.until(lambda: len(parts.postgres.stored) == 2)
        parts.writer.add(result(4))
        await parts.journal.until(lambda: len(parts.postgres.stored) == 3)
        assert [one.index for one in parts.postgres.stored] == [1, 3, 4]
        assert parts.writer.refused == {"batches": {"1": "not wanted"}}
        parts.postgres.back()
        await parts.all_stored()
    assert parts.writer.refused == {}
    assert parts.postgres.stored == parts.told == [result(1), result(3), result(4), result(2)]


@in_loop
async def test_no_statement_has_more_characters_than_postgres_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """No statement exceeds the size that Postgres accepts: beyond that it would drop the connection at every retry."""
    monkeypatch.setattr(result_writer, "GROUP_CHARS", 100)
    parts = Parts()
    for index, size in enumerate([50, 50, 1, 101, 500, 99, 1, 1, 100, 30]):
        parts.writer.add(replace(result(index), body="x" * size))
    async with parts.writing():
        await parts.all_stored()
    assert [entry[1:] for entry in parts.journal.entries if entry[0] == "stored"] == [
        (0, 1),
        (2,),
        (3,),
        (4,),
        (5, 6),
        (7,),
        (8,),
        (9,),
    ]


@given(st.lists(st.integers(0, 12), max_size=30))
def test_results_of_any_size_are_grouped(sizes: list[int]) -> None:
    """Groups are as large as a statement may be, in order, and leave no result out; a larger result is alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(result_writer, "GROUP_CHARS", 10)
        patch.setattr(result_writer, "GROUP", 4)
        left = deque(replace(result(index), body="x" * size) for index, size in enumerate(sizes))
        groups = []
        while left:
            groups.append(result_writer._first_group(left))
            for _ in groups[-1]:
                left.popleft()
    lengths = [[len(one.body or "") for one in group] for group in groups]
    assert [length for group in lengths for length in group] == sizes
    assert all(len(group) <= 4 and (len(group) == 1 or sum(group) <= 10) for group in lengths)
    for group, after in pairwise(lengths):
        assert len(group) == 4 or sum(group) + after[0] > 10


@pytest.mark.parametrize(("letter", "width"), [("x", 1), ("ä", 2), ("\u2028", 3), ("😀", 4)])
@in_loop
async def test_a_result_beyond_the_limit_is_an_error_with_limit_and_size(
    monkeypatch: pytest.MonkeyPatch, letter: str, width: int
) -> None:
    """The limit counts bytes, as Postgres does, and the largest response that fits is stored unchanged."""
    monkeypatch.setattr(results, "MAX_BODY_BYTES", 120)
    parts = Parts()
    fits, too_large = letter * (120 // width), letter * (120 // width) + "x"
    parts.writer.add(replace(result(1), body=fits))
    parts.writer.add(replace(result(2), body=too_large))
    async with parts.writing():
        await parts.all_stored()
    first, second = parts.postgres.stored
    assert first == replace(result(1), body=fits)
    assert (second.index, second.custom_id, second.error_code) == (2, "c2", "RESULT_TOO_LARGE")
    assert (second.status_code, second.body) == (None, None)
    assert second.error_message == "its response has 121 bytes, at most 120 can be stored"


@in_loop
async def test_an_outage_amid_a_refused_group_loses_and_repeats_nothing() -> None:
    """An outage while a rejected group is stored one by one loses and repeats nothing."""
    parts = Parts()
    refuse = refuse_index(2)

    def go_away(function: Any, arguments: Sequence[Any]) -> Exception | None:
        return DatabaseAwayError("gone") if parts.postgres.stored else refuse(function, arguments)

    parts.postgres.refuse = go_away
    for index in (1, 2, 3):
        parts.writer.add(result(index))
    async with parts.writing():
        await parts.journal.until(lambda: parts.availability.is_away)
        assert (parts.told, parts.writer.unstored) == ([result(1)], 2)
        parts.postgres.refuse = refuse
        await parts.all_stored()
    assert [one.index for one in parts.postgres.stored] == [1, 2, 3]
    assert parts.told == parts.postgres.stored


@in_loop
async def test_a_postgres_that_refuses_all_is_waited_for() -> None:
    """If Postgres refuses even the error, for example because it is read-only, results are held as in an outage, and
    that is logged once."""
    parts = Parts()
    parts.postgres.refuse = lambda function, arguments: ValueError("read-only")
    parts.writer.add(result(1))
    with capture_logs() as events:
        async with parts.writing():
            await parts.journal.until(lambda: parts.attempts() >= 6)
            assert (parts.availability.is_away, parts.writer.unstored) == (True, 1)
            refused = {"cause": "ValueError, with more in the log"}
            assert (parts.writer.are_held_up, parts.writer.refused) == (True, refused)
            parts.postgres.back()
            await parts.all_stored()
    assert parts.postgres.stored == [result(1)]
    assert (parts.writer.are_held_up, parts.writer.refused) == (True, {})
    assert [event["event"] for event in events] == ["result_group_refused", "database_refused", "database_back"]


class SecondAttempt:
    """Postgres as `execute_values` meets it: so many attempts wait for one that stores the same results first."""

    def __init__(self, conflicts: int) -> None:
        self.conflicts = conflicts
        self.groups: list[Sequence[Any]] = []

    def __call__(self, cursor: object, sql: str, rows: Sequence[Any], **more: object) -> Sequence[Any]:
        assert "ON CONFLICT" not in sql
        self.groups.append(rows)
        if len(self.groups) <= self.conflicts:
            raise psycopg2.errors.UniqueViolation
        return rows


@pytest.mark.parametrize(
    ("in_transaction", "conflicts", "attempts"), [(False, 0, 1), (False, 2, 3), (False, 3, 3), (True, 1, 1)]
)
def test_what_was_stored_meanwhile_is_looked_at_again(
    monkeypatch: pytest.MonkeyPatch, in_transaction: bool, conflicts: int, attempts: int
) -> None:
    """A statement that met results it could not see is sent again whole, so that it leaves no gap in the sequence."""
    postgres, database = SecondAttempt(conflicts), MagicMock()
    monkeypatch.setattr(results, "execute_values", postgres)
    database.in_transaction.return_value = in_transaction
    with pytest.raises(psycopg2.errors.UniqueViolation) if conflicts >= attempts else contextlib.nullcontext():
        assert results.write(database, [result(1), result(2)], INCARNATION) == 2
    assert len(postgres.groups) == attempts
    assert all(group == postgres.groups[0] for group in postgres.groups)


def test_two_results_of_a_request_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that ran twice, under a lease that was lost and had again, has one result in a group."""
    postgres, database = SecondAttempt(0), MagicMock()
    monkeypatch.setattr(results, "execute_values", postgres)
    assert results.write(database, [result(1), result(2), result(1), result(1, 2)], INCARNATION) == 3
    assert [row[:3] for row in postgres.groups[0]] == [(1, 1, 1), (1, 1, 2), (2, 1, 1)]
