"""Which worker is live. Pure: heartbeats as last read, in the gateway's monotonic time."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import grpc

from service.db.heartbeats import Phase, SeenBeat
from service.errors import (
    RECOVERY_GAVE_UP,
    WORKER_LOADING,
    WORKER_OFFLINE,
    WORKER_STALLED,
    ApiError,
    database_unavailable,
)

_LOADING = (Phase.STARTING, Phase.LOADING)
_STALLED = (Phase.STALLED, Phase.ENGINE_DEAD)


@dataclass(frozen=True)
class Freshness:
    """The heartbeats at the last successful look, and when that was.

    Ages are the database's at that look plus the time since then, so that a database that went away makes
    no worker look fresher than it is.
    """

    beats: Sequence[SeenBeat] = ()
    read_at_s: float = 0.0
    # Workers that the watchdog does not restart any more: a person is needed.
    given_up: frozenset[str] = frozenset()
    # Why the last look failed. Empty: it did not.
    failure: str = ""

    def age_s(self, seen: SeenBeat, now_s: float) -> float:
        """How old a worker's last beat is now."""
        return seen.age_s + max(0.0, now_s - self.read_at_s)


def choose(freshness: Freshness, now_s: float, timeout_s: float) -> SeenBeat:
    """The live worker with the least queued. Raises UNAVAILABLE that says why there is none and when to come back."""
    fresh = [seen for seen in freshness.beats if freshness.age_s(seen, now_s) <= timeout_s]
    ready = [seen for seen in fresh if seen.beat.phase == Phase.READY]
    if ready and not freshness.failure:
        return min(ready, key=lambda seen: (seen.beat.queued, seen.beat.worker_id))
    if freshness.failure:
        raise database_unavailable(freshness.failure)
    if not freshness.beats:
        raise _refusal(WORKER_OFFLINE, "worker offline (never seen)", {}, 15)
    hopeful = [seen for seen in freshness.beats if seen.beat.worker_id not in freshness.given_up]
    if not hopeful:
        raise _gave_up(freshness, now_s)
    fresh = [seen for seen in fresh if seen in hopeful]
    if not fresh:
        last = min(freshness.beats, key=lambda seen: freshness.age_s(seen, now_s))
        age_s = freshness.age_s(last, now_s)
        metadata = {"worker_id": last.beat.worker_id, "last_seen_s": f"{age_s:.0f}"}
        raise _refusal(WORKER_OFFLINE, f"worker offline (last seen {age_s:.0f}s ago)", metadata, 15)
    # The one that will be ready first speaks for all.
    best = min(fresh, key=lambda seen: (seen.beat.phase not in _LOADING, freshness.age_s(seen, now_s)))
    phase = best.beat.phase
    age_s = freshness.age_s(best, now_s)
    metadata = {"worker_id": best.beat.worker_id, "phase": phase, "last_seen_s": f"{age_s:.0f}"}
    if phase in _LOADING:
        raise _refusal(WORKER_LOADING, f"worker is {phase} (last seen {age_s:.0f}s ago)", metadata, 5)
    if phase in _STALLED:
        raise _refusal(WORKER_STALLED, f"worker's engine is not working: {phase}", metadata, 15)
    raise _refusal(WORKER_OFFLINE, f"worker is {phase} (last seen {age_s:.0f}s ago)", metadata, 10)


def _gave_up(freshness: Freshness, now_s: float) -> ApiError:
    last = min(freshness.beats, key=lambda seen: freshness.age_s(seen, now_s))
    age_s = freshness.age_s(last, now_s)
    message = (
        f"worker offline (last seen {age_s:.0f}s ago), and restarting it has not helped as often as is allowed:"
        " see `vllm-batch recovery events`, then `vllm-batch recovery reset`"
    )
    metadata = {"worker_id": last.beat.worker_id, "last_seen_s": f"{age_s:.0f}"}
    return _refusal(RECOVERY_GAVE_UP, message, metadata, 300)


def unreachable(seen: SeenBeat, freshness: Freshness, now_s: float, cause: str) -> ApiError:
    """What a client is told when the chosen worker cannot be reached."""
    if seen.beat.worker_id in freshness.given_up:
        return _gave_up(freshness, now_s)
    age_s = freshness.age_s(seen, now_s)
    metadata = {"worker_id": seen.beat.worker_id, "last_seen_s": f"{age_s:.0f}", "cause": cause}
    return _refusal(WORKER_OFFLINE, f"worker offline (last seen {age_s:.0f}s ago)", metadata, 5)


def _refusal(reason: str, message: str, metadata: Mapping[str, str], retry_delay_s: float) -> ApiError:
    return ApiError(grpc.StatusCode.UNAVAILABLE, message, reason, metadata, retry_delay_s)
