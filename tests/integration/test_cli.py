"""`vllm-batch` as a program: what it prints and how it exits."""

import json
import os
import re
import resource
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from tests.support.batches import line, lines
from tests.support.servers import Stack
from vllm_batch import Client
from vllm_batch.cli import main
from vllm_batch.v1 import batch_service_pb2 as pb

CLI = Path(sys.executable).parent / "vllm-batch"


def run(
    stack: Stack, *arguments: str, given: bytes = b"", patience: str = "0", **how: Any
) -> "subprocess.CompletedProcess[bytes]":
    env = {name: value for name, value in os.environ.items() if not name.startswith("BATCH_")}
    command = [str(CLI), "--target", stack.target, "--patience", patience, *arguments]
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | how
    return subprocess.run(command, input=given, env=env, timeout=60, **how)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "batch.jsonl"
    path.write_bytes(b"".join(lines(50)))
    return path


def test_submit_wait_and_output(serving: Stack, file: Path, tmp_path: Path) -> None:
    """One command turns an input file into a file in OpenAI's output format, in input order."""
    made = tmp_path / "out.jsonl"
    done = run(
        serving, "submit", str(file), "--wait", "-o", str(made), "-m", "a=b", "--priority", "2", "--window", "3600"
    )
    assert done.returncode == 0, done.stderr
    batch = done.stdout.decode().strip()
    outputs = [json.loads(text) for text in made.read_text().splitlines()]
    assert [output["custom_id"] for output in outputs] == [f"c{i}" for i in range(50)]
    assert set(outputs[0]) == {"id", "custom_id", "response", "error"}
    assert outputs[0]["response"]["status_code"] == 200
    assert outputs[0]["response"]["body"]["object"] == "chat.completion"
    [listed] = map(json.loads, run(serving, "list", "--json", "--state", "completed").stdout.splitlines())
    assert (listed["id"], listed["metadata"], listed["priority"]) == (batch, {"a": "b"}, 2)
    assert run(serving, "results", batch).stdout.decode() == made.read_text()


def test_failed_requests_show_in_the_exit_code(serving: Stack) -> None:
    """The exit code tells scripts that some requests failed; `errors` and `--only` show which, and why."""
    given = line("a") + line("b", vllm_xargs={"simulate": "refuse"})
    done = run(serving, "submit", "-", "--wait", given=given)
    assert done.returncode == 1
    assert b"1 completed, 1 failed of 2" in done.stderr
    batch = done.stdout.decode().strip()
    assert run(serving, "watch", batch).returncode == 1
    shown = run(serving, "errors", batch).stdout.decode()
    assert shown.split("\n")[0].split() == ["1", "HTTP", "400", "BadRequestError"]
    assert "e.g. b: refused on request" in shown
    [kind] = json.loads(run(serving, "errors", batch, "--json").stdout)["kinds"]
    assert (kind["count"], kind["example_custom_id"]) == ("1", "b")
    for only, name in (("failed", "b"), ("succeeded", "a")):
        [found] = run(serving, "results", batch, "--only", only).stdout.splitlines()
        assert json.loads(found)["custom_id"] == name


def test_one_batch_and_one_result(serving: Stack, file: Path, tmp_path: Path) -> None:
    """Several files make several batches, and each command for one batch or one result works for people and as JSON."""
    other = tmp_path / "other.jsonl"
    other.write_bytes(line("bad", vllm_xargs={"simulate": "refuse"}))
    done = run(serving, "submit", str(file), str(other), "--wait", "-m", "team=search")
    assert done.returncode == 1
    first, second = done.stdout.decode().split()
    assert f"{second} completed: 0 completed, 1 failed of 1" in done.stderr.decode()
    shown = run(serving, "get", first).stdout.decode()
    for text in ("completed", "50: 50 completed, 0 failed", "tiny", "search", "completion", "UTC"):
        assert text in shown
    assert json.loads(run(serving, "get", first, "--json").stdout)["counts"] == {"total": "50", "completed": "50"}
    found = run(serving, "result", first, "c7").stdout
    assert found == run(serving, "results", first).stdout.splitlines(keepends=True)[7]
    assert json.loads(run(serving, "result", first, "c7", "--json").stdout)["index"] == "7"
    assert [json.loads(text)["index"] for text in run(serving, "results", first, "--json").stdout.splitlines()[1:3]]
    missing = run(serving, "result", first, "nobody")
    assert (missing.returncode, missing.stdout) == (3, b"")
    watched = [json.loads(text) for text in run(serving, "watch", first, "--json").stdout.splitlines()]
    assert watched[-1]["state"] == "BATCH_STATE_COMPLETED"
    retried = json.loads(run(serving, "retry", second, "--json").stdout)
    assert retried["id"] not in (first, second)
    run(serving, "watch", retried["id"])
    refused = run(serving, "cancel", retried["id"], "--json")
    assert (refused.returncode, b"(BATCH_STATE)" in refused.stderr) == (3, True)
    assert run(serving, "delete", first).returncode == 0
    assert run(serving, "get", first).returncode == 3


def commands(group: click.Group, *path: str) -> Iterator[tuple[str, click.Command]]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, *path, name)
        else:
            yield " ".join((*path, name)), command


def test_help_has_an_example() -> None:
    """Every command's help has an example and explains each option."""
    found = dict(commands(main))
    assert {"submit", "top", "recovery pause"} <= set(found)
    for name, command in found.items():
        example = (command.help or "").partition("Example")[2]
        assert re.search(f"vllm-batch (--target [^ ]+ )?{name}", example), name
        for option in command.params:
            assert not isinstance(option, click.Option) or option.help, f"{name} {option.opts}"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell: str) -> None:
    """A completion script is printed for each shell without a server, and bash's completes commands."""
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
    """Without a server `get` is patient for 10 s and `watch` for 600 s, and both say what to check."""
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
    """Invalid input is listed on stderr line by line, with exit code 3 and no traceback."""
    done = run(serving, "submit", "-", given=b'{\n{"custom_id": 3}\n')
    assert done.returncode == 3
    assert [text.split(": ")[0] for text in done.stderr.decode().splitlines()] == ["line 1", "line 2"]
    assert done.stdout == b""


def test_wrong_usage(serving: Stack, file: Path) -> None:
    """Mistakes in the command line exit with 2."""
    assert run(serving, "submit", "/no/such/file").returncode == 2
    assert run(serving, "submit", str(file), "-o", "x").returncode == 2
    assert run(serving, "submit", str(file), "-m", "novalue").returncode == 2


def test_token_for_a_watchdog_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """A token is not sent to a watchdog on another machine without TLS; that is a usage error without a traceback."""
    monkeypatch.setenv("BATCH_TOKEN", "secret")
    monkeypatch.delenv("BATCH_TLS_CA", raising=False)
    for command in (
        ["recovery", "--watchdog-target", "10.0.0.1:1", "status"],
        ["status", "--watchdog-target", "10.0.0.1:1"],
    ):
        done = CliRunner().invoke(main, command)
        assert (done.exit_code, "BATCH_TLS_CA" in done.stderr) == (2, True), done.stderr


def limited(size: int) -> Callable[[], None]:
    """Limits the size of files that a process can write, like a full disk."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.parametrize(
    ("name", "size", "why"),
    [
        ("nowhere/out.jsonl", None, "No such file or directory"),
        ("batch.jsonl/out.jsonl", None, "Not a directory"),
        ("n" * 300, None, "File name too long"),
        (".", None, "is a directory"),
        ("/proc/out.jsonl", None, "cannot be written"),
        ("out.jsonl", 0, "File too large"),
    ],
)
def test_an_output_that_cannot_be_is_refused_before_the_upload(
    serving: Stack, client: Client, file: Path, name: str, size: int | None, why: str
) -> None:
    """An output file that cannot be written is a usage error before the upload, and nothing is stored."""
    output = str(file.parent / name)
    limit = limited(size) if size is not None else None
    for command in (("submit", str(file), "--wait", "-o", output), ("results", "batch_1", "-o", output)):
        done = run(serving, *command, preexec_fn=limit)
        assert (done.returncode, done.stdout) == (2, b""), done.stderr
        assert why in done.stderr.decode()
    assert list(client.list()) == []
    assert sorted(file.parent.glob("*.jsonl*")) == [file]


def test_a_disk_that_fills_up_meanwhile_is_one_line(serving: Stack, file: Path) -> None:
    """If the disk fills up, an existing output file is unchanged and one line says how to fetch the results again."""
    made = file.parent / "out.jsonl"
    made.write_text("of before\n")
    done = run(serving, "submit", str(file), "--wait", "-o", str(made), preexec_fn=limited(8192))
    assert done.returncode == 5
    batch = done.stdout.decode().strip()
    *_, last = done.stderr.decode().splitlines()
    assert last == f"File too large; the results stay stored: vllm-batch results {batch} -o FILE"
    assert made.read_text() == "of before\n"
    assert not list(file.parent.glob("*.part*"))
    assert run(serving, "results", batch, "-o", str(made)).returncode == 0
    assert len(made.read_text().splitlines()) == 50


@pytest.mark.parametrize(
    "arguments", [("results", "BATCH"), ("get", "BATCH"), ("list",), ("get", "BATCH", "--json"), ("status",)]
)
def test_a_full_stdout_is_one_line(serving: Stack, client: Client, arguments: tuple[str, ...]) -> None:
    """When stdout is full, any command exits with 5 and a message instead of a traceback."""
    batch = client.submit_lines(lines(5))
    client.wait(batch.id)
    with open("/dev/full", "wb") as full:
        given = [batch.id if argument == "BATCH" else argument for argument in arguments]
        done = run(serving, *given, stdout=full)
    assert done.returncode == 5
    assert done.stderr.decode().splitlines()[0].startswith("No space left on device")
    assert b"Traceback" not in done.stderr


def test_an_output_that_is_no_file_is_written_to(serving: Stack, file: Path) -> None:
    """An output that is a device or pipe is written directly and not replaced."""
    done = run(serving, "submit", str(file), "--wait", "-o", "/dev/null")
    assert done.returncode == 0
    batch = done.stdout.decode().strip()
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    piped = run(serving, "results", batch, "-o", "/dev/stdout")
    assert (piped.returncode, piped.stdout.count(b"\n")) == (0, 50)
    full = run(serving, "results", batch, "-o", "/dev/full")
    assert (full.returncode, b"No space left on device; the results stay stored" in full.stderr) == (5, True)


@pytest.mark.parametrize("target", ["localhost", "http://localhost:50051", "localhost:0", "::1:50051", "a b:1", ""])
def test_a_wrong_target_is_refused_at_once(target: str) -> None:
    """A malformed target is rejected at once, without retries."""
    done = subprocess.run([str(CLI), "--target", target, "submit", "-"], input=b"", capture_output=True, timeout=30)
    assert done.returncode == 2
    assert f"{target!r} is no address" in done.stderr.decode()


def test_unknown_batch_and_unimplemented(serving: Stack) -> None:
    """Errors from the server are printed without a traceback, with exit code 3."""
    for arguments in (["watch", "batch_99"], ["results", "batch_99"], ["cancel", "batch_99"]):
        done = run(serving, *arguments)
        assert done.returncode == 3
        assert b"Traceback" not in done.stderr
        assert done.stderr


def test_unavailable(stack: Stack, file: Path) -> None:
    """Without a gateway the command gives up once its patience has run out, with exit code 4."""
    done = run(stack, "submit", str(file), patience="1")
    assert done.returncode == 4
    assert b"trying again" in done.stderr
    assert run(stack, "status").returncode == 4


def test_waits_for_a_worker(stack: Stack, file: Path) -> None:
    """Submitting while the worker loads waits as the server asks and then creates one batch."""
    stack.gateway()
    stack.worker(simulated_load_s=1)
    done = run(stack, "submit", str(file), "--wait", patience="60")
    assert done.returncode == 0
    assert len(run(stack, "list", "--json").stdout.splitlines()) == 1


def test_interrupted_wait_says_how_to_come_back(serving: Stack, tmp_path: Path) -> None:
    """Ctrl-C leaves the batch running and says how to follow it again."""
    path = tmp_path / "slow.jsonl"
    path.write_bytes(b"".join(lines(2, vllm_xargs={"simulate": 600})))
    command = [str(CLI), "--target", serving.target, "submit", str(path), "--wait"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout
    batch = process.stdout.readline().strip()
    assert process.stderr
    assert "in_progress" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=30)
    assert process.returncode == 130
    assert f"{batch} goes on" in told
    assert f"vllm-batch watch {batch}" in told
    with Client(serving.target) as client:
        assert client.get(batch).state == pb.BATCH_STATE_IN_PROGRESS
