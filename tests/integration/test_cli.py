"""`vllm-batch` as a program: what it prints and how it exits."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.conftest import Stack
from tests.integration.test_front_door import line, lines
from tests.waiting import until

CLI = Path(sys.executable).parent / "vllm-batch"


def run(stack: Stack, *arguments: str, given: bytes = b"", patience: str = "0") -> "subprocess.CompletedProcess[bytes]":
    env = {name: value for name, value in os.environ.items() if not name.startswith("BATCH_")}
    command = [str(CLI), "--target", stack.target, "--patience", patience, *arguments]
    return subprocess.run(command, input=given, env=env, capture_output=True, timeout=60)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "batch.jsonl"
    path.write_bytes(b"".join(lines(50)))
    return path


def test_submit_wait_and_output(serving: Stack, file: Path, tmp_path: Path) -> None:
    """One command from a file to a file in OpenAI's output format, in the order of the input."""
    made = tmp_path / "out.jsonl"
    done = run(
        serving, "submit", str(file), "--wait", "-o", str(made), "-m", "a=b", "--priority", "2", "--window", "3600"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode().strip() == "batch_1"
    outputs = [json.loads(text) for text in made.read_text().splitlines()]
    assert [output["custom_id"] for output in outputs] == [f"c{i}" for i in range(50)]
    assert set(outputs[0]) == {"id", "custom_id", "response", "error"}
    assert outputs[0]["response"]["status_code"] == 200
    assert outputs[0]["response"]["body"]["object"] == "chat.completion"
    [listed] = map(json.loads, run(serving, "list", "--json", "--state", "completed").stdout.splitlines())
    assert (listed["id"], listed["metadata"], listed["priority"]) == ("batch_1", {"a": "b"}, 2)
    assert run(serving, "results", "batch_1").stdout.decode() == made.read_text()


def test_failed_requests_show_in_the_exit_code(serving: Stack) -> None:
    """A script sees that not all requests were answered well."""
    given = line("a") + line("b", vllm_xargs={"simulate": "refuse"})
    done = run(serving, "submit", "-", "--wait", given=given)
    assert done.returncode == 1
    assert b"1 completed, 1 failed of 2" in done.stderr
    assert run(serving, "watch", "batch_1").returncode == 1


def test_refused_input_names_lines(serving: Stack) -> None:
    """What is wrong with a file is on stderr, a line each, with exit code 3 and no traceback."""
    done = run(serving, "submit", "-", given=b'{\n{"custom_id": 3}\n')
    assert done.returncode == 3
    assert [text.split(": ")[0] for text in done.stderr.decode().splitlines()] == ["line 1", "line 2"]
    assert done.stdout == b""


def test_wrong_usage(serving: Stack, file: Path) -> None:
    """Mistakes in the command itself exit with 2."""
    assert run(serving, "submit", "/no/such/file").returncode == 2
    assert run(serving, "submit", str(file), "-o", "x").returncode == 2
    assert run(serving, "submit", str(file), "-m", "novalue").returncode == 2


def test_unknown_batch_and_unimplemented(serving: Stack) -> None:
    """What the server refuses is told in its words."""
    for arguments in (["watch", "batch_99"], ["results", "batch_99"], ["cancel", "batch_99"]):
        done = run(serving, *arguments)
        assert done.returncode == 3
        assert b"Traceback" not in done.stderr
        assert done.stderr


def test_unavailable(stack: Stack, file: Path) -> None:
    """Without a gateway it gives up after its patience, with exit code 4."""
    done = run(stack, "submit", str(file), patience="1")
    assert done.returncode == 4
    assert b"trying again" in done.stderr
    assert run(stack, "status").returncode == 4


def test_waits_for_a_worker(stack: Stack, file: Path) -> None:
    """Submitting while the worker loads waits as the server asks, and then goes through, as one batch."""
    stack.gateway()
    stack.worker(simulated_load_s=1)
    done = run(stack, "submit", str(file), "--wait", patience="60")
    assert done.returncode == 0
    assert len(run(stack, "list", "--json").stdout.splitlines()) == 1


def test_interrupted_wait_says_how_to_come_back(serving: Stack, tmp_path: Path) -> None:
    """Ctrl-C leaves the batch running and says so."""
    path = tmp_path / "slow.jsonl"
    path.write_bytes(b"".join(lines(200, vllm_xargs={"simulate": 0.5})))
    command = [str(CLI), "--target", serving.target, "submit", str(path), "--wait"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout
    assert process.stdout.readline().strip() == "batch_1"
    assert process.stderr
    assert "in_progress" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "batch_1 goes on" in told
    assert "vllm-batch watch batch_1" in told
    until(lambda: b"completed" in run(serving, "list").stdout, "the batch to complete all the same")
