"""Requests that wait for the engine: batches take turns, and nothing is lost."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.db.chunks import Request
from service.worker.ready import Ready


def request(batch: int, index: int, chunk: int = 0) -> Request:
    return Request(chunk, batch, index, f"c{index}", "/v1/chat/completions", "{}")


def test_a_small_batch_does_not_wait_for_the_chunk_of_another() -> None:
    """A request that comes last is the second to leave when all before it are another batch's."""
    ready = Ready()
    ready.extend(request(1, index) for index in range(100))
    ready.extend([request(2, 0)])
    assert [ready.popleft().batch_id for _ in range(3)] == [1, 2, 1]


def test_nothing_is_ready() -> None:
    """Who asks without looking hears of it."""
    with pytest.raises(IndexError):
        Ready().popleft()


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 3)), max_size=30), st.sets(st.integers(1, 3)))
def test_each_request_leaves_once_in_the_order_of_its_batch(given: list[tuple[int, int]], dropped: set[int]) -> None:
    """Whatever comes and is dropped, the others leave once, in their order, and no batch twice while another waits."""
    ready = Ready()
    requests = [request(batch, index, chunk) for index, (batch, chunk) in enumerate(given)]
    ready.extend(requests)
    ready.drop(dropped)
    kept = [each for each in requests if each.chunk_id not in dropped]
    assert len(ready) == len(kept) == len(list(ready))
    left = [ready.popleft() for _ in kept]
    assert not ready
    for batch in {each.batch_id for each in kept}:
        assert [each for each in left if each.batch_id == batch] == [each for each in kept if each.batch_id == batch]
    for place, (before, after) in enumerate(pairwise(left), 1):
        others = {each.batch_id for each in left[place:]} - {before.batch_id}
        assert before.batch_id != after.batch_id or not others
