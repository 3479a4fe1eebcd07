"""The worker's state: identity, phase, what it serves. Written by the worker, read by all its parts."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from uuid import UUID

import grpc

from service.db.heartbeats import Phase
from service.errors import WORKER_LOADING, WORKER_OFFLINE, WORKER_STALLED, ApiError
from service.telemetry import logs
from service.worker.engine.cause import Cause
from service.worker.offer import Offer

log = logs.get("worker")

# Reason, message and retry delay (seconds) of refusals, by phase.
_REFUSALS = {
    Phase.STARTING: (WORKER_LOADING, "worker is starting", 5.0),
    Phase.LOADING: (WORKER_LOADING, "worker is loading its model", 5.0),
    Phase.DRAINING: (WORKER_OFFLINE, "worker is finishing its work before it ends", 10.0),
    Phase.STALLED: (WORKER_STALLED, "worker's engine does not move", 15.0),
    Phase.ENGINE_DEAD: (WORKER_STALLED, "worker's engine died", 15.0),
    Phase.STOPPING: (WORKER_OFFLINE, "worker is ending", 10.0),
}
_DRAINED = (WORKER_OFFLINE, "worker's host is drained", 10.0)


@dataclass
class WorkerState:
    """The state of one incarnation."""

    worker_id: str
    incarnation: UUID
    phase: Phase = Phase.STARTING
    # Until the engine is loaded, what the last life served with the same settings.
    offer: Offer = field(default_factory=lambda: Offer(frozenset(), frozenset()))
    # Why the engine died or did not start, as in the heartbeat's detail; until ready, why the last incarnation failed.
    failure: dict[str, str] = field(default_factory=dict)
    # An operator ordered this host to drain.
    is_drained: bool = False
    _listeners: list[Callable[[Phase], None]] = field(default_factory=list)

    def subscribe(self, listener: Callable[[Phase], None]) -> None:
        """Calls `listener` after each change of phase, in the thread that made it."""
        self._listeners.append(listener)

    def failed(self, cause: Cause) -> None:
        """Reports the cause in the heartbeat, from the next beat on."""
        self.failure = {"cause": cause.text, "advice": cause.advice, "cause_key": cause.key}
        if cause.recurs:
            self.failure["cause_recurs"] = "true"

    def failed_before(self, failure: Mapping[str, str]) -> None:
        """Reports in the heartbeat why the previous incarnation failed, until this one is ready."""
        self.failure = {f"last_{name}": text for name, text in failure.items() if text}

    def enter(self, phase: Phase) -> None:
        """Enters a phase. From `draining` it can only go on to `stopping`, and from there nowhere."""
        order = (Phase.DRAINING, Phase.STOPPING)
        if phase is self.phase or (self.phase in order and phase not in order[order.index(self.phase) :]):
            return
        log.info("phase_entered", phase=phase, was=self.phase)
        self.phase = phase
        if phase is Phase.READY:
            self.failure = {}
        for listener in self._listeners:
            listener(phase)

    def accepting(self) -> Offer:
        """Returns what is served now. Raises UNAVAILABLE with the reason if no new work is accepted."""
        refusal = _REFUSALS.get(self.phase) or (_DRAINED if self.is_drained else None)
        if refusal is None:
            return self.offer
        reason, message, retry_delay_s = refusal
        metadata = {"worker_id": self.worker_id, "phase": str(self.phase)}
        raise ApiError(grpc.StatusCode.UNAVAILABLE, message, reason, metadata, retry_delay_s)
