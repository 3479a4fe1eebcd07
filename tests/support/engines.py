"""Real vLLM for tests: our adapter, and vLLM's own batch runner to compare with."""

import asyncio
import gc
import json
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from service.config import Settings
from service.worker.engine.protocol import Answer
from service.worker.engine.thread import EngineThread
from service.worker.engine.vllm import VllmEngine
from tests.support.collector import TRACEPARENT

# As the worker does (service/worker/__main__.py), so that an engine starts as fast here and in its process.
gc.set_threshold(50_000, 10, 10)
sys.modules["__main__"].__spec__ = find_spec("service.worker.engine.spawned")

CHAT_FLAGS = ("--enable-auto-tool-choice", "--tool-call-parser", "hermes")
# As the worker sends them.
HEADERS = {"x-request-id": "batch_req_7_12", "traceparent": TRACEPARENT}
# The batch runner leaves the details of a prompt's usage out, and what is cached depends on what ran before.
VARIES = ("id", "created", "created_at", "completed_at", "system_fingerprint", "prompt_tokens_details")


class Running:
    """An engine in its own thread, called from the test's. Not started yet."""

    def __init__(self, home: Path, engine_args: str = "") -> None:
        self.thread = EngineThread()
        self.engine = VllmEngine(Settings(home=home, engine_args=engine_args))

    def start(self) -> None:
        self.call(self.engine.start(), 600)

    def call(self, work: Any, timeout_s: float = 120) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.thread._loop).result(timeout_s)

    def run(self, body: dict[str, Any], url: str) -> Answer:
        answer: Answer = self.call(self.engine.run(url, json.dumps({"model": "tiny"} | body), HEADERS))
        return answer

    def stop(self) -> None:
        self.call(self.engine.stop())
        self.thread.stop(10)


def run_batch(
    running: Running, folder: Path, requests: Sequence[tuple[str, dict[str, Any]]], *arguments: str
) -> list[dict[str, Any]]:
    """Runs these (url, body) through vLLM's own batch runner, over the same engine. Returns its outputs in order."""
    from vllm.entrypoints.launchers import run_batch as runner
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    given, made = folder / "in.jsonl", folder / "out.jsonl"
    with given.open("w") as file:
        for number, (url, body) in enumerate(requests):
            request = {"custom_id": str(number), "method": "POST", "url": url, "body": {"model": "tiny"} | body}
            file.write(json.dumps(request) + "\n")
    client = running.engine._client
    flags = ["--model", client.model_config.model, "--served-model-name", "tiny", *arguments]
    files = ["-i", str(given), "-o", str(made)]
    parsed = runner.make_arg_parser(FlexibleArgumentParser()).parse_args([*files, *flags])
    # Neither side finds what the other computed.
    running.call(client.reset_prefix_cache())
    running.call(runner.run_batch(client, parsed))
    running.call(client.reset_prefix_cache())
    outputs = {output["custom_id"]: output for output in map(json.loads, made.read_text().splitlines())}
    return [outputs[str(number)] for number in range(len(requests))]


def case_lines(name: str) -> list[tuple[str, dict[str, Any]]]:
    """(url, body) of each line of tests/e2e/cases/NAME.jsonl."""
    lines = (Path(__file__).parents[1] / "e2e" / "cases" / f"{name}.jsonl").read_text().splitlines()
    return [(line["url"], line["body"]) for line in map(json.loads, lines)]


def without_ids(body: Any) -> Any:
    """A body without the fields that differ between runs."""
    if isinstance(body, dict):
        return {k: without_ids(v) for k, v in body.items() if k not in VARIES}
    return [without_ids(item) for item in body] if isinstance(body, list) else body


def check_same(running: Running, theirs: list[dict[str, Any]], requests: Sequence[tuple[str, dict[str, Any]]]) -> None:
    """Asserts that each answer has the status and body of vLLM's runner, apart from ids and times."""
    for (url, body), their in zip(requests, theirs, strict=True):
        answer = running.run(body, url)
        assert answer.status_code == their["response"]["status_code"], body
        expected = their["response"]["body"] if answer.status_code == 200 else their["error"]
        if isinstance(expected, str):
            # For bodies that the runner itself rejects, it reports only a message.
            assert expected in json.loads(answer.body)["error"]["message"]
            continue
        assert without_ids(json.loads(answer.body)) == without_ids(expected)
