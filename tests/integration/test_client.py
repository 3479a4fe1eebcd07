"""The installed client on a whole stack: the wheel in its own environment, types, examples, `top`."""

import asyncio
import fcntl
import json
import os
import pty
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.batches import line, lines
from tests.support.namespaces import moving_name
from tests.support.servers import Stack
from tests.support.stacks import ROOT, FullStack, full_stack
from tests.support.waiting import until
from tests.support.wheels import build_wheel, make_environment
from vllm_batch import AsyncClient, CallError
from vllm_batch.v1 import batch_service_pb2 as pb

BIN = Path(sys.executable).parent
PYTHON_EXAMPLES = ("sync_client.py", "async_client.py", "from_openai_batch.py")
TYPED = """
import asyncio
import grpc
from vllm_batch import AsyncClient, CallError, Client
from vllm_batch.v1 import batch_service_pb2, batch_service_pb2_grpc, recovery_service_pb2, recovery_service_pb2_grpc

def one(client: Client) -> list[str]:
    batch = client.submit_lines([b"", "", {"custom_id": "a"}], priority=1, on_sent=lambda sent: print(sent + 1))
    done: batch_service_pb2.Batch = client.wait(batch.id, on_progress=lambda batch: print(batch.counts.total + 1))
    return [result.custom_id for result in client.results(done.id, follow=True)]

async def two(client: AsyncClient) -> int:
    batch = await client.submit_lines([{"custom_id": "a"}], metadata={"a": "b"})
    status: batch_service_pb2.GetServiceStatusResponse = await client.service_status()
    assert status.accepting or (await client.accepting()).upper()
    return sum([result.index async for result in client.results(batch.id)])

def three(channel: grpc.Channel) -> str:
    request = batch_service_pb2.GetBatchRequest(batch_id="batch_1")
    stub = batch_service_pb2_grpc.BatchServiceStub(channel)
    return stub.GetBatch(request, timeout=10).batch.id

async def four(channel: grpc.aio.Channel) -> int:
    stub = recovery_service_pb2_grpc.RecoveryServiceStub(channel)
    return (await stub.GetStatus(recovery_service_pb2.GetStatusRequest(), timeout=10)).workers[0].pid
"""
# One mistake per line, from the third line on.
WRONG = """
def wrong(client: Client, stub: batch_service_pb2_grpc.BatchServiceStub) -> None:
    from vllm_batch import Cleint
    client.submit_lines([3])
    client.submit_lines([], prioritty=1)
    client.get("a").status
    stub.GetBatch(batch_service_pb2.ListBatchesRequest())
"""


@pytest.fixture(scope="module")
def full() -> Iterator[FullStack]:
    """One stack for all tests of this file."""
    with full_stack(BATCH_ENGINE="simulated", BATCH_SIMULATED_REQUEST_S="0.02", BATCH_CHECK_INTERVAL_S="1") as stack:
        started = stack.script("start-all.sh")
        assert started.returncode == 0, started.stderr
        yield stack


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a separate virtual environment with the wheel, its dependencies, and types for mypy."""
    folder = tmp_path_factory.mktemp("wheel")
    return make_environment(folder / "venv", build_wheel(folder), "types-grpcio", "types-protobuf")


def run(*command: str | Path, cwd: Path, **env: str) -> "subprocess.CompletedProcess[str]":
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("BATCH_", "PYTHON"))}
    return subprocess.run(
        [str(part) for part in command], cwd=cwd, env=clean | env, capture_output=True, text=True, timeout=100
    )


@pytest.mark.thorough
def test_wheel_in_another_environment(full: FullStack, elsewhere: Path, tmp_path: Path) -> None:
    """The wheel needs nothing from the server: in an environment of its own it submits a batch and fetches results."""
    absent = "import importlib.util as u; print([n for n in %r if u.find_spec(n)])"
    names = ("vllm", "peewee", "psycopg2", "supervisor", "service", "watchdog", "tests")
    assert run(elsewhere, "-c", absent % (names,), cwd=tmp_path).stdout == "[]\n"
    command = elsewhere.with_name("vllm-batch")
    assert "version 0." in run(command, "--version", cwd=tmp_path).stdout
    (tmp_path / "in.jsonl").write_bytes(b"".join(lines(20)))
    arguments = ("--target", full.target, "submit", "in.jsonl", "--wait", "-o", "out.jsonl")
    done = run(command, *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 20


@pytest.mark.thorough
def test_types(elsewhere: Path, tmp_path: Path) -> None:
    """`mypy --strict` accepts correct uses of both clients and the stubs, and reports every mistake."""
    (tmp_path / "typed.py").write_text(TYPED)
    (tmp_path / "wrong.py").write_text(TYPED + WRONG)
    mypy = (BIN / "mypy", "--strict", "--config-file=", "--python-executable", elsewhere)
    good = run(*mypy, "typed.py", *(ROOT / "examples" / name for name in PYTHON_EXAMPLES), cwd=tmp_path)
    assert good.returncode == 0, good.stdout
    bad = run(*mypy, "wrong.py", cwd=tmp_path)
    first = len(TYPED.splitlines()) + 3
    found = {int(number) for number in re.findall(r"^wrong.py:(\d+): error", bad.stdout, re.MULTILINE)}
    assert found == set(range(first, first + 5)), bad.stdout


@pytest.mark.thorough
def test_examples_in_python(full: FullStack, elsewhere: Path, tmp_path: Path) -> None:
    """The Python examples do what they say, and the one for OpenAI's format writes that format."""
    sync, aio, openai = (ROOT / "examples" / name for name in PYTHON_EXAMPLES)
    done = run(elsewhere, sync, full.target, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [text.split(":")[0] for text in done.stdout.splitlines()] == ["Lisbon", "Oslo", "Quito"]
    assert ": 3 of 3" in done.stderr
    done = run(elsewhere, aio, full.target, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == sorted(f"{t}-{n} 200" for t in ("bees", "glass") for n in range(10))
    (tmp_path / "in.jsonl").write_bytes(b"".join(lines(3)))
    done = run(elsewhere, openai, "in.jsonl", "out.jsonl", full.target, cwd=tmp_path)
    assert "completed: 3 completed, 0 failed" in done.stdout, done.stderr
    written = [json.loads(text) for text in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [each["custom_id"] for each in written] == ["c0", "c1", "c2"]
    assert set(written[0]) == {"id", "custom_id", "response", "error"}
    assert set(written[0]["response"]) == {"status_code", "request_id", "body"}


# Implements the grpcurl calls with buf, where grpcurl is not installed.
SHIM = """#!/usr/bin/env bash
shift
data='{}'
if [[ $1 = -d ]]; then data=$2 && shift 2; fi
if [[ $2 = list ]]; then exec %s curl --protocol grpc --http2-prior-knowledge --list-services "http://$1"; fi
exec %s curl --protocol grpc --http2-prior-knowledge -d "$data" "http://$1/$2"
"""


def test_example_of_grpcurl(full: FullStack, tmp_path: Path) -> None:
    """The grpcurl example creates a batch, waits for it and reads its results, using reflection alone."""
    if not shutil.which("grpcurl"):
        (tmp_path / "grpcurl").write_text(SHIM % (BIN / "buf", BIN / "buf"))
        (tmp_path / "grpcurl").chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = run(ROOT / "examples/grpcurl.sh", full.target, cwd=tmp_path, PATH=path, HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr + done.stdout
    assert "vllm_batch.v1.BatchService" in done.stdout
    assert "BATCH_STATE_COMPLETED" in done.stdout
    # The field's name differs between builds of grpcurl: as in the contract or as in JSON.
    assert len(re.findall(r'"body_?json"', done.stdout, re.IGNORECASE)) == 3


class Terminal:
    """A program in a pseudo-terminal of 80 columns and 24 lines."""

    def __init__(self, *command: str) -> None:
        self._outer, self.inner = pty.openpty()
        fcntl.ioctl(self.inner, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        self.before = termios.tcgetattr(self.inner)
        env = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
        self.process = subprocess.Popen(
            [str(BIN / "vllm-batch"), *command],
            stdin=self.inner,
            stdout=self.inner,
            stderr=self.inner,
            env=env | {"TERM": "xterm-256color"},
        )
        self._raw = b""

    def press(self, key: str) -> None:
        os.write(self._outer, key.encode())

    def read(self) -> str:
        """All output so far."""
        while select.select([self._outer], [], [], 0)[0]:
            self._raw += os.read(self._outer, 65536)
        return self._raw.decode(errors="ignore")

    def screen(self) -> str:
        """The last frame drawn, without colours."""
        *_, frame = self.read().split("\x1b[H")
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", frame)

    def wait_for(self, *texts: str) -> str:
        """Waits for a screen with all of the texts, and returns it."""

        def look() -> str:
            assert self.process.poll() is None, self.read()
            shown = self.screen()
            return shown if all(text in shown for text in texts) else ""

        try:
            return until(look, f"{texts} on the screen")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.screen()}") from None

    def ended(self) -> int:
        """Waits for the program to end and returns its exit status."""
        until(lambda: self.read() and self.process.poll() is not None, "the program to end")
        return self.process.returncode

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(10)
        os.close(self._outer)
        os.close(self.inner)


@pytest.fixture
def terminal() -> Iterator[Callable[..., Terminal]]:
    made: list[Terminal] = []

    def make(*command: str) -> Terminal:
        made.append(Terminal(*command))
        return made[-1]

    yield make
    for each in made:
        each.close()


def is_restored(terminal: Terminal) -> bool:
    """True if the terminal's modes, screen and cursor are as before."""
    last = terminal.read()
    shown = last.rfind("\x1b[?1049l") > last.rfind("\x1b[?1049h") and last.rfind("\x1b[?25h") > last.rfind("\x1b[?25l")
    return shown and termios.tcgetattr(terminal.inner) == terminal.before


def test_top(full: FullStack, terminal: Callable[..., Terminal], tmp_path: Path) -> None:
    """On 80 columns `top` shows verdict, signals and a running batch, and `q` restores the terminal."""
    (tmp_path / "slow.jsonl").write_bytes(b"".join(lines(400, vllm_xargs={"simulate": 1})))
    submitted = run(BIN / "vllm-batch", "--target", full.target, "submit", "slow.jsonl", cwd=tmp_path)
    batch_id = submitted.stdout.strip()
    shown = terminal("--target", full.target, "top", "--watchdog-target", full.watchdog)
    screen = shown.wait_for("HEALTHY", "SERVING", "accepts new work", batch_id, "in_progress", "━", "none yet")
    assert max(map(len, screen.splitlines())) <= 80
    shown.press("q")
    assert shown.ended() == 0
    assert is_restored(shown)


def test_top_when_all_is_down(full: FullStack, terminal: Callable[..., Terminal]) -> None:
    """`top` says whether the gateway or the watchdog is down and still shows the other; Ctrl-C exits cleanly."""
    alone = terminal("--target", "127.0.0.1:1", "top", "--watchdog-target", full.watchdog)
    alone.wait_for("gateway   does not answer", "HEALTHY")
    other = terminal("--target", full.target, "top", "--watchdog-target", "127.0.0.1:1")
    other.wait_for("watchdog  does not answer", "accepts new work")
    for each in (alone, other):
        each.process.send_signal(signal.SIGINT)
        assert each.ended() == 0
        assert is_restored(each)


def test_status_as_json(full: FullStack, tmp_path: Path) -> None:
    """`status --json` prints one object with gateway, watchdog, workers, last restart and batches."""
    command = (BIN / "vllm-batch", "--target", full.target, "status", "--watchdog-target", full.watchdog, "--json")
    found = json.loads(run(*command, cwd=tmp_path).stdout)
    assert found["gateway"] == {"accepts_new_work": True, "failure": "", "refusal": ""}
    assert [each["verdict"] for each in found["workers"]] == ["VERDICT_HEALTHY"]
    assert set(found) == {"gateway", "watchdog", "hosts", "workers", "last_restart", "models", "batches"}


def test_asyncio_client(full: FullStack) -> None:
    """AsyncClient submits, waits with progress, reads, lists and deletes, and its errors carry details."""

    async def use() -> None:
        async with AsyncClient(full.target, patience_s=0) as client:
            sent: list[int] = []
            batch = await client.submit_lines(lines(300), metadata={"a": "b"}, on_sent=sent.append)
            seen: list[pb.Batch] = []
            done = await client.wait(batch.id, on_progress=seen.append)
            assert (seen[-1], done.counts.completed, sent[-1] > 0) == (done, 300, True)
            found = [result.custom_id async for result in client.results(batch.id)]
            assert found == [f"c{i}" for i in range(300)]
            assert (await client.result(batch.id, "c7")).index == 7
            assert batch.id in [each.id async for each in client.list(["BATCH_STATE_COMPLETED"])]
            await client.delete(batch.id)
            await client.submit_lines([{"custom_id": "bad", "url": "/v1/nothing"}])

    with pytest.raises(CallError) as caught:
        asyncio.run(use())
    assert caught.value.violations[0][0].startswith("line 1")


def test_asyncio_client_is_told_why_an_upload_is_refused(full: FullStack) -> None:
    """AsyncClient reports why an upload was rejected even if the server stops reading long before its end."""

    async def use() -> None:
        async with AsyncClient(full.target, patience_s=0) as client:
            await client.submit_lines([b"{", *(line(f"c{i}") for i in range(100_000))])

    with pytest.raises(CallError) as caught:
        asyncio.run(use())
    assert (caught.value.code.name, caught.value.violations[0][0]) == ("INVALID_ARGUMENT", "line 1")


def test_asyncio_client_outlives_the_gateway(stack: Stack) -> None:
    """AsyncClient waits for a gateway, submits one batch, and resumes its results when the gateway dies."""
    told: list[CallError] = []

    async def use() -> list[str]:
        async with AsyncClient(stack.target, patience_s=90, on_retry=lambda error, _: told.append(error)) as client:
            submitting = asyncio.create_task(client.submit_lines(lines(600, vllm_xargs={"simulate": 0.05})))
            await asyncio.to_thread(until, lambda: told, "a first attempt")
            gateway = stack.gateway()
            stack.worker()
            batch = await submitting
            found = []
            async for result in client.results(batch.id, follow=True, order="RESULT_ORDER_FINISHED"):
                found.append(result.custom_id)
                if len(found) == 100:
                    gateway.kill()
                    gateway.start()
            assert len([each async for each in client.list()]) == 1
            return found

    found = asyncio.run(use())
    assert len(found) == 600
    assert set(found) == {f"c{i}" for i in range(600)}


ASKER = """
import sys
from vllm_batch import Client
# Less than the half minute after which gRPC would ask for the name again.
with Client(sys.argv[1], patience_s=15) as client:
    for _ in sys.stdin:
        client.service_status()
        print("answered", flush=True)
"""


def test_a_name_that_moves_is_found_again(stack: Stack, tmp_path: Path) -> None:
    """A client calls the gateway at the address for which its name stands since the gateway's next start."""
    with moving_name(tmp_path) as move:
        gateway = stack.gateway(host="moving", allow_insecure="true")
        command = [sys.executable, "-c", ASKER, f"moving:{stack.target.rpartition(':')[2]}"]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) as asker:
            assert asker.stdin is not None
            assert asker.stdout is not None
            for lives, address in enumerate(("127.0.0.2", "127.0.0.3", "127.0.0.4"), 1):
                if lives > 1:
                    gateway.terminate()
                    move(address)
                    gateway.start()
                until(lambda lives=lives: len(gateway.events("gateway_serving")) == lives, "the gateway to listen")  # type: ignore[misc]
                asker.stdin.write("\n")
                assert asker.stdout.readline() == "answered\n"
            asker.stdin.close()
