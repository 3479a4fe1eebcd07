"""What the failure log collects from failing processes, spawned as vLLM spawns its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# As in service/worker/__main__.py and the engine. The exception is that of vLLM's front end.
PARENT = """
import asyncio, sys
from importlib.util import find_spec
from multiprocessing import get_context
__spec__ = find_spec("service.worker.engine.spawned")
from service.worker.engine.failure_log import FailureLog
from tests.support import failing_processes
log = FailureLog()
process = get_context("spawn").Process(target=getattr(failing_processes, sys.argv[1]), name="EngineCore")
process.start()
process.join()
raised = RuntimeError("Engine core initialization failed. See root cause above. Failed core proc(s): {}")
print("CAUSE", asyncio.run(log.explain(raised, 0)).text)
print("BYTES", sum(len(note.message) for note in log.notes()))
"""


def run(what: str) -> dict[str, str]:
    """What the parent prints about a child that fails in this way."""
    done = subprocess.run(
        [sys.executable, "-c", PARENT, what], cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return dict(line.split(" ", 1) for line in done.stdout.splitlines())


@pytest.mark.parametrize(
    ("what", "cause"),
    [
        ("raise_after_own_configuration", "no room"),
        ("log_and_end", "[Errno 28] No space left on device"),
        ("be_killed", "EngineCore was killed by signal 9 (out of memory?)"),
        ("start_one_that_is_killed", "VllmWorker-0 was killed by signal 9 (out of memory?)"),
    ],
)
def test_cause_comes_from_the_process_that_failed(what: str, cause: str) -> None:
    """Whether a process raised, logged or was killed, its cause is known, however it has configured logging."""
    assert run(what)["CAUSE"] == cause


def test_flood_is_bounded_and_the_last_word_is_kept() -> None:
    """A flood of warnings is bounded in memory and does not displace the exception that follows it."""
    heard = run("flood")
    assert heard["CAUSE"] == "after a flood"
    assert int(heard["BYTES"]) < 2 << 20
