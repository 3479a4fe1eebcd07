"""Which worker is live. Pure: heartbeats as last read and what the links say, in the gateway's monotonic time."""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from enum import StrEnum

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

# When to come back where nothing better is known: in seconds.
RECOVERY_S = 15.0
LOST_S = 5.0
LOADING_S = 5.0
DRAINING_S = 10.0
# A person is needed.
GAVE_UP_S = 300.0
# The next heartbeat says more.
SOON_S = 1.0
# A watchdog that was not seen for so long is gone, and with it whoever would restart the worker.
WATCHDOG_MISSED_S = 60.0
# A worker that was not seen for so long is not waited for because of the models it had.
FORGOTTEN_S = 86_400.0


class Health(StrEnum):
    """What the link to a worker says of it."""

    UNKNOWN = "unknown"
    SERVING = "serving"
    NOT_SERVING = "not_serving"
    UNREACHABLE = "unreachable"


@dataclass(frozen=True)
class Contact:
    """The state of a link, since when (monotonic), and for `UNREACHABLE` why."""

    health: Health = Health.UNKNOWN
    since_s: float = 0.0
    cause: str = ""


@dataclass(frozen=True)
class Freshness:
    """What is known of the workers without asking anybody.

    Ages are the database's at the last successful look plus the time since then, so that a database that went away
    makes no worker look fresher than it is.
    """

    beats: Sequence[SeenBeat] = ()
    # When the heartbeats were read.
    read_at_s: float = 0.0
    # Workers that the watchdog does not restart any more: a person is needed.
    given_up: frozenset[str] = frozenset()
    # Of each worker's last successful restart, the seconds by phase.
    timings: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    # How old the last beat of each host's watchdog was when it was read.
    watchdogs: Mapping[str, float] = field(default_factory=dict)
    # Why the last look failed. Empty: it did not.
    failure: str = ""
    # The links by address.
    contacts: Mapping[str, Contact] = field(default_factory=dict)

    def age_s(self, seen: SeenBeat, now_s: float) -> float:
        """How old a worker's last beat is now."""
        return seen.age_s + max(0.0, now_s - self.read_at_s)

    def watchdog_age_s(self, seen: SeenBeat, now_s: float) -> float | None:
        """How old the last beat of the watchdog on a worker's host is now; None when it was never seen."""
        age_s = self.watchdogs.get(seen.beat.worker_id.rpartition(":")[0])
        return None if age_s is None else age_s + max(0.0, now_s - self.read_at_s)

    def contact(self, seen: SeenBeat) -> Contact:
        """What the link to a worker says."""
        return self.contacts.get(seen.beat.address, Contact())


def live(freshness: Freshness, now_s: float, timeout_s: float, models: Set[str] = frozenset()) -> Sequence[SeenBeat]:
    """The workers that a batch naming `models` may go to, the one with the least queued first.

    Live is whose heartbeat is fresh and whose link says SERVING. When a model is served by no live worker but by one
    that may come back, that one is waited for; when by none at all, every live worker will do: it refuses the batch,
    naming the line and what it serves. Raises UNAVAILABLE that says why there is none and when to come back.
    """
    if freshness.failure:
        raise database_unavailable(freshness.failure)
    serving: list[SeenBeat] = []
    away: list[SeenBeat] = []
    for seen in freshness.beats:
        is_live = freshness.age_s(seen, now_s) <= timeout_s and freshness.contact(seen).health is Health.SERVING
        (serving if is_live else away).append(seen)
    able = [seen for seen in serving if models <= set(seen.beat.models)]
    if not serving:
        raise _best_refusal(freshness, away, now_s, timeout_s)
    if not able and (hoped_for := [seen for seen in away if _may_serve(freshness, seen, now_s, models)]):
        raise _best_refusal(freshness, hoped_for, now_s, timeout_s)
    return sorted(able or serving, key=lambda seen: (seen.beat.queued, seen.beat.worker_id))


def unreachable(seen: SeenBeat, freshness: Freshness, now_s: float, cause: str, request_id: str) -> ApiError:
    """What a client is told when the chosen worker does not answer. It may have stored the batch as `request_id`."""
    if seen.beat.worker_id in freshness.given_up:
        return _gave_up(freshness, seen, now_s)
    return _lost(freshness, seen, now_s, 0.0, {"cause": cause, "request_id": request_id})


def _may_serve(freshness: Freshness, seen: SeenBeat, now_s: float, models: Set[str]) -> bool:
    """A worker says what it serves once it has loaded that."""
    if freshness.age_s(seen, now_s) > FORGOTTEN_S:
        return False
    return models <= set(seen.beat.models) or (not seen.beat.models and seen.beat.phase in _LOADING)


def _best_refusal(freshness: Freshness, beats: Sequence[SeenBeat], now_s: float, timeout_s: float) -> ApiError:
    """The worker that will be ready first speaks for all."""
    if not beats:
        return _refusal(WORKER_OFFLINE, "worker offline (never seen)", {}, RECOVERY_S)
    order = (WORKER_LOADING, WORKER_STALLED, WORKER_OFFLINE, RECOVERY_GAVE_UP)
    refusals = [(seen, _refusal_of(freshness, seen, now_s, timeout_s)) for seen in beats]
    best = min(refusals, key=lambda pair: (order.index(pair[1].reason), freshness.age_s(pair[0], now_s)))
    return best[1]


def _refusal_of(freshness: Freshness, seen: SeenBeat, now_s: float, timeout_s: float) -> ApiError:
    """Why one worker is not live."""
    if seen.beat.worker_id in freshness.given_up:
        return _gave_up(freshness, seen, now_s)
    age_s = freshness.age_s(seen, now_s)
    timings = freshness.timings.get(seen.beat.worker_id, {})
    metadata = _metadata(freshness, seen, now_s)
    if age_s > timeout_s:
        left_s = _left_s(sum(timings.values()), age_s, RECOVERY_S)
        message = f"worker offline (last seen {age_s:.0f}s ago){_unwatched(freshness, seen, now_s)}"
        return _refusal(WORKER_OFFLINE, message, metadata, left_s)
    contact, phase = freshness.contact(seen), seen.beat.phase
    for_s = max(0.0, now_s - contact.since_s)
    if contact.health is Health.UNREACHABLE:
        return _lost(freshness, seen, now_s, for_s, {"cause": contact.cause})
    if phase in _LOADING:
        life_s = seen.life_s + max(0.0, now_s - freshness.read_at_s)
        left_s = _left_s(timings.get("load", 0.0), life_s, LOADING_S)
        return _refusal(WORKER_LOADING, f"worker is {phase} (last seen {age_s:.0f}s ago)", metadata, left_s)
    if phase in _STALLED:
        left_s = _left_s(sum(timings.values()), for_s, RECOVERY_S)
        message = f"worker's engine is not working: {phase}{_unwatched(freshness, seen, now_s)}"
        return _refusal(WORKER_STALLED, message, metadata, left_s)
    if phase == Phase.READY:
        said = "has not answered yet" if contact.health is Health.UNKNOWN else "has just stopped serving"
        return _refusal(WORKER_OFFLINE, f"worker {said} (last seen {age_s:.0f}s ago)", metadata, SOON_S)
    return _refusal(WORKER_OFFLINE, f"worker is {phase} (last seen {age_s:.0f}s ago)", metadata, DRAINING_S)


def _lost(freshness: Freshness, seen: SeenBeat, now_s: float, for_s: float, more: Mapping[str, str]) -> ApiError:
    """A worker that was there until `for_s` ago."""
    left_s = _left_s(sum(freshness.timings.get(seen.beat.worker_id, {}).values()), for_s, LOST_S)
    message = f"worker offline (last seen {freshness.age_s(seen, now_s):.0f}s ago){_unwatched(freshness, seen, now_s)}"
    return _refusal(WORKER_OFFLINE, message, {**_metadata(freshness, seen, now_s), **more}, left_s)


def _gave_up(freshness: Freshness, seen: SeenBeat, now_s: float) -> ApiError:
    message = (
        f"worker offline (last seen {freshness.age_s(seen, now_s):.0f}s ago), and restarting it has not helped as often"
        " as is allowed: see `vllm-batch recovery events`, then `vllm-batch recovery reset`"
    )
    return _refusal(RECOVERY_GAVE_UP, message, _metadata(freshness, seen, now_s), GAVE_UP_S)


def _left_s(expected_s: float, passed_s: float, otherwise_s: float) -> float:
    """What is left of what took `expected_s` the last time; `otherwise_s` when it never happened or is long overdue."""
    if not expected_s or passed_s > 2 * expected_s:
        return otherwise_s
    return min(GAVE_UP_S, max(SOON_S, expected_s - passed_s))


def _unwatched(freshness: Freshness, seen: SeenBeat, now_s: float) -> str:
    """What a message says more when nobody is there to restart the worker."""
    age_s = freshness.watchdog_age_s(seen, now_s)
    if age_s is None or age_s <= WATCHDOG_MISSED_S:
        return ""
    return f"; its watchdog is gone too (last seen {age_s:.0f}s ago)"


def _metadata(freshness: Freshness, seen: SeenBeat, now_s: float) -> dict[str, str]:
    metadata = {
        "worker_id": seen.beat.worker_id,
        "phase": seen.beat.phase,
        "last_seen_s": f"{freshness.age_s(seen, now_s):.0f}",
    }
    watchdog_age_s = freshness.watchdog_age_s(seen, now_s)
    return metadata if watchdog_age_s is None else metadata | {"watchdog_last_seen_s": f"{watchdog_age_s:.0f}"}


def _refusal(reason: str, message: str, metadata: Mapping[str, str], retry_delay_s: float) -> ApiError:
    """All refusals of new work but that of a database which is away."""
    return ApiError(grpc.StatusCode.UNAVAILABLE, message, reason, metadata, retry_delay_s)
