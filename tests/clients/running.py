"""Runs a client's program from file to results while the worker is killed once."""

import json
import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

from openai import OpenAI

from tests.support.stacks import FullStack
from tests.support.waiting import until

# They take about 8 s, 64 at once.
REQUESTS = 512
TIMEOUT_S = 300


def base_url(stack: FullStack) -> str:
    """What a client is given instead of OpenAI's address."""
    return f"http://127.0.0.1:{stack.http_port}/v1"


def run_through_a_kill(stack: FullStack, command: Sequence[str | Path], target: Path) -> None:
    """Runs a program that makes one batch and leaves its results in `target`. Each request has to have one answer."""
    before = len(stack.restarts())
    with OpenAI(base_url=base_url(stack), api_key="none") as door:
        known = {batch.id for batch in door.batches.list(limit=100).data}
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:

            def begun() -> str | None:
                assert process.poll() is None, process.communicate()[0]
                for batch in door.batches.list(limit=1).data:
                    if batch.id not in known and batch.request_counts and batch.request_counts.completed:
                        return batch.id
                return None

            try:
                name = until(begun, "the first answers") or ""
                os.kill(stack.pid("worker"), signal.SIGKILL)
                counts = door.batches.retrieve(name).request_counts
                assert counts is not None
                assert counts.completed < counts.total == REQUESTS
                said, _ = process.communicate(timeout=TIMEOUT_S)
            finally:
                process.kill()
    assert process.returncode == 0, said + stack.logs()
    until(lambda: stack.recovered(before + 1), "the restart to be recorded")
    assert len(stack.restarts()) == before + 1
    results = [json.loads(line) for line in target.read_text().splitlines()]
    assert [result["custom_id"] for result in results] == [f"c{i}" for i in range(REQUESTS)]
    assert {result["response"]["status_code"] for result in results} == {200}
