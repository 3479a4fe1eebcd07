"""Clients that people have, as they are: each runs a batch from file to results while the worker is killed once."""

import os
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from tests.clients.running import base_url, run_through_a_kill
from tests.support.ports import free_port
from tests.support.stacks import ROOT, FullStack
from tests.support.waiting import until

pytestmark = pytest.mark.thorough

PROGRAMS = Path(__file__).parent / "programs"
ADDRESS = "http://127.0.0.1:50054/v1"


def example(name: str, folder: Path, *changes: tuple[str, str]) -> Path:
    """A copy of a program in examples/ with what is changed in it, usually its address."""
    text = (ROOT / "examples" / name).read_text()
    for old, new in changes:
        assert text.count(old) == 1
        text = text.replace(old, new)
    program = folder / name
    program.write_text(text)
    return program


def test_openai_python(stack: FullStack, source: Path, tmp_path: Path) -> None:
    """The openai package, with the example."""
    program, target = example("openai_batch.py", tmp_path, (ADDRESS, base_url(stack))), tmp_path / "out.jsonl"
    run_through_a_kill(stack, [sys.executable, program, source, target], target)


def test_openai_python_asynchronous(stack: FullStack, source: Path, tmp_path: Path) -> None:
    """AsyncOpenAI, with a file in parts and pages that it turns by itself."""
    target = tmp_path / "out.jsonl"
    program = PROGRAMS / "async_openai.py"
    run_through_a_kill(stack, [sys.executable, program, base_url(stack), source, target], target)


def test_openai_node(stack: FullStack, source: Path, npm: Path, tmp_path: Path) -> None:
    """The openai package of npm, with the example."""
    # Node looks for packages from where the program is.
    program, target = example("openai_batch.mjs", npm, (ADDRESS, base_url(stack))), tmp_path / "out.jsonl"
    run_through_a_kill(stack, ["node", program, source, target], target)


def test_ai_sdk(stack: FullStack, source: Path, npm: Path, tmp_path: Path) -> None:
    """Vercel's AI SDK, whose batches are of the Responses API."""
    program, target = shutil.copy(PROGRAMS / "ai_sdk.mjs", npm), tmp_path / "out.jsonl"
    run_through_a_kill(stack, ["node", program, base_url(stack), source, target], target)


@pytest.mark.skipif(not shutil.which("curl"), reason="no curl on this machine")
def test_curl(stack: FullStack, source: Path, tmp_path: Path) -> None:
    """curl, as in OpenAI's guide."""
    target = tmp_path / "out.jsonl"
    run_through_a_kill(stack, [PROGRAMS / "curl.sh", base_url(stack), source, target], target)


def test_litellm(stack: FullStack, source: Path, litellm: Path, tmp_path: Path) -> None:
    """LiteLLM's proxy passes a batch of the openai package on, with a header that names the model."""
    target = tmp_path / "out.jsonl"
    with litellm_proxy(litellm, stack, tmp_path) as proxy:
        headers = 'api_key="sk-proxy", default_headers={"x-litellm-model": "tiny"}'
        program = example("openai_batch.py", tmp_path, (ADDRESS, f"{proxy}/v1"), ('api_key="none"', headers))
        run_through_a_kill(stack, [sys.executable, program, source, target], target)


@contextmanager
def litellm_proxy(command: Path, stack: FullStack, folder: Path) -> Iterator[str]:
    """LiteLLM's proxy in front of the stack. Yields its address."""
    port = free_port()
    served = {"model": "hosted_vllm/tiny", "api_base": base_url(stack), "api_key": "none"}
    config = {
        "model_list": [{"model_name": "tiny", "litellm_params": served}],
        "general_settings": {"master_key": "sk-proxy"},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    # Otherwise it fetches a list of prices.
    env = os.environ | {"LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    arguments = [command, "--config", folder / "config.yaml", "--host", "127.0.0.1", "--port", str(port)]
    with (folder / "litellm.log").open("wb") as log:
        process = subprocess.Popen(arguments, env=env, cwd=folder, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"

    def lives() -> bool:
        assert process.poll() is None, (folder / "litellm.log").read_text()
        try:
            with urllib.request.urlopen(f"{address}/health/liveliness", timeout=5) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    try:
        until(lives, "LiteLLM's proxy", 180)
        yield address
    finally:
        process.terminate()
        process.wait(30)
