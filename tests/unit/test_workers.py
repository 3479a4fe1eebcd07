"""Which worker gets new work, and what a client is told when there is none."""

from collections.abc import Mapping
from uuid import uuid4

import grpc
import pytest

from service.db.heartbeats import Beat, Phase, SeenBeat
from service.errors import ApiError
from service.gateway.workers import Contact, Freshness, Health, live, unreachable

TIMINGS = {"w": {"detect": 1.0, "stop": 2.0, "start": 3.0, "load": 40.0}}


def seen(
    name: str = "w",
    phase: Phase = Phase.READY,
    age_s: float = 1,
    queued: int = 0,
    models: tuple[str, ...] = ("m",),
    life_s: float = 100,
) -> SeenBeat:
    return SeenBeat(Beat(name, uuid4(), f"{name}:1", phase, 1, models, queued), age_s, life_s)


def known(
    *workers: SeenBeat,
    health: Mapping[str, Health] | None = None,
    since_s: float = 0,
    read_at_s: float = 0,
    given_up: str = "",
    timings: Mapping[str, Mapping[str, float]] | None = None,
    watchdogs: Mapping[str, float] | None = None,
    failure: str = "",
) -> Freshness:
    """Of each worker the link says what its phase says, or what `health` says of its name."""
    contacts = {}
    for one in workers:
        said = Health.SERVING if one.beat.phase == Phase.READY else Health.NOT_SERVING
        said = (health or {}).get(one.beat.worker_id, said)
        contacts[one.beat.address] = Contact(said, since_s, "Socket closed" if said is Health.UNREACHABLE else "")
    return Freshness(workers, read_at_s, frozenset(given_up.split()), timings or {}, watchdogs or {}, failure, contacts)


def chosen(freshness: Freshness, *models: str, now_s: float = 0) -> list[str]:
    return [one.beat.worker_id for one in live(freshness, now_s, 60, frozenset(models))]


def refusal(freshness: Freshness, *models: str, now_s: float = 0) -> ApiError:
    with pytest.raises(ApiError) as caught:
        live(freshness, now_s, 60, frozenset(models))
    assert caught.value.code is grpc.StatusCode.UNAVAILABLE
    assert caught.value.retry_delay_s
    return caught.value


def test_least_queued_worker_comes_first() -> None:
    """Among live workers the one with the least queued is tried first; stale, loading and lost ones do not count."""
    workers = [
        seen("busy", queued=9),
        seen("idle", queued=2),
        seen("stale", age_s=61),
        seen("loading", phase=Phase.LOADING),
        seen("lost"),
    ]
    assert chosen(known(*workers, health={"lost": Health.UNREACHABLE})) == ["idle", "busy"]


def test_age_grows_between_looks() -> None:
    """A heartbeat that was fresh when it was read is stale when nothing was read since."""
    freshness = known(seen(age_s=50), read_at_s=100)
    assert chosen(freshness, now_s=109) == ["w"]
    assert refusal(freshness, now_s=111).message == "worker offline (last seen 61s ago)"


@pytest.mark.parametrize("health", [Health.UNKNOWN, Health.NOT_SERVING, Health.UNREACHABLE])
def test_a_fresh_heartbeat_is_not_enough(health: Health) -> None:
    """New work goes to a worker whose link says SERVING, whatever its last heartbeat said."""
    error = refusal(known(seen(), health={"w": health}))
    assert (error.reason, error.metadata["phase"]) == ("WORKER_OFFLINE", "ready")


def test_the_link_is_newer_than_the_phase() -> None:
    """A worker that says SERVING gets work also while its last heartbeat still says that it loads."""
    assert chosen(known(seen(phase=Phase.LOADING), health={"w": Health.SERVING})) == ["w"]


def test_workers_of_different_models() -> None:
    """A batch goes to a worker that serves its models, though another has less queued."""
    workers = [seen("a", models=("m", "m-lora"), queued=7), seen("b", models=("n",), queued=1)]
    assert chosen(known(*workers), "m") == ["a"]
    assert chosen(known(*workers), "m", "m-lora") == ["a"]
    assert chosen(known(*workers), "n") == ["b"]
    assert chosen(known(*workers)) == ["b", "a"]


def test_a_model_that_nobody_serves() -> None:
    """Any live worker may refuse what no worker can serve, and it says what there is."""
    assert chosen(known(seen("a", models=("m",)), seen("b", models=("n",))), "x") == ["a", "b"]
    assert chosen(known(seen("a", models=("m",)), seen("b", models=("n",))), "m", "n") == ["a", "b"]


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (seen("b", models=("n",), age_s=600), "WORKER_OFFLINE"),
        (seen("b", models=("n",), phase=Phase.STALLED), "WORKER_STALLED"),
        (seen("b", models=(), phase=Phase.LOADING), "WORKER_LOADING"),
    ],
)
def test_a_model_whose_worker_is_away_is_waited_for(other: SeenBeat, reason: str) -> None:
    """A batch that only an absent worker can serve is told to come back; it is not refused for good by another one."""
    workers = known(seen("a", models=("m",)), other)
    error = refusal(workers, "n")
    assert (error.reason, error.metadata["worker_id"]) == (reason, "b")
    assert chosen(workers, "m") == ["a"]


def test_a_worker_that_was_removed_is_forgotten() -> None:
    """The model of a worker that was not seen for a day is refused as one that is not served."""
    assert chosen(known(seen("a", models=("m",)), seen("b", models=("n",), age_s=90_000)), "n") == ["a"]


@pytest.mark.parametrize(
    ("freshness", "reason", "message"),
    [
        (known(), "WORKER_OFFLINE", "worker offline (never seen)"),
        (known(seen(age_s=72)), "WORKER_OFFLINE", "worker offline (last seen 72s ago)"),
        (known(seen(), health={"w": Health.UNREACHABLE}), "WORKER_OFFLINE", "worker offline (last seen 1s ago)"),
        (known(seen(), health={"w": Health.UNKNOWN}), "WORKER_OFFLINE", "has not answered yet"),
        (known(seen(), health={"w": Health.NOT_SERVING}), "WORKER_OFFLINE", "has just stopped serving"),
        (known(seen(phase=Phase.STARTING)), "WORKER_LOADING", "worker is starting"),
        (known(seen(phase=Phase.LOADING)), "WORKER_LOADING", "worker is loading"),
        (known(seen(phase=Phase.STALLED)), "WORKER_STALLED", "stalled"),
        (known(seen(phase=Phase.ENGINE_DEAD)), "WORKER_STALLED", "engine_dead"),
        (known(seen(phase=Phase.DRAINING)), "WORKER_OFFLINE", "worker is draining"),
        (known(seen(age_s=72), given_up="w"), "RECOVERY_GAVE_UP", "vllm-batch recovery reset"),
        (known(seen(phase=Phase.ENGINE_DEAD), given_up="w"), "RECOVERY_GAVE_UP", "has not helped"),
        (
            known(seen(age_s=72), seen("v", phase=Phase.LOADING), given_up="w"),
            "WORKER_LOADING",
            "worker is loading",
        ),
        (known(seen(), failure="refused"), "DATABASE_UNAVAILABLE", "database unavailable: refused"),
    ],
)
def test_refusals_say_why(freshness: Freshness, reason: str, message: str) -> None:
    """Each reason for having no worker has its own word and text."""
    error = refusal(freshness)
    assert error.reason == reason
    assert message in error.message


@pytest.mark.parametrize(
    ("freshness", "delay_s"),
    [
        # Never recovered before: what is usual.
        (known(seen(age_s=72)), 15),
        (known(seen(), health={"w": Health.UNREACHABLE}), 5),
        (known(seen(phase=Phase.LOADING, life_s=7)), 5),
        # The last load took 40 s, the last recovery 46 s.
        (known(seen(phase=Phase.LOADING, life_s=7), timings=TIMINGS), 33),
        (known(seen(phase=Phase.LOADING, life_s=45), timings=TIMINGS), 1),
        (known(seen(phase=Phase.LOADING, life_s=90), timings=TIMINGS), 5),
        (known(seen(), health={"w": Health.UNREACHABLE}, since_s=-6, timings=TIMINGS), 40),
        (known(seen(phase=Phase.STALLED), since_s=-16, timings=TIMINGS), 30),
        (known(seen(age_s=100), timings=TIMINGS), 15),
        (known(seen(), health={"w": Health.NOT_SERVING}), 1),
        (known(seen(age_s=72), given_up="w"), 300),
    ],
)
def test_the_delay_is_what_is_left_of_the_last_recovery(freshness: Freshness, delay_s: float) -> None:
    """A client is told to come back when the worker will be there, as far as the last time says when that is."""
    assert refusal(freshness).retry_delay_s == delay_s


def test_a_worker_that_does_not_answer() -> None:
    """A client whose call went to a dead worker is told the name under which the batch may have been stored."""
    worker = seen()
    error = unreachable(worker, known(worker), 0, "Socket closed", "made-1")
    assert (error.reason, error.metadata["cause"], error.metadata["request_id"]) == (
        "WORKER_OFFLINE",
        "Socket closed",
        "made-1",
    )
    assert unreachable(worker, known(worker, given_up="w"), 0, "", "made-1").reason == "RECOVERY_GAVE_UP"


def test_errors_carry_their_details() -> None:
    """The trailers of an error hold google.rpc details and the delay for gRPC's own retries."""
    error = refusal(known(seen(age_s=72)))
    trailers = dict(error.trailing_metadata)
    assert trailers["grpc-retry-pushback-ms"] == "15000"
    assert [detail.TypeName() for detail in error.status().details] == ["google.rpc.ErrorInfo", "google.rpc.RetryInfo"]


def test_a_watchdog_that_is_gone_is_told() -> None:
    """Who waits for a worker that nobody will restart is told so; a watchdog that beats is no news."""
    gone = refusal(known(seen("h:w", age_s=100), watchdogs={"h": 75.0}), now_s=5)
    assert gone.message == "worker offline (last seen 105s ago); its watchdog is gone too (last seen 80s ago)"
    assert gone.metadata["watchdog_last_seen_s"] == "80"
    there = refusal(known(seen("h:w", age_s=100), watchdogs={"h": 5.0, "other": 500.0}))
    assert there.message == "worker offline (last seen 100s ago)"
    lost = unreachable(seen("h:w"), known(seen("h:w"), watchdogs={"h": 75.0}), 0, "Socket closed", "r")
    assert "its watchdog is gone too" in lost.message
