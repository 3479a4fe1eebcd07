"""What the worker knows of itself: identity, phase, what it serves. Written by the worker, read by all its parts."""

from collections.abc import Callable
from dataclasses import dataclass, field
from uuid import UUID

import grpc

from service import logs
from service.db.heartbeats import Phase
from service.errors import WORKER_LOADING, WORKER_OFFLINE, WORKER_STALLED, ApiError
from service.worker.intake import Offer

log = logs.get("worker")

# What a client is told, and when it may try again.
_REFUSALS = {
    Phase.STARTING: (WORKER_LOADING, "worker is starting", 5.0),
    Phase.LOADING: (WORKER_LOADING, "worker is loading its model", 5.0),
    Phase.DRAINING: (WORKER_OFFLINE, "worker is finishing its work before it ends", 10.0),
    Phase.STALLED: (WORKER_STALLED, "worker's engine does not move", 15.0),
    Phase.ENGINE_DEAD: (WORKER_STALLED, "worker's engine died", 15.0),
    Phase.STOPPING: (WORKER_OFFLINE, "worker is ending", 10.0),
}


@dataclass
class Life:
    """One life of the worker process. `on_change` is called after each change of phase, in the thread that made it."""

    worker_id: str
    incarnation: UUID
    on_change: Callable[[Phase], None]
    phase: Phase = Phase.STARTING
    offer: Offer = field(default_factory=lambda: Offer(frozenset(), frozenset()))

    def enter(self, phase: Phase) -> None:
        """Goes to another phase. Nothing leads out of ending but its end."""
        order = (Phase.DRAINING, Phase.STOPPING)
        if phase is self.phase or (self.phase in order and phase not in order[order.index(self.phase) :]):
            return
        log.info("phase_entered", phase=phase, was=self.phase)
        self.phase = phase
        self.on_change(phase)

    def accepting(self) -> Offer:
        """What is served now. Raises UNAVAILABLE with the reason when nothing is."""
        refusal = _REFUSALS.get(self.phase)
        if refusal is None:
            return self.offer
        reason, message, retry_delay_s = refusal
        metadata = {"worker_id": self.worker_id, "phase": str(self.phase)}
        raise ApiError(grpc.StatusCode.UNAVAILABLE, message, reason, metadata, retry_delay_s)
