"""Claim: a killed worker serves again as soon as its engine can start, and only what was in the engine runs again.

Against: vLLM's own batch runner with the same flags, from the start of its process to its first token; and the requests
that were in the engine at the kill.
Target: SIGKILL to SERVING at most 1.10 times that; repeated work at most what was in flight.

Real vLLM with the tiny model; the worker is killed in the middle of a batch that keeps its engine full. A log at the
engine's entrance records every request that reaches it.
"""

import os
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.lib import chats
from benchmarks.lib.harness import Figure, Sizes, alternate, at_most, main
from benchmarks.lib.run_batch import RunBatch
from benchmarks.lib.stacks import psql, started
from tests.support.stacks import FullStack
from tests.support.waiting import until
from vllm_batch import Client
from vllm_batch.v1 import batch_service_pb2 as pb

SIZES: Sizes = {"requests": (3_000, 500), "rounds": (5, 1)}
TIMEOUT_S = 600
PROCESSOR = "--logits-processors benchmarks.lib.counting_processor:CountRequests"


def begun(file: Path) -> list[tuple[int, int]]:
    """Process and number of each request that entered an engine, in order."""
    pairs = (line.split() for line in file.read_text().splitlines())
    return [(int(pid), int(number)) for pid, number in pairs]


class Killed:
    """Figures of kills in the middle of a batch, one per round."""

    def __init__(self, stack: FullStack, file: Path, requests: int) -> None:
        self._stack, self._file, self._requests = stack, file, requests
        self.repeated: list[float] = []
        self.in_flight: list[float] = []

    def serving_s(self) -> float:
        """Kills the worker in the middle of a batch. Returns the seconds until new work is accepted again."""
        stack, count = self._stack, self._requests
        # Truncated, not removed, because the engine has it open.
        self._file.write_bytes(b"")
        restarts, pid = len(stack.restarts()), stack.pid("worker")
        with Client(stack.target, patience_s=0) as client:
            lines = (chats.line(number, vllm_xargs={"number": number}) for number in range(count))
            batch = client.submit_lines(lines)
            until(lambda: client.get(batch.id).counts.completed >= count // 5, "part of the batch", TIMEOUT_S)
            begin_s = time.monotonic()
            os.kill(pid, signal.SIGKILL)
            until(lambda: client.accepting(), "new work to be refused", TIMEOUT_S)
            found = psql(stack, f"SELECT index FROM results WHERE batch_id = {batch.id.rpartition('_')[2]}")
            stored = set(map(int, found.split()))
            until(lambda: not client.accepting(), "new work to be accepted", TIMEOUT_S)
            took_s = time.monotonic() - begin_s
        with Client(stack.target) as patient:
            *_, done = patient.watch(batch.id)
        assert (done.state, done.counts.completed) == (pb.BATCH_STATE_COMPLETED, count)
        until(lambda: stack.recovered(restarts + 1), "the restart to be closed", TIMEOUT_S)
        first, *_ = runs = begun(self._file)
        assert {number for _, number in runs} == set(range(count))
        self.repeated.append(len(runs) - count)
        self.in_flight.append(len({number for engine, number in runs if engine == first[0]} - stored))
        return took_s


def measure(requests: int, rounds: int) -> Iterator[Figure]:
    """Kills and bare starts, in turns."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        given, file = chats.write(folder / "one.jsonl", 1, max_tokens=1), folder / "numbers"

        def bare_start_s() -> float:
            begin_s = time.monotonic()
            with RunBatch(folder) as runner:
                runner.run(given, folder / "out.jsonl")
                return time.monotonic() - begin_s

        settings = {"BATCH_ENGINE_ARGS": PROCESSOR, "BATCH_MAX_RESTARTS_PER_HOUR": "1000", "COUNT_FILE": str(file)}
        with started(**settings, BATCH_RESTART_BACKOFF_MAX_S="0.1") as stack:
            killed = Killed(stack, file, requests)
            values = alternate(rounds, killed=killed.serving_s, bare=bare_start_s)
    yield Figure(
        "SIGKILL to SERVING", "s", values["killed"], "bare start to first token", values["bare"], at_most("ratio", 1.1)
    )
    yield Figure(
        "requests run again", "requests", killed.repeated, "in flight", killed.in_flight, at_most("ratio", 1.0)
    )


if __name__ == "__main__":
    main(__file__, __doc__, SIZES, measure)
