"""Real vLLM and a request that kills it: after three deaths it alone fails, and all others complete."""

import json
from collections.abc import Iterator

import pytest

from tests.support.stacks import full_stack
from vllm_batch import Client
from vllm_batch.v1 import batch_service_pb2 as pb
from vllm_batch.v1 import recovery_service_pb2 as rpb

pytestmark = pytest.mark.timeout(600)
COUNT = 60
KILLER = 30


def lines(with_killer: bool) -> Iterator[bytes]:
    for number in range(COUNT):
        messages = [{"role": "user", "content": f"Say {number}."}]
        body: dict[str, object] = {"model": "tiny", "messages": messages, "max_tokens": 20, "ignore_eos": True}
        if with_killer and number == KILLER:
            body["vllm_xargs"] = {"crash": 1}
        yield json.dumps({"custom_id": f"c{number}", "url": "/v1/chat/completions", "body": body}).encode()


@pytest.mark.thorough
def test_poison_costs_only_itself() -> None:
    """The killer gets its error after three deaths of the engine, and all other requests of two batches complete."""
    settings = {
        "BATCH_ENGINE_ARGS": "--logits-processors tests.e2e.crashing_processor:CrashOnRequest",
        "BATCH_WINDOW": "8",
        "BATCH_RESTART_BACKOFF_MAX_S": "1",
    }
    with full_stack(**settings) as stack:
        stack.start_all()
        with Client(stack.target) as client:
            poisoned = client.submit_lines(lines(with_killer=True))
            other = client.submit_lines(lines(with_killer=False))
            *_, other = client.watch(other.id)
            *_, poisoned = client.watch(poisoned.id)
            results = list(client.results(poisoned.id))
        restarts = stack.restarts()
    assert (other.state, other.counts.completed) == (pb.BATCH_STATE_COMPLETED, COUNT)
    assert (poisoned.state, poisoned.counts.completed) == (pb.BATCH_STATE_COMPLETED, COUNT - 1)
    [crashed] = [result for result in results if result.HasField("error")]
    assert (crashed.custom_id, crashed.error.code) == (f"c{KILLER}", "REQUEST_CRASHED_ENGINE")
    assert "died 3 times" in crashed.error.message
    # One for each death of the engine, seen by the worker or by supervisord; two deaths may share a restart.
    assert 2 <= len(restarts) <= 3
    assert {event.verdict for event in restarts} <= {rpb.VERDICT_ENGINE_DEAD, rpb.VERDICT_CRASHED}
