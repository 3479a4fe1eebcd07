"""The adapter on the installed vLLM: what it answers is what vLLM's own batch runner answers."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from service.config import Settings
from service.worker import tiny_model
from service.worker.engine import Answer, EngineDeadError
from service.worker.engine_thread import EngineThread
from service.worker.vllm_engine import EngineArgumentError, VllmEngine
from tests.waiting import until

pytestmark = pytest.mark.timeout(300)
CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "Say something."}]
BODIES: list[dict[str, Any]] = [
    {"messages": MESSAGES, "max_tokens": 12, "temperature": 0},
    {"messages": MESSAGES, "max_tokens": 8, "seed": 3, "temperature": 0.9, "n": 3},
    {"messages": MESSAGES, "max_tokens": 5, "temperature": 0, "logprobs": True, "top_logprobs": 3},
    {"messages": MESSAGES, "max_completion_tokens": 20, "temperature": 0, "ignore_eos": True, "stop": ["zzz"]},
    {"messages": [{"role": "user", "content": "long " * 3000}], "max_tokens": 5},
    {
        "messages": MESSAGES,
        "max_tokens": 40,
        "temperature": 0,
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "n", "schema": {"type": "string", "enum": ["yes", "no"]}},
        },
    },
]


class Running:
    """The engine in its thread, called from the test's."""

    def __init__(self, home: Path) -> None:
        self.thread = EngineThread()
        self.engine = VllmEngine(Settings(home=home))

    def call(self, work: Any, timeout_s: float = 120) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.thread._loop).result(timeout_s)

    def run(self, body: dict[str, Any], url: str = CHAT) -> Answer:
        answer: Answer = self.call(self.engine.run(url, json.dumps({"model": "tiny"} | body)))
        return answer


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Short: the settings hold BATCH_HOME to what a socket's path may have.
    return Path(os.path.relpath(tmp_path_factory.mktemp("h")))


@pytest.fixture(scope="module")
def running(home: Path) -> Iterator[Running]:
    """One engine for the module; the last test kills it."""
    running = Running(home)
    running.call(running.engine.start(), 200)
    yield running
    running.call(running.engine.stop())
    running.thread.stop(10)


def test_what_it_serves(running: Running) -> None:
    """A chat model is offered at the endpoints of a chat model, under its name."""
    assert running.engine.models == ("tiny",)
    assert running.engine.urls == {CHAT, "/v1/completions", "/v1/responses"}
    assert running.engine.window >= 2


def without_ids(body: Any) -> Any:
    """A body without what differs from one run to the next."""
    if isinstance(body, dict):
        return {k: without_ids(v) for k, v in body.items() if k not in ("id", "created", "system_fingerprint")}
    return [without_ids(item) for item in body] if isinstance(body, list) else body


def test_same_bodies_as_run_batch(running: Running, home: Path, tmp_path: Path) -> None:
    """vLLM's own batch runner gives the same bodies for the same lines, up to ids and times."""
    given, made = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    with given.open("w") as file:
        for number, body in enumerate(BODIES):
            request = {"custom_id": str(number), "method": "POST", "url": CHAT, "body": {"model": "tiny"} | body}
            file.write(json.dumps(request) + "\n")
    arguments = ["--model", str(tiny_model.ensure(Settings(home=home).home / "models" / "tiny"))]
    arguments += ["--served-model-name", "tiny", "--enforce-eager", "--max-model-len", "2048"]
    subprocess.run(
        [sys.executable, "-m", "vllm.entrypoints.launchers.run_batch", "-i", str(given), "-o", str(made), *arguments],
        env=os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"},
        check=True,
        timeout=200,
        capture_output=True,
    )
    theirs = {output["custom_id"]: output for output in map(json.loads, made.read_text().splitlines())}
    statuses = []
    for number, body in enumerate(BODIES):
        answer, their = running.run(body), theirs[str(number)]
        statuses.append(answer.status_code)
        assert answer.status_code == their["response"]["status_code"]
        expected = their["response"]["body"] if answer.status_code == 200 else their["error"]
        assert without_ids(json.loads(answer.body)) == without_ids(expected)
    assert statuses == [200, 200, 200, 200, 400, 200]


def test_other_endpoints(running: Running) -> None:
    """Endpoints that run-batch does not offer work too, with their token counts."""
    completion = running.run({"prompt": "abc", "max_tokens": 4, "temperature": 0}, "/v1/completions")
    response = running.run({"input": "abc", "max_output_tokens": 16}, "/v1/responses")
    assert json.loads(completion.body)["object"] == "text_completion"
    assert (completion.status_code, completion.completion_tokens) == (200, 4)
    assert json.loads(response.body)["object"] == "response"
    assert response.prompt_tokens > 0


def test_wrong_parameters_are_refused(running: Running) -> None:
    """A body that the endpoint does not take is a 400 that names the parameter; the engine goes on."""
    for body, param in (({"messages": "x"}, "messages"), ({"messages": MESSAGES, "temperature": -1}, "temperature")):
        answer = running.run(body)
        assert answer.status_code == 400
        assert json.loads(answer.body)["error"]["param"] == param
    assert running.run({"messages": MESSAGES, "max_tokens": 1}).status_code == 200


def test_steps_count_while_it_works(running: Running) -> None:
    """The progress counter moves with the engine and stands still without work."""
    before = running.engine.steps
    running.run({"messages": MESSAGES, "max_tokens": 30, "ignore_eos": True})
    assert running.engine.steps >= before + 30


async def steps(engine: VllmEngine, count: int) -> None:
    """Waits until the engine has made that many steps more."""
    goal = engine.steps + count
    async with asyncio.timeout(60):
        while engine.steps < goal:  # noqa: ASYNC110 - the counter is all that the engine has
            await asyncio.sleep(0.01)


def test_cancelling_aborts_in_the_engine(running: Running) -> None:
    """A request that nobody waits for any more stops costing inference."""
    body = json.dumps({"model": "tiny", "messages": MESSAGES, "max_tokens": 2000, "ignore_eos": True})

    async def start_and_cancel() -> None:
        task = asyncio.ensure_future(running.engine.run(CHAT, body))
        await steps(running.engine, 10)
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()

    running.call(start_and_cancel())
    client = running.engine._client
    until(lambda: not client.output_processor.has_unfinished_requests(), "the engine to be idle")


def test_wrong_engine_argument(home: Path) -> None:
    """A flag that vLLM does not know is an error that names the setting, not the end of the process."""
    engine = VllmEngine(Settings(home=home, engine_args="--no-such-flag 1"))
    with pytest.raises(EngineArgumentError, match=r"BATCH_ENGINE_ARGS.*no-such-flag"):
        asyncio.run(engine.start())


def test_engine_death_is_no_answer(running: Running) -> None:
    """A killed EngineCore raises in all who wait and is known at once; nothing is left after stopping."""
    children = psutil.Process().children(recursive=True)
    core = next(child for child in children if child.cmdline() and "EngineCore" in child.cmdline()[0])
    body = json.dumps({"model": "tiny", "messages": MESSAGES, "max_tokens": 2000, "ignore_eos": True})

    async def kill_in_the_middle() -> list[Any]:
        tasks = [asyncio.ensure_future(running.engine.run(CHAT, body)) for _ in range(8)]
        await steps(running.engine, 5)
        os.kill(core.pid, signal.SIGKILL)
        return await asyncio.gather(*tasks, return_exceptions=True)

    outcomes = running.call(kill_in_the_middle())
    assert [type(outcome) for outcome in outcomes] == [EngineDeadError] * 8
    assert running.engine.is_dead
    with pytest.raises(EngineDeadError):
        running.run({"messages": MESSAGES})
    running.call(running.engine.stop())
    until(lambda: not any(c.is_running() and c.cmdline() and "VLLM" in c.cmdline()[0] for c in children), "their end")
