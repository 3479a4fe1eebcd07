"""One whole stack for all clients, each of which is installed as its users install it, and kept for the next run."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.clients.running import REQUESTS
from tests.support.stacks import ROOT, FullStack, full_stack

HERE = Path(__file__).parent
CACHE = ROOT / "var" / "clients"
# The oldest on which they were tried.
NODE = 20


def kept(name: str, inputs: list[Path], install: Callable[[Path], None]) -> Path:
    """A folder that `install` has filled from these inputs, now or in an earlier run."""
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in inputs)).hexdigest()
    folder = CACHE / f"{name}-{digest[:16]}"
    done = folder / "installed"
    if not done.exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        install(folder)
        done.touch()
    return folder


def run(*command: str | Path, cwd: Path | None = None) -> str:
    """Runs a command that has to succeed. Returns its output."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="package")
def stack() -> Iterator[FullStack]:
    """A stack that takes some seconds for each batch, and restarts a worker that was killed at once every time."""
    settings = {
        "BATCH_ENGINE": "simulated",
        "BATCH_SIMULATED_REQUEST_S": "1",
        "BATCH_HEARTBEAT_INTERVAL_S": "1",
        "BATCH_RESTART_BACKOFF_MAX_S": "1",
    }
    with full_stack(**settings) as stack:
        started = stack.script("start-all.sh")
        assert started.returncode == 0, started.stderr + stack.logs()
        yield stack


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A file of requests."""
    file = tmp_path / "in.jsonl"
    with file.open("w") as lines:
        for i in range(REQUESTS):
            body = {"model": "tiny", "messages": [{"role": "user", "content": f"hello {i}"}]}
            line = {"custom_id": f"c{i}", "method": "POST", "url": "/v1/chat/completions", "body": body}
            lines.write(json.dumps(line) + "\n")
    return file


@pytest.fixture(scope="package")
def npm() -> Path:
    """A folder with the npm packages of package-lock.json, for programs of Node."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        pytest.skip("no node or no npm on this machine: apt-get install -y nodejs npm")
    version = run(node, "--version")
    found = re.match(r"v(\d+)", version)
    if not found or int(found[1]) < NODE:
        pytest.skip(f"node is {version.strip()}, too old for the clients: they need {NODE} or newer")
    inputs = [HERE / "npm" / name for name in ("package.json", "package-lock.json")]

    def install(folder: Path) -> None:
        for path in inputs:
            shutil.copy(path, folder)
        run(npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund", cwd=folder)

    return kept("npm", inputs, install)


@pytest.fixture(scope="package")
def litellm() -> Path:
    """LiteLLM's command, in an environment of its own: what it needs does not fit what vLLM needs."""
    requirements = HERE / "litellm" / "requirements.txt"

    def install(folder: Path) -> None:
        run(sys.executable, "-m", "venv", folder)
        run(folder / "bin" / "python", "-m", "pip", "install", "--no-deps", "--requirement", requirements)

    return kept("litellm", [requirements], install) / "bin" / "litellm"


@pytest.fixture(autouse=True)
def without_own_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients find nothing of the person who runs the tests."""
    for name in [name for name in os.environ if name.startswith(("OPENAI_", "LITELLM_", "AI_"))]:
        monkeypatch.delenv(name)
