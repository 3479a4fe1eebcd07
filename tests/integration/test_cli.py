"""`vllm-batch` as a program: what it prints and how it exits."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from tests.integration.conftest import Stack
from tests.integration.test_front_door import line, lines
from tests.waiting import until
from vllm_batch.cli import main
from vllm_batch.client import Client

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


def test_one_batch_and_one_result(serving: Stack, file: Path, tmp_path: Path) -> None:
    """Several files are several batches; one of them is looked at, one of its results, for people and as JSON."""
    other = tmp_path / "other.jsonl"
    other.write_bytes(line("bad", vllm_xargs={"simulate": "refuse"}))
    done = run(serving, "submit", str(file), str(other), "--wait", "-m", "team=search")
    assert done.returncode == 1
    assert done.stdout.split() == [b"batch_1", b"batch_2"]
    assert b"batch_2 completed: 0 completed, 1 failed of 1" in done.stderr
    shown = run(serving, "get", "batch_1").stdout.decode()
    for text in ("completed", "50: 50 completed, 0 failed", "tiny", "search", "generated", "UTC"):
        assert text in shown
    assert json.loads(run(serving, "get", "batch_1", "--json").stdout)["counts"] == {"total": "50", "completed": "50"}
    found = run(serving, "result", "batch_1", "c7").stdout
    assert found == run(serving, "results", "batch_1").stdout.splitlines(keepends=True)[7]
    assert json.loads(run(serving, "result", "batch_1", "c7", "--json").stdout)["index"] == "7"
    assert [json.loads(text)["index"] for text in run(serving, "results", "batch_1", "--json").stdout.splitlines()[1:3]]
    missing = run(serving, "result", "batch_1", "nobody")
    assert (missing.returncode, missing.stdout) == (3, b"")
    watched = [json.loads(text) for text in run(serving, "watch", "batch_1", "--json").stdout.splitlines()]
    assert watched[-1]["state"] == "BATCH_STATE_COMPLETED"
    retried = json.loads(run(serving, "retry", "batch_2", "--json").stdout)
    assert retried["id"] == "batch_3"
    run(serving, "watch", "batch_3")
    refused = run(serving, "cancel", "batch_3", "--json")
    assert (refused.returncode, b"(BATCH_STATE)" in refused.stderr) == (3, True)
    assert run(serving, "delete", "batch_1").returncode == 0
    assert run(serving, "get", "batch_1").returncode == 3


def commands(group: click.Group, *path: str) -> Iterator[tuple[str, click.Command]]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, *path, name)
        else:
            yield " ".join((*path, name)), command


def test_help_has_an_example() -> None:
    """Each command shows how it is used, and explains each of its options."""
    found = dict(commands(main))
    assert {"submit", "top", "recovery pause"} <= set(found)
    for name, command in found.items():
        example = (command.help or "").partition("Example")[2]
        assert re.search(f"vllm-batch (--target [^ ]+ )?{name}", example), name
        for option in command.params:
            assert not isinstance(option, click.Option) or option.help, f"{name} {option.opts}"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell: str) -> None:
    """Printed for each shell, without a server; bash's completes commands by asking the program."""
    script = subprocess.run(
        [str(CLI), "completion", shell], capture_output=True, text=True, timeout=60, check=True
    ).stdout
    assert "_VLLM_BATCH_COMPLETE" in script
    if shell == "bash":
        ask = "COMP_WORDS=(vllm-batch re); COMP_CWORD=1; _vllm_batch_completion vllm-batch; echo ${COMPREPLY[@]}"
        env = os.environ | {"PATH": f"{CLI.parent}:{os.environ['PATH']}"}
        done = subprocess.run(["bash", "-c", f"{script}\n{ask}"], env=env, capture_output=True, text=True, timeout=60)
        assert set(done.stdout.split()) == {"recovery", "result", "results", "retry"}


def test_who_waits_in_person_waits_not_long(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking at a batch of a server that is not there ends soon, and says what to check; submitting has patience."""
    given: dict[str, float] = {}

    class Noted(Client):
        def __init__(self, target: str, patience_s: float, on_retry: object) -> None:
            given[context_command()] = patience_s
            super().__init__(target, 0)

    monkeypatch.setattr("vllm_batch.cli.Client", Noted)
    for command in (["get", "batch_1"], ["watch", "batch_1"]):
        done = CliRunner().invoke(main, ["--target", stack.target, *command])
        assert done.exit_code == 4
        assert "is it running" in done.stderr
    assert given == {"get": 10, "watch": 600}


def context_command() -> str:
    return click.get_current_context().invoked_subcommand or ""


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
