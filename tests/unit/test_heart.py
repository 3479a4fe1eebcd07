"""The heart: what it could not do in one beat it does in the next."""

import uuid
from collections.abc import Collection
from typing import Any

import pytest

from service.db import chunks
from service.db.chunks import Holder
from service.worker.heart import Heart


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
