"""Every screen shows why a worker cannot start, on a stack whose watchdog gave up after three failed starts."""

import json
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.screens import refusal, screens
from tests.support.sentry_receiver import Receiver, receiving
from tests.support.stacks import FullStack, full_stack
from tests.support.waiting import until
from vllm_batch.v1 import recovery_service_pb2 as rpb

FAILURE = "libnuma.so.1: cannot open shared object file: No such file or directory"
ADVICE = "apt-get install libnuma1"


@pytest.fixture(scope="module")
def receiver() -> Iterator[Receiver]:
    """A local stand-in for Sentry."""
    with receiving() as receiver:
        yield receiver


@pytest.fixture(scope="module")
def failed(receiver: Receiver) -> Iterator[tuple[FullStack, "subprocess.CompletedProcess[str]"]]:
    """A stack whose worker cannot start, and the result of its start-all.sh."""
    settings = {
        "BATCH_ENGINE": "simulated",
        "BATCH_SIMULATED_LOAD_FAILURE": FAILURE,
        "BATCH_HEARTBEAT_INTERVAL_S": "0.5",
        "BATCH_RESTART_BACKOFF_MAX_S": "1",
        "SENTRY_DSN": receiver.dsn,
    }
    with full_stack(**settings) as stack:
        yield stack, stack.script("start-all.sh")


Failed = tuple[FullStack, "subprocess.CompletedProcess[str]"]


def test_start_all_ends_with_the_cause(failed: Failed) -> None:
    """The last line of start-all.sh states the cause and the remedy."""
    _, started = failed
    assert started.returncode == 1
    assert started.stderr.strip().splitlines()[-1] == f"start: FAILED: {FAILURE}. {ADVICE}"


def test_audit_log_has_two_restarts_and_a_give_up(failed: Failed) -> None:
    """After three starts that fail alike the watchdog gives up and leaves the rest of the budget unspent."""
    stack, _ = failed
    events = stack.audit()
    assert [event.kind for event in events if event.kind != "verdict"] == ["restart", "restart", "gave_up"]
    assert all(FAILURE in event.reason for event in events if event.kind != "verdict")
    assert events[-1].verdict == rpb.VERDICT_START_FAILED
    assert ADVICE in events[-1].reason


def test_gateway_refuses_with_cause_and_advice(failed: Failed) -> None:
    """The gateway's refusal names cause and advice in its metadata."""
    stack, _ = failed
    error = refusal(stack)
    assert (error.reason, error.metadata["cause"]) == ("RECOVERY_GAVE_UP", FAILURE)
    assert error.metadata["advice"] == ADVICE


def test_every_screen_shows_it(failed: Failed) -> None:
    """Refusal, audit log and the operator's commands show cause and advice; for `top` see tests/unit/test_top.py."""
    stack, _ = failed
    for name, shown in screens(stack).items():
        assert FAILURE in shown, name
        assert ADVICE in shown, name


def test_sentry_is_told_once(failed: Failed, receiver: Receiver) -> None:
    """Sentry receives exactly one alert, which includes the reason."""
    until(lambda: _alerts(receiver), "the alert")
    [alert] = _alerts(receiver)
    assert f"{FAILURE}. {ADVICE}" in json.dumps(alert)


def _alerts(receiver: Receiver) -> list[dict[str, Any]]:
    return [event for event in receiver.events if event.get("tags", {}).get("kind") == "start_failed"]


@pytest.mark.thorough
def test_a_change_of_settings_begins_anew() -> None:
    """When `.env` is corrected, the watchdog restarts the worker by itself and the audit log says why."""
    with full_stack(BATCH_ENGINE="simulated", BATCH_HEARTBEAT_INTERVAL_S="0.5", BATCH_CHECK_INTERVAL_S="2") as stack:
        env_file = stack.home / "settings.env"
        env_file.write_text(f"BATCH_SIMULATED_LOAD_FAILURE='{FAILURE}'\n")
        stack.env["BATCH_ENV_FILE"] = str(env_file)
        assert stack.script("start-all.sh").returncode == 1
        env_file.write_text("")
        until(lambda: stack.restarts()[-1].outcome == "recovered", "the worker to be restarted and to serve", 90)
        [ended] = [event for event in stack.audit() if event.kind == "give_up_ended"]
        assert ended.reason == "the settings changed"
        assert not stack.status().gave_up
        # And a worker that serves no longer shows an earlier cause.
        assert not stack.status().cause
