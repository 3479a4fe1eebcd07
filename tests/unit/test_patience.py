"""When a start script that waits for the gateway gives up, and what it reports."""

from collections.abc import Sequence
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from scripts.wait_until_accepting import FAILING_S, SILENT_S, Patience, Refusal, last_words, main
from vllm_batch.channel import BATCH_SERVICE
from vllm_batch.v1 import batch_service_pb2 as pb
from vllm_batch.v1 import batch_service_pb2_grpc

LOAD_S = 1800.0
ALL = {"postgres": "RUNNING", "gateway": "RUNNING", "worker": "RUNNING", "watchdog": "RUNNING"}
NO_ANSWER = Refusal("failed to connect to all addresses")


def ends_after_s(
    states: Sequence[dict[str, str]], *, is_silent: bool = False, listens: bool = True, until_s: float = LOAD_S + 10
) -> float:
    """The second at which waiting ends, if the given states follow one another, one a second."""
    patience = Patience(0.0, LOAD_S)
    for second in range(int(until_s)):
        if patience.is_over(
            float(second), NO_ANSWER, states[second % len(states)], is_silent=is_silent, listens=listens
        ):
            return float(second)
    return until_s


@pytest.mark.parametrize("program", ["postgres", "gateway", "watchdog", "worker"])
@pytest.mark.parametrize(
    "cycle",
    [
        ["FATAL"],
        ["EXITED"],
        ["BACKOFF"],
        # How supervisord shows a program that exits at each start.
        ["STARTING", "BACKOFF"],
        ["STARTING", "BACKOFF", "BACKOFF", "BACKOFF"],
        # And a program that lives for a second or two.
        ["RUNNING", "RUNNING", "EXITED", "STARTING"],
    ],
)
def test_a_program_that_does_not_stay_up(program: str, cycle: list[str]) -> None:
    """Whether a program is down or keeps restarting, waiting ends within 35 s."""
    assert ends_after_s([ALL | {program: state} for state in cycle]) <= 35


def test_supervisord_that_is_not_there() -> None:
    """Waiting ends soon when no supervisord is running."""
    assert ends_after_s([{}]) <= 30
    assert ends_after_s([{"unix:///home/run/supervisor.sock": "no"}]) <= 30


def test_a_gateway_that_runs_and_does_not_answer() -> None:
    """Waiting ends within 30 s when a running gateway does not answer, for example because of a wrong port or TLS."""
    assert SILENT_S <= ends_after_s([ALL], is_silent=True) <= 30
    # On a slow machine it begins to listen late.
    assert 60 <= ends_after_s([ALL], is_silent=True, listens=False) <= 65
    patience = Patience(0.0, LOAD_S)
    for second in range(1, 50):
        assert not patience.is_over(float(second), NO_ANSWER, ALL, is_silent=True, listens=False)
    assert not patience.is_over(50.0, NO_ANSWER, ALL, is_silent=True)
    assert patience.is_over(50.0 + SILENT_S + 1, NO_ANSWER, ALL, is_silent=True)
    # While it starts it need not answer.
    starting = [ALL | {"gateway": "STARTING"}]
    assert ends_after_s(starting, is_silent=True, until_s=100) == 100


def test_a_model_that_loads_for_long() -> None:
    """While every program runs, only BATCH_LOAD_TIMEOUT_S ends the wait."""
    assert ends_after_s([ALL]) > LOAD_S


def test_a_program_that_came_up_after_all() -> None:
    """A program that failed at first and then runs no longer counts as failing."""
    patience = Patience(0.0, LOAD_S)
    for second in range(int(FAILING_S)):
        state = "BACKOFF" if second < 5 else "RUNNING"
        assert not patience.is_over(float(second), NO_ANSWER, ALL | {"postgres": state}, is_silent=False)
    assert not patience.is_over(1000.0, NO_ANSWER, ALL, is_silent=False)
    assert patience.failing(1000.0, ALL) == []


@pytest.mark.parametrize(
    ("log", "told"),
    [
        ('{"event": "x", "level": "info"}\nTraceback\n  File\nOSError: no room\n', "OSError: no room"),
        ("initdb failed: no such user\n\n", "initdb failed: no such user"),
        ('{"event": "failed", "level": "error", "cause": "why"}\n{"event": "y", "level": "info"}\n', "failed: why"),
        ('{"event": "y", "level": "info"}\n', ""),
        ("", ""),
    ],
)
def test_last_words(log: str, told: str, tmp_path: Path) -> None:
    """The last line of a log that names an error is found, in JSON or plain text."""
    path = tmp_path / "log"
    path.write_text(log)
    assert last_words(path) == told


def test_several_processes_of_a_program() -> None:
    """Several gateways and workers, which supervisord lists with their program, are waited for like one of each."""
    several = {"gateway:gateway_0": "RUNNING", "gateway:gateway_1": "RUNNING", "worker:worker_0": "RUNNING"}
    assert ends_after_s([several], until_s=100) == 100
    assert ends_after_s([several], is_silent=True, until_s=100) <= SILENT_S + 2
    assert ends_after_s([several | {"gateway:gateway_1": "FATAL"}]) <= 35


class _Gateway(batch_service_pb2_grpc.BatchServiceServicer):
    """Says for two calls that it is away, as a channel does that waits before it connects again."""

    def __init__(self) -> None:
        self.calls = 0

    def GetServiceStatus(self, request: pb.GetServiceStatusRequest, context: Any) -> Any:
        self.calls += 1
        if self.calls <= 2:
            context.abort(grpc.StatusCode.UNAVAILABLE, "Connection refused")
        return pb.GetServiceStatusResponse(models=["served"])


def test_the_status_after_the_health(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A start whose health says SERVING before GetServiceStatus gets through succeeds and names the model served."""
    server = grpc.server(futures.ThreadPoolExecutor(4))
    health_servicer = health.HealthServicer()
    health_servicer.set(BATCH_SERVICE, health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
    gateway = _Gateway()
    batch_service_pb2_grpc.add_BatchServiceServicer_to_server(gateway, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    monkeypatch.setenv("BATCH_GATEWAY_PORT", str(port))
    try:
        assert main("supervisord.conf") == 0
    finally:
        server.stop(None).wait(5)
    assert gateway.calls == 3
    assert '"model": "served"' in capsys.readouterr().out
