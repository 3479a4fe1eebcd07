"""The adapter on the installed vLLM gives the same answers as vLLM's own batch runner."""

import asyncio
import json
import os
import re
import signal
import uuid
from pathlib import Path
from typing import Any

import psutil
import pytest
from prometheus_client import REGISTRY

from service.config import Settings
from service.processes import is_alive
from service.worker.engine.protocol import EngineDeadError
from service.worker.engine.vllm import EngineArgumentError, VllmEngine
from tests.support.collector import CLIENT_SPAN, Collector
from tests.support.engines import CHAT_FLAGS, HEADERS, Running, case_lines, check_same, run_batch
from tests.support.waiting import until

# In one process with what shares its engine, or at least the import of vLLM.
pytestmark = [pytest.mark.timeout(900), pytest.mark.xdist_group("vllm")]
ROOT = Path(__file__).resolve().parents[2]
CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "Say something."}]
TOOL = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
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
    {
        "messages": MESSAGES,
        "max_tokens": 40,
        "temperature": 0,
        "tools": [{"type": "function", "function": {"name": "f", "parameters": TOOL}}],
        "tool_choice": {"type": "function", "function": {"name": "f"}},
    },
]


def test_what_it_serves(running: Running) -> None:
    """A chat model serves the endpoints of a chat model, under its name."""
    assert running.engine.models == ("tiny",)
    assert running.engine.urls == {CHAT, "/v1/completions", "/v1/responses"}
    assert running.engine.window >= 2


def test_same_bodies_as_run_batch(running: Running, tmp_path: Path) -> None:
    """The adapter answers with the same bodies as vLLM's own batch runner, apart from ids and times."""
    requests = [(CHAT, body) for body in BODIES]
    # After public bug reports: meanings of parameters, no model, a stream, an endpoint that does not exist.
    names = ("semantics_chat", "model_null", "model_empty", "stream_true", "audio")
    reported = [line for name in names for line in case_lines(name)]
    theirs = run_batch(running, tmp_path, requests + reported, *CHAT_FLAGS)
    statuses = [their["response"]["status_code"] for their in theirs]
    assert statuses[: len(BODIES)] == [200, 200, 200, 200, 400, 200, 200]
    assert set(statuses[len(BODIES) :]) == {200, 400}
    check_same(running, theirs, requests + reported)


def test_other_endpoints(running: Running) -> None:
    """Endpoints that vLLM's run_batch does not offer work too, with their token counts."""
    completion = running.run({"prompt": "abc", "max_tokens": 4, "temperature": 0}, "/v1/completions")
    response = running.run({"input": "abc", "max_output_tokens": 16}, "/v1/responses")
    assert json.loads(completion.body)["object"] == "text_completion"
    assert (completion.status_code, completion.completion_tokens) == (200, 4)
    assert json.loads(response.body)["object"] == "response"
    assert response.prompt_tokens > 0


def test_cached_tokens(running: Running) -> None:
    """A prompt that the engine has met before is counted as cached, as its usage says, at every endpoint."""
    text = "the same words again and again " * 20
    asked: list[tuple[str, dict[str, Any]]] = [
        ("/v1/completions", {"prompt": text, "max_tokens": 1}),
        (CHAT, {"messages": [{"role": "user", "content": text}], "max_tokens": 1}),
        ("/v1/responses", {"input": text, "max_output_tokens": 16}),
    ]
    for url, body in asked:
        running.run(body, url)
        again = running.run(body, url)
        usage = json.loads(again.body)["usage"]
        details = usage.get("prompt_tokens_details") or usage["input_tokens_details"]
        assert 0 < again.cached_tokens == details["cached_tokens"] <= again.prompt_tokens, url


def test_wrong_parameters_are_refused(running: Running) -> None:
    """An invalid parameter is a 400 that names it, and the engine keeps working."""
    for body, param in (
        ({"messages": "x"}, "body.messages"),
        ({"messages": MESSAGES, "temperature": -1}, "temperature"),
    ):
        answer = running.run(body, CHAT)
        assert answer.status_code == 400
        assert json.loads(answer.body)["error"]["param"] == param
    assert running.run({"messages": MESSAGES, "max_tokens": 1}, CHAT).status_code == 200


def test_steps_count_while_it_works(running: Running) -> None:
    """The progress counter advances with at least every generated token."""
    before = running.engine.steps
    running.run({"messages": MESSAGES, "max_tokens": 30, "ignore_eos": True}, CHAT)
    assert running.engine.steps >= before + 30


def test_engine_knows_a_request_by_its_name_and_trace(running: Running, collector: Collector) -> None:
    """The id in the body is the result's id, and vLLM's span belongs to the trace of the request."""
    # Not the trace that all other tests send.
    trace = uuid.uuid4().hex
    headers = HEADERS | {"traceparent": f"00-{trace}-{CLIENT_SPAN}-01"}
    for url, body in ((CHAT, {"messages": MESSAGES}), ("/v1/completions", {"prompt": "abc"})):
        text = json.dumps({"model": "tiny", "max_tokens": 1} | body)
        answer = running.call(running.engine.run(url, text, headers))
        assert json.loads(answer.body)["id"].endswith("-batch_req_7_12")
    until(lambda: any(span.trace == trace for span in collector.spans), "vLLM's span of the trace")
    assert {span.parent for span in collector.spans if span.trace == trace} == {CLIENT_SPAN}


def test_vllms_own_metrics_are_exported(running: Running) -> None:
    """Every vLLM metric that the dashboard queries is in the registry that the worker exports."""
    running.run({"messages": MESSAGES, "max_tokens": 1}, CHAT)
    dashboard = (ROOT / "conf/grafana-dashboard.json").read_text()
    exported = {sample.name for family in REGISTRY.collect() for sample in family.samples}
    asked = set(re.findall(r"vllm:\w+", dashboard))
    assert len(asked) >= 5
    assert asked <= exported


async def steps(engine: VllmEngine, count: int) -> None:
    """Waits until the engine has made this many more steps."""
    goal = engine.steps + count
    async with asyncio.timeout(60):
        while engine.steps < goal:  # noqa: ASYNC110 - the counter is all that the engine has
            await asyncio.sleep(0.01)


def test_cancelling_aborts_in_the_engine(running: Running) -> None:
    """Cancelling a request aborts it in the engine."""
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
    """An unknown engine flag raises an error that names the setting, instead of exiting the process."""
    engine = VllmEngine(Settings(home=home, engine_args="--no-such-flag 1"))
    with pytest.raises(EngineArgumentError, match=r"BATCH_ENGINE_ARGS.*no-such-flag"):
        asyncio.run(engine.start())


def test_engine_death_is_no_answer(running: Running) -> None:
    """When EngineCore is killed, waiting requests raise, the cause is known, and stopping leaves no engine process."""
    children = psutil.Process().children(recursive=True)
    # That of an earlier engine of this process may not be collected yet.
    core = next(child for child in children if is_alive(child) and "EngineCore" in "".join(child.cmdline()[:1]))
    body = json.dumps({"model": "tiny", "messages": MESSAGES, "max_tokens": 2000, "ignore_eos": True})

    async def kill_in_the_middle() -> list[Any]:
        tasks = [asyncio.ensure_future(running.engine.run(CHAT, body)) for _ in range(8)]
        await steps(running.engine, 5)
        os.kill(core.pid, signal.SIGKILL)
        return await asyncio.gather(*tasks, return_exceptions=True)

    outcomes = running.call(kill_in_the_middle())
    assert [type(outcome) for outcome in outcomes] == [EngineDeadError] * 8
    assert running.engine.is_dead
    assert running.call(running.engine.death_cause()).text == "EngineCore was killed by signal 9 (out of memory?)"
    with pytest.raises(EngineDeadError):
        running.run({"messages": MESSAGES}, CHAT)
    running.call(running.engine.stop())
    until(lambda: not is_alive(core), "the engine process to end")
