"""RecoveryService: whatever an operator's client sends is answered or refused in words."""

import asyncio
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from hypothesis import example, given
from hypothesis import strategies as st

from service.auth.callers import ANYBODY
from service.errors import ApiError
from service.rpc import call_context
from tests.support.made_up import messages
from vllm_batch.v1 import recovery_service_pb2 as pb
from watchdog.servicer import RecoveryServicer

METHODS = pb.DESCRIPTOR.services_by_name["RecoveryService"].methods_by_name


class NoEvents:
    """A database whose audit log is empty."""

    async def read(self, function: Any, *args: Any) -> list[Any]:
        """Takes only what Postgres takes."""
        assert not any(isinstance(arg, str) and "\0" in arg for arg in args)
        return []


class Guard:
    """Takes every order, as one with a journal that can be written."""

    snapshot = None

    def order(self, kind: str, reason: str, lasts_s: float) -> None:
        """Takes only what can be recorded."""
        assert "\0" not in reason
        assert 0 <= lasts_s <= 24 * 3600


def answer(name: str, message: Any) -> Any:
    """What the servicer answers to a call of this name."""
    hosts: Any = [SimpleNamespace(by_worker={f"host:{one}": Guard()}) for one in ("worker", "gateway")]
    database: Any = NoEvents()
    call_context.begin("/test", ()).caller = ANYBODY
    return asyncio.run(getattr(RecoveryServicer(*hosts, database, 10), name)(message, None))


@given(
    st.sampled_from(sorted(METHODS)).flatmap(
        lambda name: st.tuples(
            st.just(name), messages(METHODS[name].input_type, {"worker_id": ["host:worker", "host:gateway"]})
        )
    )
)
@example(("PauseRecovery", pb.PauseRecoveryRequest(duration=Duration(seconds=2**62), reason="x")))
@example(("ResetBudget", pb.ResetBudgetRequest(worker_id="x" * 50_000, reason="x")))
def test_any_message(given: tuple[str, Any]) -> None:
    """Any message is answered, or refused with the code and a sentence for whoever sent it."""
    refusal = None
    try:
        assert answer(*given) is not None
    except ApiError as error:
        refusal = error
    codes = (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND)
    assert refusal is None or (refusal.code in codes and len(refusal.message) < 1000)


@pytest.mark.parametrize(
    ("duration", "is_right"),
    [
        (Duration(seconds=24 * 3600), True),
        (Duration(nanos=1000), True),
        (Duration(seconds=24 * 3600, nanos=1), False),
        (Duration(), False),
        (Duration(seconds=-1), False),
        (Duration(seconds=2**63 - 1), False),
    ],
)
def test_how_long_a_pause_may_last(duration: Duration, is_right: bool) -> None:
    """More than nothing, at most a day; any other number that a message can have is refused."""
    asked = pb.PauseRecoveryRequest(duration=duration, reason="x")
    if is_right:
        answer("PauseRecovery", asked)
        return
    with pytest.raises(ApiError, match="at most 24 hours"):
        answer("PauseRecovery", asked)
