"""OpenAI's door refuses no create while Postgres is up, whatever happens to everything else.

`CREATES_SEED=…` repeats a sequence of faults.
"""

import os
import random
import signal
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from openai import OpenAI

from tests.support.batches import line
from tests.support.faults import RECOVERS_SOON, Faults
from tests.support.stacks import FullStack, full_stack
from tests.support.waiting import until

FAULTS, CLIENTS = 30, 4
# Those of chaos that leave Postgres up; stops of the worker, during which none lives; and the death of the door, whose
# clients connect again.
KINDS = (
    "cut_connections",
    "freeze_engine",
    "freeze_gateway",
    "freeze_worker",
    "kill_door",
    "kill_engine",
    "kill_gateway",
    "kill_watchdog",
    "kill_worker",
    "redeploy_worker",
    "stop_gateway",
    "stop_worker",
)
# During each fault.
CREATES = 20
# The SDK's own repetitions. A door that was killed is back before they end.
RETRIES = 10
PATIENCE_S = 300

pytestmark = [pytest.mark.thorough, pytest.mark.timeout(3600)]


class DoorFaults(Faults):
    """With the death of the door."""

    def kill_door(self) -> None:
        self._signal_program("http", signal.SIGKILL)


@pytest.fixture
def stack() -> Iterator[FullStack]:
    with full_stack(BATCH_ENGINE="simulated", BATCH_MAX_OPEN_BATCHES="100000", **RECOVERS_SOON) as stack:
        stack.start_all()
        yield stack


def test_no_create_is_refused(stack: FullStack) -> None:
    """Through 30 faults that leave Postgres up no create is refused, each makes one batch, and all of them run."""
    seed = int(os.environ.get("CREATES_SEED", random.SystemRandom().randrange(1_000_000)))
    dice = random.Random(seed)
    # Each kind at least twice.
    drawn = [*KINDS, *KINDS, *dice.choices(KINDS, k=FAULTS - 2 * len(KINDS))]
    dice.shuffle(drawn)
    sys.stdout.write(f"\nCREATES_SEED={seed}: {', '.join(drawn)}\n")
    faults = DoorFaults(stack, dice)
    answers: Counter[int] = Counter()
    refused: list[str] = []
    made: list[str] = []
    told_to_stop = threading.Event()

    def note(response: httpx.Response) -> None:
        if response.request.method == "POST":
            answers[response.status_code] += 1
            if response.status_code >= 400:
                refused.append(f"{faults.done[-1:]}: {response.status_code} {response.read().decode()[:300]}")

    def create(client: OpenAI, file_id: str, name: int) -> None:
        number = 0
        while not told_to_stop.wait(0.1):
            batch = client.batches.create(
                input_file_id=file_id,
                endpoint="/v1/chat/completions",
                completion_window="24h",
                metadata={"client": str(name), "number": str(number)},
            )
            made.append(batch.id)
            number += 1

    with (
        OpenAI(
            base_url=f"http://127.0.0.1:{stack.http_port}/v1",
            api_key="none",
            max_retries=RETRIES,
            http_client=httpx.Client(event_hooks={"response": [note]}, timeout=60),
        ) as client,
        ThreadPoolExecutor(CLIENTS) as threads,
    ):
        file = client.files.create(file=("in.jsonl", line("a")), purpose="batch")
        postgres = stack.pid("postgres")
        creating = [threads.submit(create, client, file.id, name) for name in range(CLIENTS)]
        try:
            for name in drawn:
                before = len(made)
                mend = faults.strike(name)
                until(
                    lambda before=before: len(made) >= before + CREATES or any(one.done() for one in creating),
                    f"creates during {name}",
                    PATIENCE_S,
                )
                if mend is not None:
                    mend()
        finally:
            told_to_stop.set()
        for one in creating:
            one.result(PATIENCE_S)
        assert stack.pid("postgres") == postgres
    sys.stdout.write(f"{FAULTS} faults, {len(made)} creates, answers {dict(answers)}\n")
    assert not refused, refused[:5]
    assert len(set(made)) == len(made)
    assert stack.sql("SELECT count(*) FROM batches") == [(len(made),)]
    until(
        lambda: stack.sql("SELECT count(*) FROM batches WHERE state <> 'completed'") == [(0,)],
        "the batches to end",
        2 * PATIENCE_S,
    )
