"""Which workers are live. Pure: judges the heartbeats as last read and the links, in the gateway's monotonic time."""

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from enum import StrEnum

import grpc

from service.db import heartbeats, losses
from service.db.chunks import host_of
from service.db.heartbeats import Phase, SeenBeat
from service.db.recoveries import Pause
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

# Retry delays where nothing better is known.
RECOVERY_S = 15.0
LOST_S = 5.0
LOADING_S = 5.0
DRAINING_S = 10.0
# Somebody has to act first.
GAVE_UP_S = 300.0
# The next heartbeat tells more.
SOON_S = 1.0
# A watchdog that was not seen for this long is gone: nothing restarts the worker.
WATCHDOG_MISSED_S = 60.0
# A worker that was not seen for this long is not waited for: not to load just any model, nor by name.
FORGOTTEN_S = 86_400.0


class LinkState(StrEnum):
    """The state of the link to a worker."""

    UNKNOWN = "unknown"
    SERVING = "serving"
    NOT_SERVING = "not_serving"
    UNREACHABLE = "unreachable"


@dataclass(frozen=True)
class Contact:
    """The state of a link, when it began (monotonic), and for `UNREACHABLE` the cause."""

    health: LinkState = LinkState.UNKNOWN
    since_s: float = 0.0
    cause: str = ""


@dataclass(frozen=True)
class Freshness:
    """What is known about the workers without a call or a query.

    Ages are those that the database reported at the last successful read plus the time since, so that no worker looks
    fresher than it is while the database is away.
    """

    beats: Sequence[SeenBeat] = ()
    # When the heartbeats were read.
    read_at_s: float = 0.0
    # Workers that the watchdog no longer restarts: somebody has to act.
    given_up: frozenset[str] = frozenset()
    # Workers that it does not restart for now, because an operator paused that.
    paused: Mapping[str, Pause] = field(default_factory=dict)
    # Seconds by phase of each worker's last successful restart.
    timings: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    # Why the last read failed; empty if it succeeded.
    failure: str = ""
    # The links by address.
    contacts: Mapping[str, Contact] = field(default_factory=dict)
    # Models that batches in progress wait for.
    awaited: Set[str] = frozenset()
    # Workers of other hosts that announce an address at which only their own host reaches them.
    unreachable: Sequence[SeenBeat] = ()

    def age_s(self, seen: SeenBeat, now_s: float) -> float:
        """The present age of a worker's last heartbeat."""
        return seen.age_s + max(0.0, now_s - self.read_at_s)

    def watchdog_age_s(self, seen: SeenBeat, now_s: float) -> float | None:
        """The present age of the last heartbeat of the watchdog on a worker's host; None if there was none."""
        age_s = seen.watchdog_age_s
        return None if age_s is None else age_s + max(0.0, now_s - self.read_at_s)

    def contact(self, seen: SeenBeat) -> Contact:
        """The state of the link to a worker."""
        return self.contacts.get(seen.beat.address, Contact())

    def is_missed(self, seen: SeenBeat, now_s: float) -> bool:
        """True if heartbeats of the worker are missing: perhaps it does not reach the database."""
        return self.age_s(seen, now_s) > losses.silence_s(seen.beat.detail)


@dataclass(frozen=True)
class Load:
    """What this gateway has forwarded to a worker: the calls under way, and when the last one began (monotonic)."""

    in_flight: int = 0
    last_s: float = float("-inf")


def spread(
    workers: Sequence[SeenBeat],
    freshness: Freshness,
    now_s: float,
    loads: Mapping[str, Load],
    draw: Callable[[], float],
    models: Set[str] = frozenset(),
) -> Sequence[SeenBeat]:
    """The workers in the order in which to try them: those that serve all of the models, then some, then none.

    Among these, those whose heartbeats are missing come last. First comes the one with the fewest calls of this gateway
    under way, of several the one that had none for longest, and among equals by chance: gateways do not know of each
    other, and all begin alike. Queues do not count: what is stored is claimed by whoever has room, and heartbeats tell
    their length too late.
    """

    def place(seen: SeenBeat) -> tuple[int, bool, int, float, float]:
        load = loads.get(seen.beat.worker_id, Load())
        return _misfit(seen, models), freshness.is_missed(seen, now_s), load.in_flight, load.last_s, draw()

    return sorted(workers, key=place)


def live(
    freshness: Freshness, now_s: float, timeout_s: float, models: Set[str] = frozenset(), are_all: bool = False
) -> Sequence[SeenBeat]:
    """The workers that may take a batch naming `models`. `spread` puts them in order.

    A worker is live if its heartbeat is fresh and its link is SERVING. Any of them will do: it checks all lines, and
    knows of the models of others. If these are all the models that the batch names, no live worker serves one, and each
    may come back, then the client has to retry. Raises UNAVAILABLE with the reason and when to retry.
    """
    if freshness.failure:
        raise database_unavailable(freshness.failure)
    serving: list[SeenBeat] = []
    away: list[SeenBeat] = []
    for seen in freshness.beats:
        is_live = freshness.age_s(seen, now_s) <= timeout_s and freshness.contact(seen).health is LinkState.SERVING
        (serving if is_live and not seen.is_drained else away).append(seen)
    # They run what others store.
    elsewhere = [seen for seen in freshness.unreachable if freshness.age_s(seen, now_s) <= timeout_s]
    if not serving:
        raise _best_refusal(freshness, away, now_s, timeout_s, elsewhere)
    if are_all and models and not any(models & set(seen.beat.models) for seen in (*serving, *elsewhere)):
        hopes = {model: [seen for seen in away if _may_serve(freshness, seen, now_s, model)] for model in models}
        if all(hopes[model] or model in freshness.awaited for model in models):
            hoped_for = [seen for found in hopes.values() for seen in found]
            raise _nobody_serves(freshness, models, hoped_for, now_s, timeout_s)
    return serving


def unreachable(seen: SeenBeat, freshness: Freshness, now_s: float, cause: str, request_id: str) -> ApiError:
    """UNAVAILABLE for a chosen worker that does not answer. It may have stored the batch as `request_id`."""
    if seen.beat.worker_id in freshness.given_up:
        return _gave_up(freshness, seen, now_s)
    return _lost(freshness, seen, now_s, 0.0, {"cause": cause, "request_id": request_id})


def _misfit(seen: SeenBeat, models: Set[str]) -> int:
    """0 if the worker serves all the models, 1 if some, 2 if none."""
    served = models & set(seen.beat.models)
    return 0 if served == models else 1 if served else 2


def _may_serve(freshness: Freshness, seen: SeenBeat, now_s: float, model: str) -> bool:
    """True if the worker may serve the model once it is back. Without models it has not served yet."""
    if seen.beat.models:
        return model in seen.beat.models
    return seen.beat.phase in _LOADING and freshness.age_s(seen, now_s) <= FORGOTTEN_S


def _nobody_serves(
    freshness: Freshness, models: Set[str], hoped_for: Sequence[SeenBeat], now_s: float, timeout_s: float
) -> ApiError:
    """The refusal of a batch for models that only workers which are away serve, or that others wait for, too."""
    names = ", ".join(sorted(models))
    if not hoped_for:
        message = f"no worker serves {names} now, and batches in progress wait for one that does"
        return _refusal(WORKER_OFFLINE, message, {"models": names}, RECOVERY_S)
    best = _best_refusal(freshness, hoped_for, now_s, timeout_s)
    message = f"no worker serves {names} now: {best.message}"
    return _refusal(best.reason, message, {**best.metadata, "models": names}, best.retry_delay_s or RECOVERY_S)


def _best_refusal(
    freshness: Freshness,
    beats: Sequence[SeenBeat],
    now_s: float,
    timeout_s: float,
    unreachable: Sequence[SeenBeat] = (),
) -> ApiError:
    """The refusal of the worker that is likely to be ready first."""
    order = (WORKER_LOADING, WORKER_STALLED, WORKER_OFFLINE, RECOVERY_GAVE_UP)
    refusals = [(seen, _refusal_of(freshness, seen, now_s, timeout_s)) for seen in beats]
    refusals += [(seen, _not_reachable(freshness, seen, now_s)) for seen in unreachable]
    if not refusals:
        return _refusal(WORKER_OFFLINE, "worker offline (never seen)", {}, RECOVERY_S)
    best = min(refusals, key=lambda pair: (order.index(pair[1].reason), freshness.age_s(pair[0], now_s)))
    return best[1]


def _not_reachable(freshness: Freshness, seen: SeenBeat, now_s: float) -> ApiError:
    """The refusal of a worker that works, but cannot be called from here."""
    message = (
        f"worker {seen.beat.worker_id} announces {seen.beat.address}, at which only its own host reaches it:"
        " correct BATCH_HOST there"
    )
    return _refusal(WORKER_OFFLINE, message, _metadata(freshness, seen, now_s), GAVE_UP_S)


def _refusal_of(freshness: Freshness, seen: SeenBeat, now_s: float, timeout_s: float) -> ApiError:
    """Why one worker is not live."""
    age_s = freshness.age_s(seen, now_s)
    # Somebody has started it since: whether that helps is not known yet.
    is_tried_again = age_s <= timeout_s and seen.beat.phase in _LOADING
    if seen.beat.worker_id in freshness.given_up and not is_tried_again:
        return _gave_up(freshness, seen, now_s)
    timings = freshness.timings.get(seen.beat.worker_id, {})
    metadata = _metadata(freshness, seen, now_s)
    if age_s > timeout_s:
        left_s = _left_s(sum(timings.values()), age_s, RECOVERY_S)
        message = f"worker offline (last seen {age_s:.0f}s ago){_why(seen)}{_unwatched(freshness, seen, now_s)}"
        if freshness.contact(seen).health is LinkState.SERVING and not has_successor(freshness, seen):
            message = (
                f"worker {seen.beat.worker_id} works, but has not written its heartbeat to Postgres for {age_s:.0f}s:"
                " see `database_away` in its log"
            )
        return _refusal(WORKER_OFFLINE, message, metadata, left_s)
    contact, phase = freshness.contact(seen), seen.beat.phase
    for_s = max(0.0, now_s - contact.since_s)
    if contact.health is LinkState.UNREACHABLE:
        return _lost(freshness, seen, now_s, for_s, {"cause": contact.cause})
    if phase in _LOADING:
        life_s = seen.life_s + max(0.0, now_s - freshness.read_at_s)
        left_s = _left_s(timings.get("load", 0.0), life_s, LOADING_S)
        message = f"worker is {phase} (last seen {age_s:.0f}s ago){_why(seen)}"
        return _refusal(WORKER_LOADING, message, metadata, left_s)
    if phase in _STALLED:
        left_s = _left_s(sum(timings.values()), for_s, RECOVERY_S)
        message = f"worker's engine is not working: {phase}{_why(seen)}{_unwatched(freshness, seen, now_s)}"
        return _refusal(WORKER_STALLED, message, metadata, left_s)
    if seen.is_drained:
        host = host_of(seen.beat.worker_id)
        message = f"worker's host is drained: `vllm-batch hosts resume {host}` gives it work again"
        return _refusal(WORKER_OFFLINE, message, metadata, DRAINING_S)
    if phase == Phase.READY:
        said = "has not answered yet" if contact.health is LinkState.UNKNOWN else "has just stopped serving"
        return _refusal(WORKER_OFFLINE, f"worker {said} (last seen {age_s:.0f}s ago)", metadata, SOON_S)
    return _refusal(WORKER_OFFLINE, f"worker is {phase} (last seen {age_s:.0f}s ago){_why(seen)}", metadata, DRAINING_S)


def has_successor(freshness: Freshness, seen: SeenBeat) -> bool:
    """True if the link to its address reaches another worker, which was seen later."""
    return any(each.beat.address == seen.beat.address and each.age_s < seen.age_s for each in freshness.beats)


def _lost(freshness: Freshness, seen: SeenBeat, now_s: float, for_s: float, more: Mapping[str, str]) -> ApiError:
    """The refusal of a worker whose link was lost `for_s` ago."""
    left_s = _left_s(sum(freshness.timings.get(seen.beat.worker_id, {}).values()), for_s, LOST_S)
    more_s = f"{_why(seen)}{_unwatched(freshness, seen, now_s)}"
    message = f"worker offline (last seen {freshness.age_s(seen, now_s):.0f}s ago){more_s}"
    if for_s > losses.silence_s(seen.beat.detail) and not freshness.is_missed(seen, now_s):
        # The heartbeat of one that is gone would be missing by now.
        at, cause = seen.beat.address, more.get("cause", "")
        message = f"worker {seen.beat.worker_id} reaches Postgres, but cannot be called from here, at {at}: {cause}"
    # The cause of an engine failure replaces that of the broken connection.
    return _refusal(WORKER_OFFLINE, message, {**more, **_metadata(freshness, seen, now_s)}, left_s)


def _gave_up(freshness: Freshness, seen: SeenBeat, now_s: float) -> ApiError:
    seen_text, failure = f"last seen {freshness.age_s(seen, now_s):.0f}s ago", _failure(seen)
    if failure and not seen.has_served:
        message = (
            f"worker offline ({seen_text}); it cannot start: {'. '.join(failure.values()).rstrip('.')}."
            " It is started again when its settings change, or after `vllm-batch recovery reset`"
        )
    else:
        message = (
            f"worker offline ({seen_text}){_why(seen)}, and the restart budget is exhausted:"
            " see `vllm-batch recovery events`, then `vllm-batch recovery reset`"
        )
    return _refusal(RECOVERY_GAVE_UP, message, _metadata(freshness, seen, now_s), GAVE_UP_S)


def _left_s(expected_s: float, passed_s: float, otherwise_s: float) -> float:
    """Seconds left of what took `expected_s` last time; `otherwise_s` if that never happened or is long overdue."""
    if not expected_s or passed_s > 2 * expected_s:
        return otherwise_s
    return min(GAVE_UP_S, max(SOON_S, expected_s - passed_s))


def _unwatched(freshness: Freshness, seen: SeenBeat, now_s: float) -> str:
    """The part of a message that says that nothing is there to restart the worker; empty otherwise."""
    age_s = freshness.watchdog_age_s(seen, now_s)
    if age_s is None or age_s <= WATCHDOG_MISSED_S:
        return ""
    return f"; its watchdog is gone too (last seen {age_s:.0f}s ago)"


def _failure(seen: SeenBeat) -> dict[str, str]:
    """`cause` and `advice` of a worker whose engine failed, as far as known."""
    return {name: text for name, text in heartbeats.failure(seen.beat).items() if text}


def _why(seen: SeenBeat) -> str:
    """The part of a message that says why the engine failed; empty if it did not."""
    cause = _failure(seen).get("cause")
    if cause is None:
        return ""
    return f": {cause}" if seen.beat.detail.get("cause") else f"; its last start failed: {cause}"


def _metadata(freshness: Freshness, seen: SeenBeat, now_s: float) -> dict[str, str]:
    metadata = {
        "worker_id": seen.beat.worker_id,
        "phase": seen.beat.phase,
        "last_seen_s": f"{freshness.age_s(seen, now_s):.0f}",
        **_failure(seen),
    }
    watchdog_age_s = freshness.watchdog_age_s(seen, now_s)
    return metadata if watchdog_age_s is None else metadata | {"watchdog_last_seen_s": f"{watchdog_age_s:.0f}"}


def _refusal(reason: str, message: str, metadata: Mapping[str, str], retry_delay_s: float) -> ApiError:
    """Every refusal of new work except the one for an unavailable database."""
    return ApiError(grpc.StatusCode.UNAVAILABLE, message, reason, metadata, retry_delay_s)
