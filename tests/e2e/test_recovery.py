"""Real vLLM under supervisord: worker and engine killed in the middle of batches, every request answered once."""

import json
import os
import signal
from collections.abc import Iterator

import psutil
import pytest

from service.db import recoveries
from service.processes import is_alive
from tests.support.stacks import FullStack, full_stack
from tests.support.waiting import until
from vllm_batch import Client
from vllm_batch.v1 import batch_service_pb2 as pb
from vllm_batch.v1 import recovery_service_pb2 as rpb

pytestmark = [pytest.mark.timeout(900), pytest.mark.xdist_group("recovery")]
COUNT = 40
# A few that finish early, to time the kill; the rest take far longer than a query of the batch.
SHORT = 10


def tokens(number: int) -> int:
    """How many tokens request `number` generates."""
    return 10 + number if number < SHORT else 150 + number


@pytest.fixture(scope="module")
def stack() -> Iterator[FullStack]:
    """One stack for all tests: a start takes half a minute."""
    with full_stack(BATCH_WINDOW="8", BATCH_RESTART_BACKOFF_MAX_S="1") as stack:
        stack.start_all()
        yield stack


def lines() -> Iterator[bytes]:
    for number in range(COUNT):
        body = {
            "model": "tiny",
            "messages": [{"role": "user", "content": f"Tell me something about the number {number}."}],
            "max_tokens": tokens(number),
            "ignore_eos": True,
            "temperature": 0,
        }
        yield json.dumps({"custom_id": f"c{number}", "url": "/v1/chat/completions", "body": body}).encode()


def engine_processes(pid: int) -> list[psutil.Process]:
    return [p for p in psutil.Process(pid).children(recursive=True) if p.cmdline() and "VLLM::" in p.cmdline()[0]]


def shared_memory(members: list[psutil.Process]) -> set[str]:
    """The files in /dev/shm that these processes have mapped."""
    return {used.path for p in members for used in p.memory_maps() if used.path.startswith("/dev/shm/")}


def run_and_break(
    stack: FullStack, victim: str, number: int = signal.SIGKILL
) -> tuple[rpb.RecoveryEvent, list[psutil.Process]]:
    """Runs a batch and signals the worker or its engine in the middle; checks all results.

    Returns the restart and the processes of the old engine.
    """
    before = len(stack.restarts())
    # Determined in advance: the batch must not be done before the kill.
    worker = stack.pid("worker")
    engine = engine_processes(worker)
    core = next(process for process in engine if "EngineCore" in process.cmdline()[0])
    with Client(stack.target) as client:
        batch = client.submit_lines(lines())
        until(lambda: client.get(batch.id).counts.completed >= SHORT, "a few results", 60)
        os.kill(worker if victim == "worker" else core.pid, number)
        assert client.get(batch.id).counts.completed < COUNT, "the batch was done before the kill: nothing was proven"
        until(lambda: stack.recovered(before + 1), "the worker to be recovered", 240)
        *_, done = client.watch(batch.id)
        results = list(client.results(batch.id))
    assert done.state == pb.BATCH_STATE_COMPLETED
    assert (done.counts.completed, done.counts.failed) == (COUNT, 0)
    assert [result.custom_id for result in results] == [f"c{i}" for i in range(COUNT)]
    for number, result in enumerate(results):
        body = json.loads(result.response.body_json)
        assert body["usage"]["completion_tokens"] == tokens(number)
    restarts = stack.restarts()
    assert len(restarts) == before + 1
    return restarts[-1], engine


@pytest.mark.thorough
def test_worker_killed_in_the_middle(stack: FullStack) -> None:
    """After SIGKILL the worker is restarted once as CRASHED, its engine is gone, and every request has one result."""
    event, engine = run_and_break(stack, "worker")
    assert event.verdict == rpb.VERDICT_CRASHED
    assert len(engine) == 1
    assert not any(is_alive(process) for process in engine)
    assert {timing.phase for timing in event.timings} == set(recoveries.PHASES)


def test_engine_killed_in_the_middle(stack: FullStack) -> None:
    """After SIGKILL of EngineCore no request fails, and the worker is restarted as ENGINE_DEAD."""
    event, engine = run_and_break(stack, "engine")
    assert event.verdict == rpb.VERDICT_ENGINE_DEAD
    assert not any(is_alive(process) for process in engine)


def test_engine_frozen_in_the_middle(stack: FullStack) -> None:
    """After SIGSTOP of EngineCore, which vLLM's own health check misses, the worker is restarted as ENGINE_STALLED."""
    event, engine = run_and_break(stack, "engine", signal.SIGSTOP)
    assert event.verdict == rpb.VERDICT_ENGINE_STALLED
    seen = json.loads(event.evidence_json)
    assert (seen["health"], seen["heartbeat"]["phase"]) == ("NOT_SERVING", "stalled")
    assert not any(is_alive(process) for process in engine)


def test_operator_stop_stays(stack: FullStack) -> None:
    """After `supervisorctl stop` engine and shared memory are gone, and the watchdog leaves the worker stopped."""
    before = len(stack.restarts())
    worker = stack.pid("worker")
    engine = engine_processes(worker)
    shared = shared_memory([psutil.Process(worker), *engine])
    assert "stopped" in stack.supervisorctl("stop", "worker")
    until(lambda: stack.status().verdict == rpb.VERDICT_OPERATOR_STOP, "the watchdog to see the stop")
    assert not any(is_alive(process) for process in engine)
    assert not [path for path in shared if os.path.exists(path)]
    assert len(stack.restarts()) == before
