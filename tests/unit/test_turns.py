"""Pulling forward: what can be met is met, nothing is pulled forward too early, and nothing in vain."""

from hypothesis import given
from hypothesis import strategies as st

from service.turns import MARGIN, PULLED, SPARE_S, Expiring, pulled_forward

# How often the decision is made.
STEP_S = 5.0

expiring = st.builds(Expiring, st.integers(1, 10**6), st.floats(0, 1e6), st.floats(0, 1e6))
batches = st.lists(expiring, max_size=8, unique_by=lambda batch: batch.batch_id)


def test_it_waits_as_long_as_it_can() -> None:
    """With time enough a batch has its turn with the others; with little more than it needs it is pulled forward."""
    assert pulled_forward([Expiring(1, 86_400, 3600)], 0) == []
    assert pulled_forward([Expiring(1, 4800, 3600)], 0) == [1]


def test_what_is_in_flight_takes_time_too() -> None:
    """The first result of a batch comes after what the engines hold."""
    assert pulled_forward([Expiring(1, 600, 10)], 0) == []
    assert pulled_forward([Expiring(1, 600, 10)], 500) == [1]


def test_what_is_hopeless_holds_nobody_up() -> None:
    """A batch that would need twice the time that is left is not pulled forward."""
    assert pulled_forward([Expiring(1, 1000, 2000)], 0) == []


def test_the_one_with_the_least_time_left_for_what_is_left_comes_first() -> None:
    """Of two that must run now, the one that can least afford to wait runs first."""
    assert pulled_forward([Expiring(1, 2000, 400), Expiring(2, 2100, 1400)], 0) == [2, 1]


def test_windows_that_end_together_begin_in_time_for_all() -> None:
    """Each of ten batches has time enough by itself, and all of them together have not."""
    ten = [Expiring(number, 1000, 90) for number in range(10)]
    assert pulled_forward(ten[:1], 0) == []
    assert len(pulled_forward(ten, 0)) == 10


@given(batches, st.floats(0, 1e5))
def test_only_what_can_be_met(given: list[Expiring], busy_s: float) -> None:
    """Whatever is pulled forward can end in time, by the estimate and its margin, after all that ends before it."""
    pulled = pulled_forward(given, busy_s)
    assert len(pulled) == len(set(pulled))
    chosen = sorted((batch for batch in given if batch.batch_id in pulled), key=lambda batch: batch.left_s)
    total_s = busy_s
    for batch in chosen:
        total_s += batch.needs_s
        assert total_s <= batch.left_s * MARGIN * (1 + 1e-9) + 1e-6


@given(st.floats(0, 1e5), st.floats(1, 20), st.floats(0, 1e4))
def test_a_window_that_can_be_met_alone_is_met(needs_s: float, ease: float, busy_s: float) -> None:
    """However late it may begin, a batch that could end in time alone, beside one turn in ten of others, does end.

    Until it is pulled forward it gets nothing at all: the worst that the others can do to it.
    """
    batch = Expiring(1, ease * (needs_s / PULLED + busy_s + 2 * STEP_S), needs_s)
    left_s, needs_s = batch.left_s, batch.needs_s
    # Idle until pulled forward: only time passes. It is checked again every step.
    first_pull_s = max(0.0, left_s - (needs_s / PULLED + busy_s) * MARGIN - SPARE_S)
    steps = -(-first_pull_s // STEP_S) * STEP_S
    left_s -= steps
    assert pulled_forward([Expiring(1, left_s, needs_s)], busy_s) == [1]
    assert left_s >= needs_s / PULLED + busy_s
