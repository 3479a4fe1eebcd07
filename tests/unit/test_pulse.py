"""What the heartbeat says of a worker whose main loop does not go on."""

import asyncio
from datetime import UTC, datetime
from uuid import UUID

from service.db.heartbeats import Phase
from service.worker.life import Life
from service.worker.pulse import Pulse


class StandingClock:
    """A clock that the test moves."""

    now_s = 100.0

    def monotonic(self) -> float:
        return self.now_s

    def now(self) -> datetime:
        return datetime(2026, 1, 1, tzinfo=UTC)


def test_blocked_loop_is_stalled() -> None:
    """A ready worker is `stalled` once its main loop has not looked for seconds, and ready when it goes on."""
    clock, life = StandingClock(), Life("worker", UUID(int=1), lambda _: None)
    pulse = Pulse(life, clock, lambda: 0, lambda: 0, asyncio.Future)
    life.enter(Phase.LOADING)
    clock.now_s += 60
    assert pulse.phase() is Phase.LOADING, "loading may take its time"
    pulse.begin()
    life.enter(Phase.READY)
    clock.now_s += 2
    assert pulse.phase() is Phase.READY
    clock.now_s += 2
    assert pulse.phase() is Phase.STALLED
    assert life.phase is Phase.READY
    pulse.look()
    assert pulse.phase() is Phase.READY
