"""What the heartbeat reports for a worker whose main loop is blocked, and what an idle engine is asked."""

import asyncio
from datetime import UTC, datetime
from uuid import UUID

from service.db.heartbeats import Phase
from service.worker.pulse import CANARY_INTERVAL_S, Pulse
from service.worker.state import WorkerState


class StandingClock:
    """A clock that the test moves."""

    now_s = 100.0

    def monotonic(self) -> float:
        return self.now_s

    def now(self) -> datetime:
        return datetime(2026, 1, 1, tzinfo=UTC)


def test_blocked_loop_is_stalled() -> None:
    """A ready worker whose main loop is blocked for seconds reports `stalled`, and `ready` once the loop runs again."""
    clock, state = StandingClock(), WorkerState("worker", UUID(int=1))
    pulse = Pulse(state, clock, lambda: 0, lambda: 0, asyncio.Future)
    state.enter(Phase.LOADING)
    clock.now_s += 60
    assert pulse.phase() is Phase.LOADING, "loading may take its time"
    pulse.begin()
    state.enter(Phase.READY)
    clock.now_s += 2
    assert pulse.phase() is Phase.READY
    clock.now_s += 2
    assert pulse.phase() is Phase.STALLED
    assert state.phase is Phase.READY
    pulse.look()
    assert pulse.phase() is Phase.READY


def test_canary_ends_with_the_pulse() -> None:
    """A canary that runs when the worker is stopped is aborted: it would take the engine's end for a death."""
    clock, state = StandingClock(), WorkerState("worker", UUID(int=1))

    async def stopped() -> "asyncio.Future[None]":
        canary: asyncio.Future[None] = asyncio.Future()
        pulse = Pulse(state, clock, lambda: 0, lambda: 0, lambda: canary)
        state.enter(Phase.READY)
        clock.now_s += CANARY_INTERVAL_S
        pulse.look()
        following = asyncio.create_task(pulse.follow())
        await asyncio.sleep(0)
        following.cancel()
        await asyncio.wait({following})
        return canary

    assert asyncio.run(stopped()).cancelled()
