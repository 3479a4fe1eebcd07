"""A worker that starts while Postgres is away waits for it, and is left alone while it does."""

import os
import signal

import pytest

from tests.support.batches import lines
from tests.support.stacks import full_stack
from tests.support.waiting import until
from vllm_batch import Client
from vllm_batch.v1 import batch_service_pb2 as pb
from vllm_batch.v1 import recovery_service_pb2 as rpb

pytestmark = [pytest.mark.timeout(300), pytest.mark.thorough]

# Less than the outage lasts, and than what is left of the deadline of a process that has waited so long.
LOAD_TIMEOUT_S = 45
SETTINGS = {
    "BATCH_ENGINE": "simulated",
    "BATCH_SIMULATED_LOAD_S": "8",
    "BATCH_LOAD_TIMEOUT_S": str(LOAD_TIMEOUT_S),
    "BATCH_HEARTBEAT_INTERVAL_S": "0.5",
    "BATCH_HEARTBEAT_TIMEOUT_S": "5",
    "BATCH_CHECK_INTERVAL_S": "1",
    "BATCH_DATABASE_TIMEOUT_S": "2",
}


def test_waits_for_longer_than_a_start_may_take() -> None:
    """A worker that crashed while Postgres was away is started once, waits for longer than the load timeout, and has
    the whole of it again when Postgres is back.
    """
    with full_stack(**SETTINGS) as stack, Client(stack.target, patience_s=60) as client:
        stack.start_all()
        stack.supervisorctl("stop", "postgres")
        until(lambda: stack.status().verdict == rpb.VERDICT_DATABASE_AWAY, "the outage to be seen")
        first = stack.pid("worker")
        os.kill(first, signal.SIGKILL)
        until(lambda: stack.pid("worker") not in (0, first), "another worker")
        second = stack.pid("worker")

        def waits() -> bool:
            status = stack.status()
            return (status.verdict, status.health) == (rpb.VERDICT_DATABASE_AWAY, "NOT_SERVING")

        until(waits, "the worker to have waited for longer than the load timeout")
        stack.supervisorctl("start", "postgres")
        batch = client.submit_lines(lines(20))
        *_, done = client.watch(batch.id)
        assert (done.state, done.counts.completed) == (pb.BATCH_STATE_COMPLETED, 20)
        until(lambda: stack.recovered(1), "the restart to be recorded")
        assert [(event.verdict, event.outcome) for event in stack.restarts()] == [(rpb.VERDICT_CRASHED, "recovered")]
        assert stack.pid("worker") == second
