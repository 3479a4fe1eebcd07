"""Which worker gets new work, and what a client is told when there is none."""

from uuid import uuid4

import grpc
import pytest

from service.db.heartbeats import Beat, Phase, SeenBeat
from service.errors import ApiError
from service.gateway.workers import Freshness, choose


def seen(name: str = "w", phase: Phase = Phase.READY, age_s: float = 1, queued: int = 0) -> SeenBeat:
    return SeenBeat(Beat(name, uuid4(), f"{name}:1", phase, 1, queued=queued), age_s)


def refusal(freshness: Freshness, now_s: float = 0) -> ApiError:
    with pytest.raises(ApiError) as caught:
        choose(freshness, now_s, timeout_s=60)
    assert caught.value.code is grpc.StatusCode.UNAVAILABLE
    assert caught.value.retry_delay_s
    return caught.value


def test_least_queued_worker_is_chosen() -> None:
    """Among live workers the one with the least queued; stale and loading ones do not count."""
    workers = [
        seen("busy", queued=9),
        seen("idle", queued=2),
        seen("stale", age_s=61),
        seen("loading", phase=Phase.LOADING),
    ]
    assert choose(Freshness(workers), 0, 60).beat.worker_id == "idle"


def test_age_grows_between_looks() -> None:
    """A heartbeat that was fresh when it was read is stale when nothing was read since."""
    freshness = Freshness([seen(age_s=50)], read_at_s=100)
    assert choose(freshness, 109, 60)
    assert refusal(freshness, 111).message == "worker offline (last seen 61s ago)"


@pytest.mark.parametrize(
    ("freshness", "reason", "message"),
    [
        (Freshness(), "WORKER_OFFLINE", "worker offline (never seen)"),
        (Freshness([seen(age_s=72)]), "WORKER_OFFLINE", "worker offline (last seen 72s ago)"),
        (Freshness([seen(phase=Phase.STARTING)]), "WORKER_LOADING", "worker is starting"),
        (Freshness([seen(phase=Phase.LOADING)]), "WORKER_LOADING", "worker is loading"),
        (Freshness([seen(phase=Phase.STALLED)]), "WORKER_STALLED", "stalled"),
        (Freshness([seen(phase=Phase.ENGINE_DEAD)]), "WORKER_STALLED", "engine_dead"),
        (Freshness([seen(phase=Phase.DRAINING)]), "WORKER_OFFLINE", "worker is draining"),
        (Freshness([seen(age_s=72)], given_up=frozenset({"w"})), "RECOVERY_GAVE_UP", "vllm-batch recovery reset"),
        (Freshness([seen(phase=Phase.ENGINE_DEAD)], given_up=frozenset({"w"})), "RECOVERY_GAVE_UP", "has not helped"),
        (
            Freshness([seen(age_s=72), seen("v", phase=Phase.LOADING)], given_up=frozenset({"w"})),
            "WORKER_LOADING",
            "worker is loading",
        ),
        (Freshness([seen()], failure="refused"), "DATABASE_UNAVAILABLE", "database unavailable: refused"),
    ],
)
def test_refusals_say_why(freshness: Freshness, reason: str, message: str) -> None:
    """Each reason for having no worker has its own word and text."""
    error = refusal(freshness)
    assert error.reason == reason
    assert message in error.message


def test_errors_carry_their_details() -> None:
    """The trailers of an error hold google.rpc details and the delay for gRPC's own retries."""
    error = refusal(Freshness([seen(age_s=72)]))
    trailers = dict(error.trailing_metadata())
    assert trailers["grpc-retry-pushback-ms"] == "15000"
    assert [detail.TypeName() for detail in error.status().details] == ["google.rpc.ErrorInfo", "google.rpc.RetryInfo"]
