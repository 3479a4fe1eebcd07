"""The watchdog guards every gateway of its host, and OpenAI's door. What follows from a frozen gateway is in the fault
matrix."""

import os
import re
import signal
from collections.abc import Sequence

import grpc
import psutil
import pytest

from tests.support.batches import lines
from tests.support.ports import free_ports
from tests.support.stacks import ROOT, FullStack, full_stack
from tests.support.waiting import until
from vllm_batch import Client
from vllm_batch.channel import open_channel
from vllm_batch.v1 import recovery_service_pb2 as rpb
from vllm_batch.v1 import recovery_service_pb2_grpc

OPERATIONS = (ROOT / "docs/operations.md").read_text()


def gateway_statuses(stack: FullStack) -> Sequence[rpb.WorkerStatus]:
    """What the watchdog says of each gateway, and of OpenAI's door; none before it has looked."""
    with open_channel(stack.watchdog) as channel:
        try:
            stub = recovery_service_pb2_grpc.RecoveryServiceStub(channel)
            return stub.GetStatus(rpb.GetStatusRequest(), timeout=30, wait_for_ready=True).gateways
        except grpc.RpcError:
            return ()


@pytest.mark.thorough
def test_each_of_several_gateways_is_guarded() -> None:
    """The watchdog probes each of two gateways set up as in docs/operations.md, and notices which of them is frozen."""
    port, metrics_port = free_ports() // 10, free_ports() // 10
    [documented] = re.findall(r"(?:    .*\n)+", OPERATIONS.partition("in `[program:gateway]`")[2])[:1]
    added = documented.replace("    ", "").replace("5100", str(port)).replace("5103", str(metrics_port))
    timing = {"BATCH_HEARTBEAT_INTERVAL_S": "0.5", "BATCH_CHECK_INTERVAL_S": "2"}
    with full_stack(BATCH_ENGINE="simulated", BATCH_GATEWAY_PORT=f"{port}0", **timing) as stack:
        stack.target = f"127.0.0.1:{port}0"
        stack.start_all()
        head, mark, tail = stack.conf.read_text().partition("[program:gateway]\n")
        stack.conf.write_text(head + mark + added + re.sub(r"^environment=.*\n", "", tail, count=1, flags=re.MULTILINE))
        stack.supervisorctl("update", "gateway")
        again = stack.script("start-all.sh")
        assert again.returncode == 0, again.stdout + again.stderr + stack.logs()

        def health() -> dict[str, str]:
            return {status.worker_id.partition(":")[2]: status.health for status in gateway_statuses(stack)}

        guarded = dict.fromkeys(("gateway_0", "gateway_1", "http"), "SERVING")
        until(lambda: health() == guarded, "both to be guarded", 60)
        assert [status.verdict for status in gateway_statuses(stack)] == [rpb.VERDICT_HEALTHY] * 3
        frozen = psutil.Process(stack.supervisor.info("gateway:gateway_1").pid)
        frozen.suspend()
        try:
            until(lambda: health()["gateway_1"] not in ("SERVING", "NOT_PROBED"), "the frozen one to be noticed", 60)
            assert health()["gateway_0"] == "SERVING"
        finally:
            frozen.resume()
        until(lambda: health()["gateway_1"] == "SERVING", "it to answer again", 60)
        with Client(f"127.0.0.1:{port}1", patience_s=60) as client:
            *_, done = client.watch(client.submit_lines(lines(3)).id)
        assert done.counts.completed == 3
        assert stack.restarts() == []


@pytest.mark.thorough
def test_openais_door_that_does_not_answer_is_restarted() -> None:
    """An http that is frozen, which would keep its clients waiting for ever, is restarted, and serves again."""
    timing = {"BATCH_HEARTBEAT_INTERVAL_S": "0.5", "BATCH_CHECK_INTERVAL_S": "2"}
    with full_stack(BATCH_ENGINE="simulated", **timing) as stack:
        stack.start_all()
        until(lambda: stack.status("http").verdict == rpb.VERDICT_HEALTHY, "it to be guarded", 60)
        frozen = stack.pid("http")
        os.kill(frozen, signal.SIGSTOP)
        until(lambda: [event.outcome for event in stack.restarts()] == ["recovered"], "it to be restarted", 120)
        [restart] = stack.restarts()
        assert (restart.worker_id.partition(":")[2], restart.verdict) == ("http", rpb.VERDICT_RPC_WEDGED)
        assert stack.pid("http") not in (0, frozen)
        again = stack.script("start-all.sh")
        assert again.returncode == 0, again.stdout + again.stderr
