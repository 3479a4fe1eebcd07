"""Which incarnations of a worker count as failed starts."""

from typing import Any
from uuid import UUID

import pytest

from service.db.heartbeats import Beat, Phase, SeenBeat
from watchdog.observe.failed_start import failed_start
from watchdog.policy import FailedStart

LIFE = UUID(int=7)
TOLD = {"cause": "no such model: nowhere", "advice": "Check BATCH_MODEL.", "cause_key": "no such model: #"}


def seen(phase: Phase, has_served: bool = False, **detail: Any) -> SeenBeat:
    beat = Beat("host:worker", LIFE, "127.0.0.1:1", phase, 7, settings="s", detail=detail)
    return SeenBeat(beat, 1.0, has_served=has_served)


@pytest.mark.parametrize("phase", [Phase.LOADING, Phase.STOPPING, Phase.ENGINE_DEAD])
@pytest.mark.parametrize("has_ended", [True, False])
def test_a_life_that_says_why_it_failed(phase: Phase, has_ended: bool) -> None:
    """Cause, advice and the key that compares failures are taken from the worker's own report."""
    expected = FailedStart(str(LIFE), "s", TOLD["cause"], TOLD["advice"], TOLD["cause_key"])
    assert failed_start(seen(phase, **TOLD), has_ended) == expected


def test_a_cause_that_recurs() -> None:
    """That every start with the settings fails so is the worker's to know; workers of before say nothing of it."""
    told = failed_start(seen(Phase.STOPPING, **TOLD, cause_recurs="true"), has_ended=True)
    assert told is not None
    assert told.recurs
    assert failed_start(seen(Phase.STOPPING, True, **TOLD, cause_recurs="true"), has_ended=True) is None
    not_told = failed_start(seen(Phase.STOPPING, **TOLD), has_ended=True)
    assert not_told is not None
    assert not not_told.recurs


def test_a_life_that_ended_while_it_loaded_without_a_word() -> None:
    """A worker that dies while loading without a report, such as one killed for lack of memory, failed to start."""
    found = failed_start(seen(Phase.LOADING), has_ended=True)
    assert found is not None
    assert "while loading" in found.cause
    assert "dmesg" in found.advice


@pytest.mark.parametrize(
    ("last", "has_ended"),
    [
        (seen(Phase.LOADING), False),
        (seen(Phase.READY), True),
        (seen(Phase.STOPPING), True),
        (seen(Phase.DRAINING), True),
        (seen(Phase.LOADING, has_served=True), True),
        (seen(Phase.ENGINE_DEAD, has_served=True, **TOLD), True),
        (seen(Phase.LOADING, last_cause="of the life before"), False),
    ],
    ids=["loading", "ready", "told to end", "draining", "has served", "died after it served", "of the life before"],
)
def test_a_life_that_did_not_fail_to_start(last: SeenBeat, has_ended: bool) -> None:
    """A life that is still loading, became ready, was told to stop, or has served before is no failed start."""
    assert failed_start(last, has_ended) is None
