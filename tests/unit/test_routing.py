"""Which worker gets new work, and how clients are refused when there is none."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import repeat
from uuid import uuid4

import grpc
import pytest

from service.db.heartbeats import Beat, Phase, SeenBeat
from service.errors import ApiError
from service.insight.routing import Contact, Freshness, LinkState, Load, live, spread, unreachable

TIMINGS = {"w": {"detect": 1.0, "stop": 2.0, "start": 3.0, "load": 40.0}}


def seen(
    name: str = "w",
    phase: Phase = Phase.READY,
    age_s: float = 1,
    queued: int = 0,
    models: tuple[str, ...] = ("m",),
    life_s: float = 100,
    has_served: bool = False,
    **detail: object,
) -> SeenBeat:
    beat = Beat(name, uuid4(), f"{name}:1", phase, 1, models, queued, detail=detail)
    return SeenBeat(beat, age_s, life_s, has_served)


def known(
    *workers: SeenBeat,
    health: Mapping[str, LinkState] | None = None,
    since_s: float = 0,
    read_at_s: float = 0,
    given_up: str = "",
    timings: Mapping[str, Mapping[str, float]] | None = None,
    failure: str = "",
) -> Freshness:
    """Each worker's link state follows from its phase, unless `health` gives another for its name.

    There is no link to one that has long been gone.
    """
    contacts = {}
    for one in workers:
        said = LinkState.SERVING if one.beat.phase == Phase.READY else LinkState.NOT_SERVING
        said = (health or {}).get(one.beat.worker_id, said if one.age_s <= 60 else LinkState.UNKNOWN)
        contacts[one.beat.address] = Contact(said, since_s, "Socket closed" if said is LinkState.UNREACHABLE else "")
    return Freshness(
        workers,
        read_at_s,
        given_up=frozenset(given_up.split()),
        timings=timings or {},
        failure=failure,
        contacts=contacts,
    )


def chosen(freshness: Freshness, *models: str, now_s: float = 0) -> list[str]:
    """The workers that are tried first: those that serve as many of the models."""
    able = live(freshness, now_s, 60, frozenset(models), are_all=True)
    most = max(len({*models} & set(one.beat.models)) for one in able)
    return [one.beat.worker_id for one in able if len({*models} & set(one.beat.models)) == most]


def spread_out(freshness: Freshness, loads: Mapping[str, Load], draws: Iterator[float] | None = None) -> list[str]:
    order = spread(live(freshness, 0, 60), freshness, 0, loads, lambda: next(draws or repeat(0.0)))
    return [one.beat.worker_id for one in order]


def refusal(freshness: Freshness, *models: str, now_s: float = 0) -> ApiError:
    with pytest.raises(ApiError) as caught:
        live(freshness, now_s, 60, frozenset(models), are_all=True)
    assert caught.value.code is grpc.StatusCode.UNAVAILABLE
    assert caught.value.retry_delay_s
    return caught.value


def test_only_live_workers_are_chosen() -> None:
    """Stale, loading and unreachable workers do not count."""
    workers = [
        seen("a"),
        seen("b"),
        seen("stale", age_s=61),
        seen("loading", phase=Phase.LOADING),
        seen("lost"),
    ]
    assert chosen(known(*workers, health={"lost": LinkState.UNREACHABLE})) == ["a", "b"]


def test_calls_are_spread() -> None:
    """First the worker with the fewest calls under way, then the one that had none for longest, then by chance."""
    workers = [seen("a", queued=9), seen("b"), seen("c"), seen("d")]
    loads = {"a": Load(0, 5.0), "b": Load(1, 1.0), "c": Load(0, 4.0)}
    draws = iter([0.4, 0.3, 0.2, 0.1])
    assert spread_out(known(*workers), loads, draws) == ["d", "c", "a", "b"]
    draws = iter([0.4, 0.3, 0.2, 0.1])
    assert spread_out(known(*workers), {}, draws) == ["d", "c", "b", "a"]


def test_a_model_that_batches_wait_for_may_come_back() -> None:
    """Its new batches are refused for now, not for good, also when its last worker was forgotten or gone long ago."""
    there = seen("w")
    one = refusal(replace(known(there), awaited=frozenset({"gone", "other"})), "gone")
    assert (one.reason, one.metadata) == ("WORKER_OFFLINE", {"models": "gone"})
    assert one.message == "no worker serves gone now, and batches in progress wait for one that does"
    away = seen("v", models=("gone",), age_s=10 * 86_400)
    assert refusal(known(there, away), "gone").reason == "WORKER_OFFLINE"
    assert chosen(known(there), "gone") == ["w"]


def test_a_worker_whose_heartbeats_are_missing_comes_last() -> None:
    """One that has missed two heartbeats may have lost its database: others come first, however busy they are."""
    workers = [seen("late", age_s=11), seen("slow", age_s=11, interval_s=30), seen("busy")]
    loads = {"slow": Load(1, 1.0), "busy": Load(2, 2.0)}
    assert spread_out(known(*workers), loads) == ["slow", "busy", "late"]
    assert spread_out(known(workers[0]), loads) == ["late"]


def test_age_grows_between_looks() -> None:
    """A heartbeat ages between reads, so a fresh one becomes stale if nothing is read after it."""
    freshness = known(seen(age_s=50), read_at_s=100)
    assert chosen(freshness, now_s=109) == ["w"]
    assert "has not written its heartbeat to Postgres for 61s" in refusal(freshness, now_s=111).message


def test_a_link_to_a_successor_says_nothing_of_the_one_before() -> None:
    """A worker that is gone is offline, though another one answers at its address."""
    there = seen("v", age_s=61)
    gone = replace(there, beat=replace(there.beat, worker_id="w"), age_s=72)
    both = known(gone, there, health={"v": LinkState.SERVING})
    assert "worker v works, but" in refusal(both).message
    assert "worker offline (last seen 72s ago)" in refusal(replace(both, given_up=frozenset({"v"}))).message


@pytest.mark.parametrize("health", [LinkState.UNKNOWN, LinkState.NOT_SERVING, LinkState.UNREACHABLE])
def test_a_fresh_heartbeat_is_not_enough(health: LinkState) -> None:
    """New work goes only to a worker whose link says SERVING, however fresh its heartbeat is."""
    error = refusal(known(seen(), health={"w": health}))
    assert (error.reason, error.metadata["phase"]) == ("WORKER_OFFLINE", "ready")


def test_the_link_is_newer_than_the_phase() -> None:
    """A worker whose link says SERVING gets work even if its last heartbeat still says loading."""
    assert chosen(known(seen(phase=Phase.LOADING), health={"w": LinkState.SERVING})) == ["w"]


def test_workers_of_different_models() -> None:
    """A batch goes to a worker that serves its models."""
    workers = [seen("a", models=("m", "m-lora")), seen("b", models=("n",))]
    assert chosen(known(*workers), "m") == ["a"]
    assert chosen(known(*workers), "m", "m-lora") == ["a"]
    assert chosen(known(*workers), "n") == ["b"]
    assert chosen(known(*workers)) == ["a", "b"]


def test_a_model_that_nobody_serves() -> None:
    """A batch for a model that no worker serves goes to any live worker, which will reject it."""
    assert chosen(known(seen("a", models=("m",)), seen("b", models=("n",))), "x") == ["a", "b"]


def test_models_of_several_workers() -> None:
    """A batch that no single worker can run goes to one that runs some of it, also while the others are away."""
    workers = [seen("a", models=("m",)), seen("b", models=("n",)), seen("c", models=("o",))]
    assert chosen(known(*workers), "m", "n") == ["a", "b"]
    assert chosen(known(*workers, seen("d", models=("m", "n"))), "m", "n") == ["d"]
    assert chosen(known(workers[0], seen("b", models=("n",), age_s=600)), "m", "n") == ["a"]
    assert refusal(known(workers[2], seen("b", models=("m", "n"), age_s=600)), "m", "n").reason == "WORKER_OFFLINE"


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (seen("b", models=("n",), age_s=600), "WORKER_OFFLINE"),
        (seen("b", models=("n",), phase=Phase.STALLED), "WORKER_STALLED"),
        (seen("b", models=(), phase=Phase.LOADING), "WORKER_LOADING"),
    ],
)
def test_a_model_whose_worker_is_away_is_waited_for(other: SeenBeat, reason: str) -> None:
    """A batch that only an absent worker can serve is refused as retryable instead of going to another worker."""
    workers = known(seen("a", models=("m",)), other)
    error = refusal(workers, "n")
    assert (error.reason, error.metadata["worker_id"]) == (reason, "b")
    assert chosen(workers, "m") == ["a"]


def test_workers_that_cannot_be_called_from_here() -> None:
    """They serve their models like any others, and are no reason why a model of others is away."""
    freshness = replace(known(seen("a"), seen("b", age_s=72, models=("n",))), unreachable=[seen("c", models=("o",))])
    assert refusal(freshness, "n").message == "no worker serves n now: worker offline (last seen 72s ago)"
    freshness = replace(freshness, unreachable=[seen("c", models=("n",))])
    assert chosen(freshness, "n") == ["a"]


def test_a_worker_that_never_said_its_models_is_forgotten() -> None:
    """One that began to load and was not seen for a day is not waited for: it would be for any model."""
    loading = seen("b", models=(), phase=Phase.LOADING, age_s=90_000)
    assert chosen(known(seen("a", models=("m",)), loading), "n") == ["a"]


@pytest.mark.parametrize(
    ("freshness", "reason", "message"),
    [
        (known(), "WORKER_OFFLINE", "worker offline (never seen)"),
        (known(seen(age_s=72)), "WORKER_OFFLINE", "worker offline (last seen 72s ago)"),
        (
            known(seen(age_s=72), health={"w": LinkState.SERVING}),
            "WORKER_OFFLINE",
            "worker w works, but has not written its heartbeat to Postgres for 72s: see `database_away` in",
        ),
        (
            replace(known(seen("v", age_s=72)), unreachable=[seen()]),
            "WORKER_OFFLINE",
            "worker w announces w:1, at which only its own host reaches it: correct BATCH_HOST there",
        ),
        (replace(known(), unreachable=[seen(age_s=72)]), "WORKER_OFFLINE", "worker offline (never seen)"),
        (known(seen(), health={"w": LinkState.UNREACHABLE}), "WORKER_OFFLINE", "worker offline (last seen 1s ago)"),
        # It beats, and has long been out of reach: its address changed, or there is none of a kind that both have.
        (
            known(seen(), health={"w": LinkState.UNREACHABLE}, since_s=-20),
            "WORKER_OFFLINE",
            "worker w reaches Postgres, but cannot be called from here, at w:1: Socket closed",
        ),
        (
            known(seen(age_s=22), health={"w": LinkState.UNREACHABLE}, since_s=-20),
            "WORKER_OFFLINE",
            "worker offline (last seen 22s ago)",
        ),
        (known(seen(), health={"w": LinkState.UNKNOWN}), "WORKER_OFFLINE", "has not answered yet"),
        (known(seen(), health={"w": LinkState.NOT_SERVING}), "WORKER_OFFLINE", "has just stopped serving"),
        (known(seen(phase=Phase.STARTING)), "WORKER_LOADING", "worker is starting"),
        (known(seen(phase=Phase.LOADING)), "WORKER_LOADING", "worker is loading"),
        (known(seen(phase=Phase.STALLED)), "WORKER_STALLED", "stalled"),
        (known(seen(phase=Phase.ENGINE_DEAD)), "WORKER_STALLED", "engine_dead"),
        (known(seen(phase=Phase.DRAINING)), "WORKER_OFFLINE", "worker is draining"),
        (known(seen(age_s=72), given_up="w"), "RECOVERY_GAVE_UP", "vllm-batch recovery reset"),
        (known(seen(phase=Phase.ENGINE_DEAD), given_up="w"), "RECOVERY_GAVE_UP", "the restart budget is exhausted"),
        (
            known(seen(age_s=72), seen("v", phase=Phase.LOADING), given_up="w"),
            "WORKER_LOADING",
            "worker is loading",
        ),
        (known(seen(), failure="refused"), "DATABASE_UNAVAILABLE", "database unavailable: refused"),
    ],
)
def test_refusals_say_why(freshness: Freshness, reason: str, message: str) -> None:
    """Each reason for having no worker has its own error reason and message."""
    error = refusal(freshness)
    assert error.reason == reason
    assert message in error.message


WHY = {"cause": "no such model", "advice": "Check BATCH_MODEL"}
BEFORE = {f"last_{name}": text for name, text in WHY.items()}


@pytest.mark.parametrize(
    ("freshness", "reason", "message"),
    [
        (
            known(seen(phase=Phase.STOPPING, age_s=72, **WHY)),
            "WORKER_OFFLINE",
            "worker offline (last seen 72s ago): no such model",
        ),
        (
            known(seen(phase=Phase.STOPPING, **WHY), health={"w": LinkState.UNREACHABLE}),
            "WORKER_OFFLINE",
            "worker offline (last seen 1s ago): no such model",
        ),
        (
            known(seen(phase=Phase.ENGINE_DEAD, **WHY)),
            "WORKER_STALLED",
            "worker's engine is not working: engine_dead: no such model",
        ),
        (
            known(seen(phase=Phase.LOADING, **BEFORE)),
            "WORKER_LOADING",
            "worker is loading (last seen 1s ago); its last start failed: no such model",
        ),
        (
            known(seen(phase=Phase.STOPPING, age_s=72, **WHY), given_up="w"),
            "RECOVERY_GAVE_UP",
            "worker offline (last seen 72s ago); it cannot start: no such model. Check BATCH_MODEL. It is",
        ),
        (
            known(seen(phase=Phase.ENGINE_DEAD, has_served=True, **WHY), given_up="w"),
            "RECOVERY_GAVE_UP",
            "worker offline (last seen 1s ago): no such model, and the restart budget is exhausted",
        ),
        (
            known(seen(phase=Phase.LOADING, **BEFORE), given_up="w"),
            "WORKER_LOADING",
            "worker is loading (last seen 1s ago); its last start failed: no such model",
        ),
    ],
    ids=["ended", "just ended", "engine dead", "loading again", "cannot start", "budget spent", "started by a person"],
)
def test_refusals_name_the_root_cause(freshness: Freshness, reason: str, message: str) -> None:
    """When the engine failed, the refusal names its root cause and advice in the message and the metadata."""
    error = refusal(freshness)
    assert error.reason == reason
    assert error.message.startswith(message)
    assert (error.metadata["cause"], error.metadata["advice"]) == ("no such model", "Check BATCH_MODEL")


@pytest.mark.parametrize(
    ("freshness", "delay_s"),
    [
        # Never recovered before: the defaults.
        (known(seen(age_s=72)), 15),
        (known(seen(), health={"w": LinkState.UNREACHABLE}), 5),
        (known(seen(phase=Phase.LOADING, life_s=7)), 5),
        # The last load took 40 s, the last recovery 46 s.
        (known(seen(phase=Phase.LOADING, life_s=7), timings=TIMINGS), 33),
        (known(seen(phase=Phase.LOADING, life_s=45), timings=TIMINGS), 1),
        (known(seen(phase=Phase.LOADING, life_s=90), timings=TIMINGS), 5),
        (known(seen(), health={"w": LinkState.UNREACHABLE}, since_s=-6, timings=TIMINGS), 40),
        (known(seen(phase=Phase.STALLED), since_s=-16, timings=TIMINGS), 30),
        (known(seen(age_s=100), timings=TIMINGS), 15),
        (known(seen(), health={"w": LinkState.NOT_SERVING}), 1),
        (known(seen(age_s=72), given_up="w"), 300),
    ],
)
def test_the_delay_is_what_is_left_of_the_last_recovery(freshness: Freshness, delay_s: float) -> None:
    """The retry delay is what remains of the last recovery or load, or a default if there was none."""
    assert refusal(freshness).retry_delay_s == delay_s


def test_a_worker_that_does_not_answer() -> None:
    """A client whose call reached a dead worker gets the request_id under which the batch may have been stored."""
    worker = seen()
    error = unreachable(worker, known(worker), 0, "Socket closed", "made-1")
    assert (error.reason, error.metadata["cause"], error.metadata["request_id"]) == (
        "WORKER_OFFLINE",
        "Socket closed",
        "made-1",
    )
    assert unreachable(worker, known(worker, given_up="w"), 0, "", "made-1").reason == "RECOVERY_GAVE_UP"


def test_errors_carry_their_details() -> None:
    """An error's trailers hold google.rpc details and the delay for gRPC's own retries."""
    error = refusal(known(seen(age_s=72)))
    trailers = dict(error.trailing_metadata)
    assert trailers["grpc-retry-pushback-ms"] == "15000"
    assert [detail.TypeName() for detail in error.status().details] == ["google.rpc.ErrorInfo", "google.rpc.RetryInfo"]


def test_a_watchdog_that_is_gone_is_told() -> None:
    """A refusal says so when the worker's watchdog is gone too, and only then."""
    gone = refusal(known(replace(seen("h:w", age_s=100), watchdog_age_s=75.0)), now_s=5)
    assert gone.message == "worker offline (last seen 105s ago); its watchdog is gone too (last seen 80s ago)"
    assert gone.metadata["watchdog_last_seen_s"] == "80"
    there = refusal(known(replace(seen("h:w", age_s=100), watchdog_age_s=5.0)))
    assert there.message == "worker offline (last seen 100s ago)"
    lost = unreachable(replace(seen("h:w"), watchdog_age_s=75.0), known(), 0, "Socket closed", "r")
    assert "its watchdog is gone too" in lost.message
