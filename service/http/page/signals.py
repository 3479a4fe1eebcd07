"""Both signals of each worker over the last minutes, as this process sees them: health by a link, and heartbeat."""

import asyncio
from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

from service.clock import Clock
from service.insight.presence import Presence

INTERVAL_S = 2.0
KEPT_S = 900.0


class Sample(NamedTuple):
    """What a worker's signals said at one moment, in seconds since 1970."""

    at_s: float
    age_s: float
    health: str
    phase: str


@dataclass
class Signals:
    """Forgets workers that are gone once their samples are too old."""

    presence: Presence
    clock: Clock
    samples: dict[str, deque[Sample]] = field(default_factory=dict)

    async def follow(self) -> None:
        """For ever."""
        while True:
            self.take()
            await asyncio.sleep(INTERVAL_S)

    def take(self) -> None:
        """Adds a sample of each worker."""
        now, now_s, at_s = self.presence.now(), self.clock.monotonic(), self.clock.now().timestamp()
        for seen in now.beats:
            mine = self.samples.setdefault(seen.beat.worker_id, deque(maxlen=round(KEPT_S / INTERVAL_S)))
            mine.append(
                Sample(round(at_s, 1), round(now.age_s(seen, now_s), 1), str(now.contact(seen).health), seen.beat.phase)
            )
        for worker_id in [each for each, mine in self.samples.items() if mine[-1].at_s < at_s - KEPT_S]:
            del self.samples[worker_id]
