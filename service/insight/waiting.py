"""Why nothing of a batch moves, in words and by a code, and what to do. Pure: facts in, decision out."""

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from datetime import UTC
from enum import StrEnum

from service.db import heartbeats
from service.db.chunks import host_of
from service.db.heartbeats import Phase, SeenBeat
from service.db.recoveries import Pause
from service.insight.routing import FORGOTTEN_S, WATCHDOG_MISSED_S, Freshness, LinkState, has_successor
from vllm_batch.v1 import batch_service_pb2 as pb

# A batch of which a result was stored so recently moves, whatever else is known.
MOVING_S = 5.0
# A worker that is ready has taken what it can by then.
TAKEN_S = 5.0
# A worker whose heartbeat is older than this part of the timeout, and than this, does not reach Postgres or is gone.
MISSED = 1 / 6
MISSED_S = 3.0
# A worker whose health has just changed writes it to its heartbeat at once.
CHANGE_S = 2.0

_LOADING = (Phase.STARTING, Phase.LOADING)
_REFUSED = "Mend that in Postgres: rights, triggers, disk. Nothing is lost, and the batch then resumes by itself."
_STOPPED = "If an operator stopped it, start it again: supervisorctl start worker."


class Condition(StrEnum):
    """What a worker can do for a batch; the earlier, the sooner it may go on with it."""

    READY = "ready"
    LOADING = "loading"
    STALLED = "stalled"
    DEAD = "dead"
    DATABASE_AWAY = "database_away"
    DRAINING = "draining"
    DRAINED = "drained"
    OFFLINE = "offline"
    PAUSED = "paused"
    GAVE_UP = "gave_up"


# What the watchdog mends by a restart.
_RESTARTED = (Condition.STALLED, Condition.DEAD, Condition.OFFLINE)


@dataclass(frozen=True)
class Worker:
    """A worker as the gateway knows it. `models` are empty until its settings have served once."""

    worker_id: str
    condition: Condition
    models: Set[str] = frozenset()
    # Since its last heartbeat, and since its life began.
    seen_s: float = 0.0
    life_s: float = 0.0
    # Why its engine or its last start failed.
    cause: str = ""
    advice: str = ""
    # Seconds since its watchdog was last seen, if that is too long.
    unwatched_s: float = 0.0
    # What an operator ordered, if it is down and not restarted for that.
    pause: Pause | None = None
    # It runs suspects alone, and nothing else meanwhile.
    is_alone: bool = False
    # Requests that it holds.
    held: int = 0
    # Why Postgres does not take its results, and those of some batches, by their ids; why it gives it no work.
    refused: str = ""
    refused_of: Mapping[str, str] = field(default_factory=dict)
    unclaimed: str = ""


@dataclass(frozen=True)
class Facts:
    """One batch that has not ended, as stored and as workers hold it."""

    state: str
    # Requests without a result.
    unfinished: int
    # What each of the chunks that wait asks for.
    models: Set[frozenset[str]]
    # Requests held, by worker.
    held: Mapping[str, int]
    suspects: int
    must_run_alone: int
    runs_alone: bool
    # Since the last result, and since the batch was created.
    quiet_s: float
    age_s: float
    # Requests of higher priority.
    higher: int = 0
    # It names several models.
    is_mixed: bool = False
    batch_id: int = 0


def workers_of(freshness: Freshness, now_s: float, timeout_s: float) -> list[Worker]:
    """The workers that are not forgotten, without what they hold."""
    return [
        _worker(freshness, seen, now_s, timeout_s)
        for seen in freshness.beats
        if freshness.age_s(seen, now_s) <= FORGOTTEN_S
    ]


def _worker(freshness: Freshness, seen: SeenBeat, now_s: float, timeout_s: float) -> Worker:
    failure = heartbeats.failure(seen.beat)
    watchdog_s = freshness.watchdog_age_s(seen, now_s) or 0.0
    condition = _condition(freshness, seen, now_s, timeout_s)
    pause = freshness.paused.get(seen.beat.worker_id) if condition in _RESTARTED else None
    refused = seen.beat.detail.get("refused", {})
    results = refused.get("results", {})
    return Worker(
        seen.beat.worker_id,
        Condition.PAUSED if pause else condition,
        frozenset(seen.beat.models),
        freshness.age_s(seen, now_s),
        seen.life_s + max(0.0, now_s - freshness.read_at_s),
        failure["cause"],
        failure["advice"],
        watchdog_s if watchdog_s > WATCHDOG_MISSED_S else 0.0,
        pause,
        refused=results.get("cause", ""),
        refused_of=results.get("batches", {}),
        unclaimed=refused.get("claims", ""),
    )


def _condition(freshness: Freshness, seen: SeenBeat, now_s: float, timeout_s: float) -> Condition:
    phase, age_s, contact = seen.beat.phase, freshness.age_s(seen, now_s), freshness.contact(seen)
    is_missed = age_s > max(MISSED * timeout_s, MISSED_S)
    if phase in _LOADING and not is_missed:
        # Also after recovery gave up: somebody has started it since.
        return Condition.LOADING
    is_serving = contact.health is LinkState.SERVING and not (is_missed and has_successor(freshness, seen))
    if seen.beat.worker_id in freshness.given_up and not is_serving:
        return Condition.GAVE_UP
    if contact.health is LinkState.UNREACHABLE or (is_missed and not is_serving):
        return Condition.OFFLINE
    if is_missed:
        return Condition.DATABASE_AWAY
    named = {
        Phase.STALLED: Condition.STALLED,
        Phase.ENGINE_DEAD: Condition.DEAD,
        Phase.DRAINING: Condition.DRAINING,
        Phase.STOPPING: Condition.DRAINING,
    }
    if phase in named:
        return named[Phase(phase)]
    if seen.is_drained:
        return Condition.DRAINED
    is_refusing = contact.health is LinkState.NOT_SERVING and now_s - contact.since_s > CHANGE_S
    return Condition.STALLED if is_refusing else Condition.READY


def decide(facts: Facts, workers: Sequence[Worker]) -> pb.Wait | None:
    """What a batch waits for; None while it moves. The first row that fits."""
    held = sum(facts.held.values())
    if facts.state == "cancelling":
        return _wait(pb.WAIT_REASON_CANCELLING, f"cancelled; workers have not dropped {_requests(held)} of it yet")
    if facts.runs_alone:
        return (_refused(facts, workers) if facts.quiet_s >= MOVING_S else None) or _suspects(facts)
    if held:
        return None if facts.quiet_s < MOVING_S else _of_holders(facts, workers)
    able = [worker for worker in workers if _may_run(worker, facts.models)]
    ready = [worker for worker in able if worker.condition is Condition.READY]
    if not able:
        return _no_worker(facts, workers)
    if not ready:
        wait = _for_worker(_soonest(able))
        if facts.is_mixed:
            wait.message += f"; the requests that are left are for {_names(facts.models)}"
        return wait
    if facts.must_run_alone and facts.suspects >= facts.unfinished:
        return _suspects(facts)
    if all(worker.is_alone for worker in ready):
        text = f"worker {ready[0].worker_id} runs requests of others that an engine died with, one after the other"
        return _wait(pb.WAIT_REASON_SUSPECTS_ALONE, f"{text}; all else has its turn after at most 30 s")
    if (running := sum(worker.held for worker in ready)) or facts.higher:
        return _turn(running, facts.higher)
    if facts.age_s < TAKEN_S or facts.quiet_s < MOVING_S:
        return None
    if why := next((worker for worker in ready if worker.unclaimed), None):
        text = f"Postgres refuses to give worker {why.worker_id} any of its requests: {why.unclaimed}"
        return _wait(pb.WAIT_REASON_DATABASE_AWAY, text, _REFUSED)
    text = f"worker {ready[0].worker_id} is ready and has not taken any of its requests yet"
    return _wait(pb.WAIT_REASON_NOT_TAKEN, text, "If this lasts, look into the worker's log.")


def is_unserved(wanted: Set[frozenset[str]], workers: Sequence[Worker]) -> bool:
    """True if no worker runs any of the chunks that wait, by the models that each asks for, or is about to.

    One that is offline counts as none, and so does one that is not restarted.
    """
    gone = (Condition.OFFLINE, Condition.PAUSED, Condition.GAVE_UP)
    return not any(worker.condition not in gone and _may_run(worker, wanted) for worker in workers)


def _may_run(worker: Worker, wanted: Set[frozenset[str]]) -> bool:
    """True if the worker serves what one of the chunks asks for, or does not know yet what it will serve."""
    if not worker.models:
        return worker.condition is not Condition.READY
    return any(models <= worker.models for models in wanted)


def _of_holders(facts: Facts, workers: Sequence[Worker]) -> pb.Wait | None:
    """None if one of the workers that hold some of the batch works on it."""
    holders = [worker for worker in workers if worker.worker_id in facts.held]
    at_work = [worker for worker in holders if worker.condition in (Condition.READY, Condition.DRAINED)]
    if at_work:
        return _refused(facts, at_work)
    if holders:
        return _for_worker(_soonest(holders))
    name = min(facts.held)
    return _wait(pb.WAIT_REASON_WORKER_OFFLINE, f"worker {name} holds {_requests(facts.held[name])} and is unknown")


def _refused(facts: Facts, workers: Sequence[Worker]) -> pb.Wait | None:
    """The wait for Postgres to take results of the batch; None unless it refuses those of all these that hold any."""
    whys = {
        worker.worker_id: worker.refused or worker.refused_of.get(str(facts.batch_id), "")
        for worker in workers
        if worker.worker_id in facts.held
    }
    return _not_stored(whys)


def of_all(workers: Sequence[Worker]) -> pb.Wait | None:
    """What every batch waits for, where nothing could be read of them: None unless no result can be stored."""
    return _not_stored({worker.worker_id: worker.refused for worker in workers if worker.condition is Condition.READY})


def _not_stored(whys: Mapping[str, str]) -> pb.Wait | None:
    """The wait for Postgres to take results, by the causes of the workers that have some; None if one has no cause."""
    if not whys or not all(whys.values()):
        return None
    name = min(whys)
    text = f"Postgres does not accept the results that worker {name} has: {whys[name]}"
    return _wait(pb.WAIT_REASON_DATABASE_AWAY, text, _REFUSED)


def _soonest(workers: Sequence[Worker]) -> Worker:
    order = list(Condition)
    return min(workers, key=lambda worker: (order.index(worker.condition), worker.seen_s, worker.worker_id))


def _for_worker(worker: Worker) -> pb.Wait:
    """The wait for a worker that is not ready."""
    name, cause = f"worker {worker.worker_id}", f": {worker.cause}" if worker.cause else ""
    last = f"; its last start failed: {worker.cause}" if worker.cause else ""
    seen = f"last seen {worker.seen_s:.0f} s ago"
    match worker.condition:
        case Condition.LOADING:
            text = f"{name} has been starting and loading its model for {worker.life_s:.0f} s{last}"
            return _wait(pb.WAIT_REASON_WORKER_LOADING, text, worker.advice)
        case Condition.STALLED:
            text = f"the engine of {name} makes no progress{cause}"
            return _wait(pb.WAIT_REASON_ENGINE_STALLED, text, worker.advice or _restart(worker))
        case Condition.DEAD:
            text = f"the engine of {name} died{cause}"
            return _wait(pb.WAIT_REASON_ENGINE_DEAD, text, worker.advice or _restart(worker))
        case Condition.DATABASE_AWAY:
            text = f"{name} has not reached Postgres for {worker.seen_s:.0f} s"
            advice = "Check Postgres, and the way to it from that host. Nothing is lost: results are stored then."
            return _wait(pb.WAIT_REASON_DATABASE_AWAY, text, advice)
        case Condition.DRAINING:
            advice = "Another worker, or its next start, goes on with the batch."
            return _wait(pb.WAIT_REASON_WORKER_DRAINING, f"{name} is ending and takes no new requests", advice)
        case Condition.DRAINED:
            host = host_of(worker.worker_id)
            advice = f"Another host goes on with the batch; so does this one after `vllm-batch hosts resume {host}`."
            text = f"host {host} is drained, and {name} takes no new requests"
            return _wait(pb.WAIT_REASON_WORKER_DRAINING, text, advice)
        case Condition.PAUSED:
            until = f" until {worker.pause.end_time.astimezone(UTC):%Y-%m-%d %H:%M} UTC" if worker.pause else ""
            why = f": {worker.pause.reason}" if worker.pause else ""
            advice = (
                f"`vllm-batch recovery resume` on host {host_of(worker.worker_id)} lets the watchdog restart it before"
                f" the pause ends. {_restart(worker) or _STOPPED}"
            )
            text = f"{name} is down ({seen}){cause}; an operator paused its recovery{until}{why}"
            return _wait(pb.WAIT_REASON_RECOVERY_PAUSED, text, f"{worker.advice} {advice}".strip())
        case Condition.GAVE_UP:
            advice = "See `vllm-batch recovery events`; once the cause is mended, `vllm-batch recovery reset REASON`."
            text = f"{name} is not restarted any more ({seen}){cause}"
            return _wait(pb.WAIT_REASON_RECOVERY_GAVE_UP, text, f"{worker.advice} {advice}".strip())
        case _:
            advice = worker.advice or _restart(worker) or _STOPPED
            return _wait(pb.WAIT_REASON_WORKER_OFFLINE, f"{name} is offline ({seen}){cause}", advice)


def _restart(worker: Worker) -> str:
    if not worker.unwatched_s:
        return ""
    return f"Its watchdog was last seen {worker.unwatched_s:.0f} s ago: start it, or restart the worker yourself."


def _no_worker(facts: Facts, workers: Sequence[Worker]) -> pb.Wait:
    if not workers:
        return _wait(pb.WAIT_REASON_WORKER_OFFLINE, "no worker was ever seen", "Start one: scripts/start-all.sh")
    wanted = _names(facts.models)
    served = _names(worker.models for worker in workers) or "none"
    advice = "Start a worker that serves it (BATCH_MODEL), or cancel the batch."
    text = f"no worker serves the model {wanted}; models served: {served}"
    return _wait(pb.WAIT_REASON_NO_WORKER_OF_MODEL, text, advice)


def _names(sets: Iterable[Set[str]]) -> str:
    return ", ".join(sorted({model for models in sets for model in models}))


def _suspects(facts: Facts) -> pb.Wait:
    text = f"{_requests(facts.must_run_alone)} of it, which an engine died with, to run alone, one after the other"
    return _wait(pb.WAIT_REASON_SUSPECTS_ALONE, f"{text}, until it is known which one kills engines")


def _turn(running: int, higher: int) -> pb.Wait:
    before = [f"{_requests(running)} of other batches that workers run now"] if running else []
    before += [f"{_requests(higher)} of higher priority"] if higher else []
    advice = "It goes on by itself. A higher priority, set at its submission, or another worker would be sooner."
    return _wait(pb.WAIT_REASON_TURN, f"its turn comes after {' and '.join(before)}", advice)


def _requests(count: int) -> str:
    return f"{count:,} request{'' if count == 1 else 's'}"


def _wait(reason: pb.WaitReason, message: str, advice: str = "") -> pb.Wait:
    return pb.Wait(reason=reason, message=message, advice=advice)
