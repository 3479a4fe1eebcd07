"""Why a batch does not move: a row of the decision each, and how workers look to it."""

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

import pytest
import structlog

from service.db.heartbeats import Beat, SeenBeat
from service.db.recoveries import Pause
from service.db.unserved import Unserved
from service.gateway.housekeeping import INTERVAL_S
from service.gateway.unserved_log import LASTING_S, UnservedLog
from service.insight.routing import Contact, Freshness, LinkState
from service.insight.waiting import Condition, Facts, Worker, decide, is_unserved, of_all, workers_of
from vllm_batch.v1 import batch_service_pb2 as pb

TINY = frozenset({frozenset({"tiny"})})
# A batch of which nothing is held, long after its creation.
WAITING = Facts(
    state="in_progress",
    unfinished=50,
    models=TINY,
    held={},
    suspects=0,
    must_run_alone=0,
    runs_alone=False,
    quiet_s=float("inf"),
    age_s=100.0,
)
HELD = replace(WAITING, held={"w": 8}, quiet_s=30.0)
READY = Worker("w", Condition.READY, frozenset({"tiny"}), seen_s=1.0, life_s=100.0)


def worker(condition: Condition, **fields: Any) -> Worker:
    return replace(READY, condition=condition, **fields)


LOADING = worker(Condition.LOADING, models=frozenset(), life_s=40.4)
OFFLINE = worker(Condition.OFFLINE, seen_s=72.0)
UNWATCHED = worker(Condition.OFFLINE, seen_s=72.0, unwatched_s=90.0)
FAILED = worker(Condition.GAVE_UP, models=frozenset(), cause="no memory", advice="Take a smaller model.", seen_s=600.0)
PAUSE = Pause("driver upgrade (ann)", datetime(2026, 5, 4, 8, 30, tzinfo=UTC))
PAUSED = worker(Condition.PAUSED, worker_id="box:w", seen_s=72.0, cause="killed", pause=PAUSE)
OTHER = worker(Condition.READY, models=frozenset({"other"}))
REFUSED = worker(Condition.READY, refused="permission denied for table results")
PUT_OFF = worker(Condition.READY, refused_of={"7": "not audited"})

ROWS = [
    # What moves has no reason.
    (replace(HELD, quiet_s=1.0), [worker(Condition.STALLED)], None, "", ""),
    (HELD, [READY], None, "", ""),
    (replace(HELD, quiet_s=1.0), [worker(Condition.DRAINING)], None, "", ""),
    (HELD, [worker(Condition.DRAINING)], "WORKER_DRAINING", "w is ending", ""),
    (replace(HELD, held={"w": 8, "v": 1}), [OFFLINE, replace(READY, worker_id="v")], None, "", ""),
    (replace(WAITING, age_s=1.0), [READY], None, "", ""),
    (replace(WAITING, quiet_s=1.0), [READY], None, "", ""),
    # What is cancelled, and what runs alone, first of all.
    (replace(HELD, state="cancelling"), [READY], "CANCELLING", "have not dropped 8 requests", ""),
    (
        replace(HELD, runs_alone=True, must_run_alone=3),
        [READY],
        "SUSPECTS_ALONE",
        "3 requests of it, which an engine died with",
        "",
    ),
    # A worker holds some of it and cannot go on.
    (HELD, [worker(Condition.STALLED)], "ENGINE_STALLED", "the engine of worker w makes no progress", ""),
    (
        HELD,
        [worker(Condition.STALLED, unwatched_s=90.0)],
        "ENGINE_STALLED",
        "no progress",
        "watchdog was last seen 90 s",
    ),
    (HELD, [worker(Condition.DEAD, cause="killed")], "ENGINE_DEAD", "the engine of worker w died: killed", ""),
    (HELD, [LOADING], "WORKER_LOADING", "loading its model for 40 s", ""),
    (HELD, [OFFLINE], "WORKER_OFFLINE", "w is offline (last seen 72 s ago)", "supervisorctl start worker"),
    (HELD, [UNWATCHED], "WORKER_OFFLINE", "w is offline", "watchdog was last seen 90 s ago"),
    (
        replace(HELD, held={"box:w": 8}),
        [PAUSED],
        "RECOVERY_PAUSED",
        "box:w is down (last seen 72 s ago): killed; an operator paused its recovery until 2026-05-04 08:30 UTC:"
        " driver upgrade (ann)",
        "`vllm-batch recovery resume` on host box",
    ),
    (
        HELD,
        [FAILED],
        "RECOVERY_GAVE_UP",
        "not restarted any more (last seen 600 s ago): no memory",
        "Take a smaller model.",
    ),
    (
        HELD,
        [worker(Condition.DATABASE_AWAY, seen_s=14.0)],
        "DATABASE_AWAY",
        "not reached Postgres for 14 s",
        "Nothing is lost",
    ),
    (HELD, [], "WORKER_OFFLINE", "w holds 8 requests and is unknown", ""),
    # Postgres refuses what it would store, of all batches or of this one, or to give it any.
    (HELD, [REFUSED], "DATABASE_AWAY", "the results that worker w has: permission denied for table results", "rights"),
    (replace(HELD, quiet_s=1.0), [REFUSED], None, "", ""),
    (replace(HELD, batch_id=7), [PUT_OFF], "DATABASE_AWAY", "worker w has: not audited", "Nothing is lost"),
    (replace(HELD, batch_id=8), [PUT_OFF], None, "", ""),
    (replace(HELD, held={"w": 8, "v": 1}), [REFUSED, replace(READY, worker_id="v")], None, "", ""),
    (replace(HELD, held={"w": 8, "v": 1}), [REFUSED, replace(OFFLINE, worker_id="v")], "DATABASE_AWAY", "", ""),
    (replace(HELD, runs_alone=True, must_run_alone=1), [REFUSED], "DATABASE_AWAY", "permission denied", ""),
    (replace(HELD, quiet_s=1.0, runs_alone=True, must_run_alone=1), [REFUSED], "SUSPECTS_ALONE", "", ""),
    (
        WAITING,
        [replace(READY, unclaimed="denied")],
        "DATABASE_AWAY",
        "to give worker w any of its requests: denied",
        "",
    ),
    # Nobody can take it.
    (WAITING, [], "WORKER_OFFLINE", "no worker was ever seen", "scripts/start-all.sh"),
    (WAITING, [OTHER], "NO_WORKER_OF_MODEL", "no worker serves the model tiny; models served: other", "BATCH_MODEL"),
    (WAITING, [OTHER, LOADING], "WORKER_LOADING", "for 40 s", ""),
    (WAITING, [OFFLINE, LOADING], "WORKER_LOADING", "for 40 s", ""),
    (WAITING, [replace(LOADING, cause="no memory")], "WORKER_LOADING", "; its last start failed: no memory", ""),
    (WAITING, [FAILED, OFFLINE], "WORKER_OFFLINE", "72 s", ""),
    # The one that comes back by itself before the one that waits for its operator, and that before the one given up.
    (WAITING, [PAUSED, OFFLINE], "WORKER_OFFLINE", "72 s", ""),
    (WAITING, [FAILED, PAUSED], "RECOVERY_PAUSED", "driver upgrade", "If an operator stopped it, start it again"),
    (WAITING, [replace(PAUSED, unwatched_s=90.0)], "RECOVERY_PAUSED", "", "watchdog was last seen 90 s ago"),
    (WAITING, [FAILED], "RECOVERY_GAVE_UP", "no memory", "vllm-batch recovery reset"),
    (WAITING, [worker(Condition.DRAINING)], "WORKER_DRAINING", "w is ending and takes no new requests", "goes on with"),
    (WAITING, [worker(Condition.STALLED)], "ENGINE_STALLED", "makes no progress", ""),
    # Somebody can, and has not.
    (replace(WAITING, suspects=50, must_run_alone=2), [READY], "SUSPECTS_ALONE", "2 requests of it", ""),
    (
        WAITING,
        [replace(READY, is_alone=True, held=1)],
        "SUSPECTS_ALONE",
        "w runs requests of others that an engine died with",
        "",
    ),
    (WAITING, [replace(READY, held=1200)], "TURN", "after 1,200 requests of other batches", "higher priority"),
    (replace(WAITING, higher=7), [READY], "TURN", "after 7 requests of higher priority", "higher priority"),
    (
        replace(WAITING, higher=7),
        [replace(READY, held=1)],
        "TURN",
        "1 request of other batches that workers run now and 7",
        "",
    ),
    (WAITING, [READY], "NOT_TAKEN", "w is ready and has not taken any", "worker's log"),
    # Of several models, each chunk asks for its own.
    (
        replace(WAITING, models=frozenset({frozenset({"a"}), frozenset({"tiny"})})),
        [READY],
        "NOT_TAKEN",
        "w is ready",
        "",
    ),
    (replace(WAITING, models=frozenset({frozenset({"a"})})), [READY], "NO_WORKER_OF_MODEL", "the model a;", ""),
    (
        replace(WAITING, is_mixed=True),
        [OFFLINE, OTHER],
        "WORKER_OFFLINE",
        "w is offline (last seen 72 s ago); the requests that are left are for tiny",
        "",
    ),
]


@pytest.mark.parametrize(("facts", "workers", "reason", "message", "advice"), ROWS)
def test_each_row(facts: Facts, workers: list[Worker], reason: str | None, message: str, advice: str) -> None:
    """The code, the words and the advice of each case; none for what moves."""
    wait = decide(facts, workers)
    if reason is None:
        assert wait is None
        return
    assert wait is not None
    assert pb.WaitReason.Name(wait.reason) == f"WAIT_REASON_{reason}"
    assert message in wait.message
    assert advice in wait.advice


def test_what_can_be_said_where_nothing_can_be_read() -> None:
    """While a batch cannot be looked at, it waits for Postgres exactly if no worker that is ready can store results."""
    wait = of_all([REFUSED, OFFLINE])
    assert wait is not None
    assert wait.message.endswith("worker w has: permission denied for table results")
    assert not any(map(of_all, ([], [OFFLINE], [READY], [PUT_OFF], [REFUSED, replace(READY, worker_id="v")])))


def test_every_reason_has_a_row() -> None:
    """No reason of the contract is without a case that leads to it."""
    found = {f"WAIT_REASON_{reason}" for _, _, reason, _, _ in ROWS if reason}
    assert found == set(pb.WaitReason.keys()) - {"WAIT_REASON_UNSPECIFIED"}


SERVING, NOT_SERVING = Contact(LinkState.SERVING), Contact(LinkState.NOT_SERVING)
GONE = Contact(LinkState.UNREACHABLE, cause="connection refused")
CONDITIONS: list[tuple[str, float, Contact, bool, Condition]] = [
    ("ready", 1.0, SERVING, False, Condition.READY),
    ("ready", 1.0, Contact(), False, Condition.READY),
    ("ready", 1.0, NOT_SERVING, False, Condition.STALLED),
    ("ready", 1.0, replace(NOT_SERVING, since_s=999.5), False, Condition.READY),
    ("ready", 11.0, SERVING, False, Condition.DATABASE_AWAY),
    ("ready", 11.0, NOT_SERVING, False, Condition.OFFLINE),
    ("ready", 1.0, GONE, False, Condition.OFFLINE),
    ("ready", 1.0, GONE, True, Condition.GAVE_UP),
    ("ready", 1.0, SERVING, True, Condition.READY),
    ("loading", 1.0, NOT_SERVING, False, Condition.LOADING),
    ("starting", 1.0, GONE, True, Condition.LOADING),
    ("loading", 30.0, GONE, False, Condition.OFFLINE),
    ("stalled", 1.0, NOT_SERVING, False, Condition.STALLED),
    ("engine_dead", 1.0, NOT_SERVING, False, Condition.DEAD),
    ("draining", 1.0, NOT_SERVING, False, Condition.DRAINING),
    ("stopping", 1.0, NOT_SERVING, False, Condition.DRAINING),
    ("stopping", 1.0, GONE, False, Condition.OFFLINE),
]


@pytest.mark.parametrize(("phase", "age_s", "contact", "has_given_up", "condition"), CONDITIONS)
def test_how_a_worker_looks(
    phase: str, age_s: float, contact: Contact, has_given_up: bool, condition: Condition
) -> None:
    """Phase, age of the heartbeat, link and verdict together say what a worker can do."""
    beat = Beat("box:worker", uuid4(), "127.0.0.1:1", phase, 1, ("tiny",))
    freshness = freshness_of(SeenBeat(beat, age_s, life_s=20.0, watchdog_age_s=5.0), contact)
    if has_given_up:
        freshness = replace(freshness, given_up=frozenset({"box:worker"}))
    [seen] = workers_of(freshness, 1000.0, 60.0)
    assert seen.condition is condition
    assert (seen.seen_s, seen.life_s, seen.unwatched_s) == (age_s, 20.0, 0.0)


@pytest.mark.parametrize(
    ("phase", "contact", "has_given_up", "condition"),
    [
        ("ready", GONE, False, Condition.PAUSED),
        ("ready", NOT_SERVING, False, Condition.PAUSED),
        ("stalled", NOT_SERVING, False, Condition.PAUSED),
        ("engine_dead", NOT_SERVING, False, Condition.PAUSED),
        ("ready", GONE, True, Condition.GAVE_UP),
        ("ready", SERVING, False, Condition.READY),
        ("loading", GONE, False, Condition.LOADING),
        ("draining", NOT_SERVING, False, Condition.DRAINING),
    ],
)
def test_a_pause_counts_while_the_worker_is_down(
    phase: str, contact: Contact, has_given_up: bool, condition: Condition
) -> None:
    """Only where the watchdog would restart the worker, and not if it gave up: then the end of a pause helps nobody."""
    beat = Beat("box:worker", uuid4(), "127.0.0.1:1", phase, 1, ("tiny",))
    freshness = replace(freshness_of(SeenBeat(beat, 1.0), contact), paused={"box:worker": PAUSE})
    if has_given_up:
        freshness = replace(freshness, given_up=frozenset({"box:worker"}))
    [seen] = workers_of(freshness, 1000.0, 60.0)
    assert seen.condition is condition
    assert seen.pause == (PAUSE if condition is Condition.PAUSED else None)


def freshness_of(seen: SeenBeat, contact: Contact) -> Freshness:
    contacts = {seen.beat.address: contact}
    return Freshness([seen], read_at_s=1000.0, contacts=contacts)


def test_a_link_to_a_successor_says_nothing_of_the_one_before() -> None:
    """A worker that is gone is offline, and serves no model, though another one answers at its address."""
    gone, there = (
        SeenBeat(Beat(name, uuid4(), "10.0.0.1:1", "ready", 1, (model,)), age_s)
        for name, model, age_s in (("pod-1:worker", "tiny", 20.0), ("pod-2:worker", "other", 1.0))
    )
    known = replace(freshness_of(gone, SERVING), beats=[gone, there])
    found = workers_of(known, 1000.0, 60.0)
    assert [each.condition for each in found] == [Condition.OFFLINE, Condition.READY]
    assert is_unserved(TINY, found)
    assert workers_of(replace(known, given_up=frozenset({"pod-1:worker"})), 1000.0, 60.0)[0].condition == "gave_up"


def test_a_worker_brings_why_it_failed_and_who_watches() -> None:
    """Cause and advice of its engine, and a watchdog that is gone, are there; a worker forgotten for a day is not."""
    detail = {"cause": "no memory", "advice": "Take less."}
    beat = Beat("box:worker", uuid4(), "127.0.0.1:1", "engine_dead", 1, detail=detail)
    [seen] = workers_of(freshness_of(SeenBeat(beat, 1.0, watchdog_age_s=300.0), NOT_SERVING), 1000.0, 60.0)
    assert (seen.cause, seen.advice, seen.unwatched_s) == ("no memory", "Take less.", 300.0)
    assert not workers_of(freshness_of(SeenBeat(beat, 90_000.0), GONE), 1000.0, 60.0)


@pytest.mark.parametrize(
    ("results", "expected"),
    [
        ({"cause": "denied"}, ("denied", {}, "full")),
        ({"batches": {"7": "not audited"}}, ("", {"7": "not audited"}, "full")),
        (None, ("", {}, "")),
    ],
)
def test_a_worker_brings_what_postgres_refuses(results: Any, expected: tuple[Any, ...]) -> None:
    """What its heartbeat says of results and of claims is there."""
    detail = {"refused": {"results": results, "claims": "full"}} if results else {}
    beat = Beat("box:worker", uuid4(), "127.0.0.1:1", "ready", 1, detail=detail)
    [seen] = workers_of(freshness_of(SeenBeat(beat, 1.0), SERVING), 1000.0, 60.0)
    assert (seen.refused, seen.refused_of, seen.unclaimed) == expected


@pytest.mark.parametrize("models", [frozenset(), frozenset({"tiny"}), frozenset({"other"})])
@pytest.mark.parametrize("condition", Condition)
def test_a_batch_says_what_the_log_and_the_metric_say(condition: Condition, models: frozenset[str]) -> None:
    """Whether a batch is unserved is decided once, and its reason says the same."""
    workers = [worker(condition, models=models), OTHER]
    wait = decide(WAITING, workers)
    reasons = (
        pb.WAIT_REASON_NO_WORKER_OF_MODEL,
        pb.WAIT_REASON_WORKER_OFFLINE,
        pb.WAIT_REASON_RECOVERY_PAUSED,
        pb.WAIT_REASON_RECOVERY_GAVE_UP,
    )
    assert is_unserved(TINY, workers) is (wait is not None and wait.reason in reasons)


def test_what_is_unserved_is_reported_in_time() -> None:
    """The loss of a host is reported within 15 s, also if its link is lost after 8 s and just after a round."""
    said, now_s = UnservedLog(), 8 + INTERVAL_S
    with structlog.testing.capture_logs() as logged:
        while now_s <= 15:
            said.note([Unserved(("tiny",), (1,), 5.0)], now_s)
            now_s += INTERVAL_S
    assert [event["event"] for event in logged] == ["models_unserved"]


def test_a_restart_is_not_reported_as_unserved() -> None:
    """Only what lasts is, and once; it is reported again when it happens again."""
    said, found = UnservedLog(), [Unserved(("tiny",), (1,), 5.0)]
    with structlog.testing.capture_logs() as logged:
        for now_s in (0, 2, LASTING_S - 1):
            said.note(found, now_s)
        said.note([], LASTING_S)
        said.note(found, 20)
        for now_s in (20 + LASTING_S, 22 + LASTING_S):
            said.note(found, now_s)
        said.note([], 40)
    assert [event["event"] for event in logged] == ["models_unserved", "models_not_waited_for"]
