"""Busy is not broken: a saturated, slow, paused and disconnected but healthy stack is not restarted and loses nothing.

`SOAK=<minutes>` runs longer; `SOAK_SEED=…` repeats an order of events.
"""

import hashlib
import json
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import psutil
import pytest

from service import processes
from service.processes import Mark
from tests.support.faults import Faults
from tests.support.pauses import last, pause
from tests.support.stacks import ROOT, FullStack, full_stack
from tests.support.waiting import until
from vllm_batch import Client

LASTS_S = 60 * float(os.environ.get("SOAK", 0.4))
WINDOW = 32
# Requests per batch. As many are always left in the last two batches, so that the engine is always full.
REQUESTS = 1000
# Too short for any verdict: the heartbeat times out after 10 s, and an unresponsive port is restarted after 20 s.
LONGEST_PAUSE_S = 8.0
# A worker paused for longer would count as frozen. A paused Postgres counts as away, a paused machine as stalled.
WORKER_PAUSE_S = 3.0
SLOW_PROBE = "import time; time.sleep(2.5)"

pytestmark = pytest.mark.timeout(LASTS_S + 400)


def body(batch: int, number: int) -> str:
    """The body as sent. In every third batch the first request is a long prefill: 12 s of computing without a step."""
    pace = "prefill" if number == 0 and batch % 3 == 0 else 0.2
    message = {"role": "user", "content": f"{batch}: {number}"}
    return json.dumps({"model": "tiny", "messages": [message], "vllm_xargs": {"simulate": pace}})


def lines(batch: int) -> Iterator[bytes]:
    for number in range(REQUESTS):
        yield f'{{"custom_id": "c{number}", "url": "/v1/chat/completions", "body": {body(batch, number)}}}'.encode()


class Trouble:
    """What a healthy stack has to withstand."""

    def __init__(self, stack: FullStack, dice: random.Random) -> None:
        self.stack = stack
        self.dice = dice
        self.faults = Faults(stack, dice)

    def pause_gateway(self) -> None:
        pause(self._family("gateway"), self.dice, LONGEST_PAUSE_S)

    def pause_watchdog(self) -> None:
        pause(self._family("watchdog"), self.dice, LONGEST_PAUSE_S)

    def pause_worker(self) -> None:
        """Pauses the worker without its engine."""
        pause(self._family("worker")[:1], self.dice, WORKER_PAUSE_S)

    def pause_worker_and_engine(self) -> None:
        pause(self._family("worker"), self.dice, WORKER_PAUSE_S)

    def pause_postgres(self) -> None:
        pause(self._family("postgres"), self.dice, LONGEST_PAUSE_S)

    def pause_machine(self) -> None:
        """Pauses everything at once, longer than any timeout; processes resume in random order."""
        everything = processes.marked(Mark(self.stack.home))
        self.dice.shuffle(everything)
        pause(everything, self.dice, 2 * LONGEST_PAUSE_S)

    def slow_probe(self) -> None:
        self.faults._inject("worker", SLOW_PROBE)

    def postgres_outage(self) -> None:
        mend = self.faults.strike("stop_postgres")
        assert mend is not None
        last(self.dice, LONGEST_PAUSE_S)
        mend()

    def postgres_restart(self) -> None:
        self.faults.strike("restart_postgres")

    def connections_cut(self) -> None:
        self.faults.strike("cut_connections")

    def clock_jump(self) -> None:
        self.faults.strike("shift_clock")

    def gateway_killed(self) -> None:
        self.faults.strike("kill_gateway")

    def watchdog_killed(self) -> None:
        self.faults.strike("kill_watchdog")

    def _family(self, program: str) -> list[psutil.Process]:
        leader = psutil.Process(until(lambda: self.stack.pid(program), f"{program} to run"))
        return [leader, *leader.children(recursive=True)]


KINDS: list[Callable[[Trouble], None]] = [
    value for name, value in vars(Trouble).items() if callable(value) and not name.startswith("_")
]


@pytest.fixture
def stack() -> Iterator[FullStack]:
    settings = {
        "BATCH_ENGINE": "simulated",
        "BATCH_SIMULATED_WINDOW": str(WINDOW),
        "BATCH_HEARTBEAT_INTERVAL_S": "1",
        "BATCH_HEARTBEAT_TIMEOUT_S": "10",
        "BATCH_LEASE_S": "15",
        "BATCH_CHECK_INTERVAL_S": "1",
        "BATCH_PROBE_TIMEOUT_S": "1",
        "BATCH_DATABASE_TIMEOUT_S": "2",
        "PYTHONPATH": str(ROOT / "tests" / "chaos" / "inject"),
    }
    with full_stack(**settings) as stack:
        stack.start_all()
        yield stack


def test_soak(stack: FullStack) -> None:
    """A healthy worker is never restarted, whatever happens around it, and each request has one correct result."""
    seed = int(os.environ.get("SOAK_SEED", random.SystemRandom().randrange(1_000_000)))
    dice = random.Random(seed)
    sys.stdout.write(f"\nSOAK_SEED={seed}, {LASTS_S:.0f} s\n")
    trouble, worker = Trouble(stack, dice), stack.pid("worker")
    ids: list[str] = []
    struck: Counter[str] = Counter()
    with Client(stack.target, patience_s=120) as client:

        def finished(some: Sequence[str]) -> int:
            return sum(client.get(batch_id).counts.completed for batch_id in some)

        def keep_busy() -> None:
            while len(ids[-2:]) * REQUESTS - finished(ids[-2:]) < REQUESTS:
                ids.append(client.submit_lines(lines(len(ids)), request_id=f"soak-{len(ids)}").id)

        keep_busy()
        ends_s = time.monotonic() + LASTS_S
        while time.monotonic() < ends_s:
            for kind in dice.sample(KINDS, len(KINDS)):
                kind(trouble)
                struck[kind.__name__] += 1
                keep_busy()
                before = finished(ids[-2:])
                until(lambda before=before: finished(ids[-2:]) > before, f"work to continue after {kind.__name__}")  # type: ignore[misc]
                check_untouched(stack, worker, seed)
                if time.monotonic() > ends_s:
                    break
        until(lambda: finished(ids) == REQUESTS * len(ids), "the rest of the results", 300)
        for place, batch_id in enumerate(ids):
            answers = {}
            for result in client.results(batch_id):
                answer = json.loads(result.response.body_json)
                assert answers.setdefault(result.custom_id, answer) is answer
                asked = body(place, int(result.custom_id[1:]))
                assert answer["choices"][0]["message"]["content"] == hashlib.sha256(asked.encode()).hexdigest()
            assert len(answers) == REQUESTS
    check_untouched(stack, worker, seed)
    verdicts = Counter(f"{e['verdict']} {e['action']}" for e in stack.events("watchdog", "verdict_changed"))
    sys.stdout.write(f"{len(ids)} batches of {REQUESTS}; {dict(struck)}\n{dict(verdicts)}\n")


def check_untouched(stack: FullStack, worker: int, seed: int) -> None:
    """Checks that no restart was begun and the worker is still the original process."""
    begun = stack.sql("SELECT verdict, reason, evidence FROM recovery_events WHERE kind IN ('restart', 'gave_up')")
    assert not begun, (seed, begun, stack.logs())
    assert stack.pid("worker") == worker
