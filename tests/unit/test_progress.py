"""The progress lease: what counts as progress."""

from collections.abc import Callable

from hypothesis import given
from hypothesis import strategies as st

from service.worker.progress import COMPUTING_LEASE_S, LEASE_S, MAX_LEASE_S, ProgressLease

LOOK_S = 0.5


def idle_processor() -> float:
    return 0.0


class Engine:
    """An engine that is checked twice a second."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.steps = 0
        self.lease = ProgressLease(self.now_s, moved_s=self.now_s)

    def look(self, is_busy: bool = True, processor_s: Callable[[], float | None] = idle_processor) -> bool:
        self.now_s += LOOK_S
        return self.lease.look(self.now_s, self.steps, is_busy, processor_s)

    def lasts_s(self, processor_s: Callable[[], float | None] = idle_processor) -> float:
        """How long the lease holds without a step."""
        begin_s = self.now_s
        while self.look(processor_s=processor_s):
            assert self.now_s < begin_s + 10_000
        return self.now_s - begin_s


def test_frozen_engine_loses_the_lease() -> None:
    """An engine with work that neither steps nor uses processor time loses the lease after LEASE_S."""
    engine = Engine()
    assert LEASE_S <= engine.lasts_s() <= LEASE_S + 2 * LOOK_S


def test_stopped_process_does_not_compute() -> None:
    """A stopped process, even among others that spin, counts as not computing."""
    assert Engine().lasts_s(lambda: None) <= LEASE_S + 2 * LOOK_S


def test_idle_engine_keeps_the_lease() -> None:
    """An idle engine keeps the lease indefinitely."""
    engine = Engine()
    assert all(engine.look(is_busy=False) for _ in range(1000))


def test_each_step_renews() -> None:
    """An engine that steps every few seconds keeps the lease indefinitely."""
    engine = Engine()
    for _ in range(200):
        assert all(engine.look() for _ in range(10))
        engine.steps += 1


def test_long_computation_is_no_hang() -> None:
    """An engine that uses processor time may take COMPUTING_LEASE_S for one step, and no longer."""
    engine = Engine()
    lasted_s = engine.lasts_s(lambda: engine.now_s)
    assert COMPUTING_LEASE_S <= lasted_s <= COMPUTING_LEASE_S + 2 * LOOK_S


def test_slow_steps_are_learned() -> None:
    """An engine that has taken 6 s for a step may take several times as long for the next, even without computing."""
    engine = Engine()
    for _ in range(12):
        assert engine.look()
    engine.steps += 1
    assert engine.look()
    assert engine.lasts_s() > 20


def test_one_who_was_held_up_says_nothing() -> None:
    """When the whole machine was paused for a minute, the lease is not lost because of it."""
    engine = Engine()
    assert all(engine.look() for _ in range(6))
    engine.now_s += 60
    assert engine.look()


@given(gaps=st.lists(st.floats(0.1, 2.9), min_size=1, max_size=300), computes=st.booleans())
def test_never_silent_for_longer_than_the_maximum(gaps: list[float], computes: bool) -> None:
    """Whatever happened before, an engine that no longer steps loses the lease within MAX_LEASE_S."""
    engine = Engine()
    for gap in gaps:
        engine.now_s += gap
        engine.steps += 1
        assert engine.look()
    assert engine.lasts_s(lambda: engine.now_s if computes else 0.0) <= MAX_LEASE_S + 2 * LOOK_S
