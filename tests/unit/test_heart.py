"""The heart: what it could not do in one beat it does in the next."""

import threading
import uuid
from collections.abc import Collection
from typing import Any
from unittest.mock import MagicMock

import pytest
from structlog.testing import capture_logs

from service.db import chunks
from service.db.availability import DatabaseAwayError
from service.db.chunks import Holder
from service.worker.heart import Heart, IdentityTakenError


def test_chunks_that_are_locked_are_deleted_with_a_later_beat(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lost chunks whose results are being written are tried again with each beat until they are gone."""
    nothing: Any = None
    heart = Heart(nothing, Holder("host:worker", uuid.uuid4(), 60), 1, 1, nothing, nothing, nothing, nothing)
    locked, tried = {2, 3}, []

    def drop(_: object, __: Holder, ids: Collection[int]) -> set[int]:
        tried.append(set(ids))
        return set(ids) & locked

    monkeypatch.setattr(chunks, "drop_cancelled", drop)
    heart._drop()
    heart._undropped.update([1, 2, 3])
    heart._drop()
    locked.discard(2)
    heart._undropped.update([4])
    heart._drop()
    locked.clear()
    heart._drop()
    heart._drop()
    assert tried == [{1, 2, 3}, {2, 3, 4}, {3}]


def beating(monkeypatch: pytest.MonkeyPatch, *outcomes: Exception) -> Heart:
    """A heart whose first beats end so; the next one takes the name."""
    monkeypatch.setattr("service.worker.heart.LOOK_INTERVAL_S", 0.01)
    left = list(outcomes)
    heart = Heart(MagicMock(), Holder("host:worker", uuid.uuid4(), 60), 0.01, 1, *[MagicMock() for _ in range(4)])

    def once(_: object) -> None:
        if left:
            raise left.pop(0)
        heart._refusal = ""
        heart._settled.set()

    monkeypatch.setattr(heart, "_once", once)
    heart.start()
    return heart


def test_the_name_is_waited_for_as_long_as_postgres_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time for which another process may keep the name does not run while Postgres is away."""
    away, taken = DatabaseAwayError("refused"), IdentityTakenError("another process runs as host:worker")
    heart = beating(monkeypatch, *[away] * 5)
    heart.wait_for_identity(0)
    heart.stop(10)
    heart = beating(monkeypatch, taken, away)
    heart.wait_for_identity(60)
    assert heart._taken is None
    heart.stop(10)
    heart = beating(monkeypatch, away, *[taken] * 100_000)
    with pytest.raises(IdentityTakenError, match="another process runs"):
        heart.wait_for_identity(0)
    heart.stop(10)


def test_a_beat_that_is_refused_again_and_again_is_logged_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its traceback is logged with the first, and the end once one is taken."""
    with capture_logs() as events:
        heart = beating(monkeypatch, *[RuntimeError("refused")] * 5)
        heart.wait_for_identity(0)
        heart.stop(10)
    assert [event["event"] for event in events] == ["beat_failed", "database_refused", "database_back"]


def test_a_rest_that_fails_stops_no_beats(monkeypatch: pytest.MonkeyPatch) -> None:
    """When something that the heart hears between beats raises an error, it beats on and can be stopped."""
    heart = beating(monkeypatch)
    heard, beats = MagicMock(side_effect=RuntimeError("a fault of ours")), threading.Semaphore(0)
    monkeypatch.setattr(heart, "on_notice", heard)
    monkeypatch.setattr(heart, "_once", lambda _: beats.release())
    monkeypatch.setattr(heart._ear, "wait", lambda *_: (False, ["a notice"]))
    for _ in range(3):
        assert beats.acquire(timeout=10)
    assert heard.called
    heart.stop(10)
    assert heart._thread is not None
    assert not heart._thread.is_alive()
