"""Whatever faults occur, in whatever order, each request ends with exactly one correct result.

`CHAOS=long` runs 10,000 requests with 30 faults; `CHAOS_SEED=…` repeats a sequence of faults; `CHAOS_ENGINE=vllm` uses
the real engine.
"""

import hashlib
import json
import os
import random
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack

import psycopg2
import pytest

from tests.support.faults import AT_RANDOM, RECOVERS_SOON, Faults
from tests.support.stacks import FullStack, full_stack
from tests.support.waiting import until
from vllm_batch import Client
from vllm_batch.v1 import batch_service_pb2 as pb

REQUESTS, FAULTS = (10_000, 30) if os.environ.get("CHAOS") == "long" else (1_600, 4)
BATCHES = 4
TENANTS = ("alpha", "beta")
# Of requests that share a prefix, which is long enough to be worth a place in the order.
GROUPS, INSTRUCTIONS = 7, "Answer in one word. " * 40
ENGINE = os.environ.get("CHAOS_ENGINE", "simulated")
# The last kind of fault has to be over within this time, including recovery.
PATIENCE_S = 300

pytestmark = pytest.mark.timeout(3600)


def body(batch: int, number: int) -> str:
    """The body as sent: its prompt begins like those of its group, so that chunks are not cut in the file's order.

    With the simulated engine a request takes long enough for faults to hit running work.
    """
    system = {"role": "system", "content": f"Group {number % GROUPS}. {INSTRUCTIONS}"}
    messages = [system, {"role": "user", "content": f"{batch}: {number}"}]
    given = {"model": "tiny", "messages": messages, "max_tokens": 24}
    pace: dict[str, object] = {"vllm_xargs": {"simulate": 0.5}} if ENGINE == "simulated" else {"ignore_eos": True}
    return json.dumps(given | pace)


def lines(batch: int) -> Iterator[bytes]:
    for number in range(REQUESTS // BATCHES):
        yield f'{{"custom_id": "c{number}", "url": "/v1/chat/completions", "body": {body(batch, number)}}}'.encode()


def is_right(result: pb.Result, batch: int) -> bool:
    """True if the result is the correct answer to the request of that name."""
    if result.response.status_code != 200:
        return False
    answer = json.loads(result.response.body_json)
    if ENGINE == "simulated":
        asked = body(batch, int(result.custom_id[1:]))
        return bool(answer["choices"][0]["message"]["content"] == hashlib.sha256(asked.encode()).hexdigest())
    return bool(answer["usage"]["completion_tokens"] == 24)


@pytest.fixture
def stack() -> Iterator[FullStack]:
    with full_stack(BATCH_ENGINE=ENGINE, **RECOVERS_SOON) as stack:
        stack.require_tokens(*TENANTS)
        stack.start_all()
        yield stack


def test_chaos(stack: FullStack) -> None:
    """Through random faults no request is lost, duplicated or answered wrongly, and no restart is without cause."""
    seed = int(os.environ.get("CHAOS_SEED", random.SystemRandom().randrange(1_000_000)))
    dice = random.Random(seed)
    drawn = [dice.choice(AT_RANDOM) for _ in range(FAULTS)]
    sys.stdout.write(f"\nCHAOS_SEED={seed}: {', '.join(drawn)}\n")
    faults = Faults(stack, dice)
    with ExitStack() as opened:
        tenants = [
            opened.enter_context(Client(stack.target, patience_s=PATIENCE_S, token=token))
            for token in stack.tokens.values()
        ]
        ids: list[str] = []

        def submit() -> None:
            number = len(ids)
            ids.append(tenant_of(number).submit_lines(lines(number), request_id=f"chaos-{number}").id)

        def tenant_of(number: int) -> Client:
            return tenants[number % len(tenants)]

        def finished() -> int:
            return sum(tenant_of(number).get(batch_id).counts.completed for number, batch_id in enumerate(ids))

        submit()

        for number, name in enumerate(drawn):
            # Spread over the work, so that each fault hits running work.
            due = number * REQUESTS // (FAULTS + 1)
            until(lambda due=due: finished() >= due, f"{due} results after {faults.done}", PATIENCE_S)  # type: ignore[misc]
            until(lambda: not is_one_alone(stack), "suspects to be done", PATIENCE_S)
            faults.strike(name)
            if len(ids) < BATCHES and (number + 1) * BATCHES > len(ids) * FAULTS // 2:
                submit()
        while len(ids) < BATCHES:
            submit()
        until(lambda: finished() == REQUESTS, f"the rest of the results after {faults.done}", 2 * PATIENCE_S)

        for place, batch_id in enumerate(ids):
            client = tenant_of(place)
            order = "RESULT_ORDER_FINISHED" if place % 2 else "RESULT_ORDER_INPUT"
            results = list(client.results(batch_id, order=order))
            counted = Counter(result.custom_id for result in results)
            assert counted == Counter(f"c{number}" for number in range(REQUESTS // BATCHES))
            wrong = [result for result in results if not is_right(result, place)]
            assert not wrong, wrong[:3]
            assert client.get(batch_id).state == pb.BATCH_STATE_COMPLETED
        assert len({*ids}) == BATCHES
        for place, client in enumerate(tenants):
            assert {batch.id for batch in client.list(limit=100)} == {*ids[place :: len(tenants)]}

    until(lambda: stack.recovered(0), "the worker to be healthy in the end", PATIENCE_S)
    restarts = stack.restarts()
    reasons = Counter(f"{event.reason} → {event.outcome}" for event in restarts)
    told = "".join(f"  {count} × {reason}\n" for reason, count in reasons.items())
    sys.stdout.write(f"{REQUESTS} requests, {FAULTS} faults, {len(restarts)} restarts:\n{told}")
    assert len(restarts) <= faults.of_the_worker, (reasons, faults.done)
    assert {event.outcome for event in restarts} <= {"recovered", "superseded"}
    stack.check_no_orphans()


def is_one_alone(stack: FullStack) -> bool:
    """True if a request runs alone, or is about to: killing its engine then would have it blamed."""
    try:
        return bool(stack.sql("SELECT 1 FROM chunks WHERE deaths > 1 AND state <> 'done' LIMIT 1"))
    except psycopg2.Error:
        # Postgres may still be starting.
        return True
