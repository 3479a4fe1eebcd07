"""The README's commands on a Debian with nothing but Python, in a chroot: proves that nothing else is required.

    FRESH=12 scripts/test.sh -s tests/fresh         # Debian 12; FRESH=12,13 for both; about 10 minutes each

Needs root, debootstrap, the registries and 15 GB. FRESH_PYTHON=/path/bin/python3 replaces Debian's Python, for machines
that cannot get a CPU build of torch for it.
"""

import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import mkdtemp

import pytest

from tests.fresh.roots import CHECKOUT, USER, Root

SUITES = {"12": "bookworm", "13": "trixie"}
WANTED = [name for name in os.environ.get("FRESH", "").split(",") if name]

pytestmark = [
    pytest.mark.timeout(3600),
    pytest.mark.skipif(not WANTED, reason="on demand: FRESH=12, FRESH=13 or FRESH=12,13"),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for chroot and mounts"),
    pytest.mark.skipif(shutil.which("debootstrap") is None, reason="needs debootstrap"),
]


@pytest.fixture(scope="module", params=WANTED or ["12"], ids=lambda name: f"debian{name}")
def root(request: pytest.FixtureRequest) -> Iterator[Root]:
    """A Debian for the tests of this file, which build on one another like a new user's first day."""
    folder = Path(mkdtemp(prefix=f"vllm-batch-debian{request.param}-"))
    python = os.environ.get("FRESH_PYTHON")
    made = Root(folder / "root", Path(python) if python else None)
    # An unprivileged user has to pass through the folders above it.
    folder.chmod(0o755)
    try:
        made.make(SUITES[request.param])
        yield made
    finally:
        made.remove()


def to_type(output: str) -> str:
    """The command that a script said to type as root."""
    [line] = [line for line in output.splitlines() if "type as root: " in line]
    return line.partition("type as root: ")[2]


def has_venv(root: Root) -> bool:
    """True once something was installed."""
    return (root.path / CHECKOUT.lstrip("/") / ".venv" / "bin").exists()


@pytest.mark.parametrize("command", ["scripts/demo.sh", "scripts/test.sh"])
def test_says_what_is_missing(root: Root, command: str) -> None:
    """Without a network, a script reports what is missing and what to type before it downloads or creates anything."""
    begin = time.monotonic()
    done = root.run(command, has_network=False)
    sys.stdout.write(f"  ({command} took {time.monotonic() - begin:.1f} s)\n")
    assert done.returncode == 1
    assert "libnuma.so.1" in done.stdout
    assert "apt-get install -y --no-install-recommends libnuma1" in to_type(done.stdout)
    assert not has_venv(root)


def test_a_real_model_needs_a_compiler(root: Root) -> None:
    """With BATCH_MODEL set, a missing compiler is reported at the same time as the missing library."""
    done = root.run("BATCH_MODEL=Qwen/Qwen3-0.6B scripts/start-all.sh", has_network=False)
    assert done.returncode == 1
    packages = to_type(done.stdout).split()
    assert "libnuma1" in packages
    assert "g++" in packages
    assert not has_venv(root)


def test_demo(root: Root) -> None:
    """After typing exactly the suggested command, the demo passes."""
    missing = root.run("scripts/demo.sh", has_network=False)
    typed = root.run(to_type(missing.stdout), user="root", timeout_s=300)
    assert typed.returncode == 0
    done = root.run("scripts/demo.sh", timeout_s=2400)
    assert done.returncode == 0
    assert "200 requests, 200 results, 0 lost, 0 duplicated" in done.stdout.splitlines()[-1]


def test_tests(root: Root) -> None:
    """scripts/test.sh works; only its unit tests run here, because the whole takes too long."""
    done = root.run("scripts/test.sh -q tests/unit", timeout_s=900)
    assert done.returncode == 0
    assert " passed" in done.stdout


def test_real_model(root: Root) -> None:
    """A compiled model is refused at start without a compiler, and served after typing the suggested command."""
    make = f"""PYTHONPATH=. .venv/bin/python -c '
from pathlib import Path
from service.worker.engine import tiny_model
tiny_model.ensure(Path("/home/{USER}/model"))'"""
    assert root.run(make, timeout_s=300).returncode == 0
    start = f"""export BATCH_MODEL=/home/{USER}/model BATCH_ENGINE_ARGS="--max-model-len 512" VLLM_CPU_KVCACHE_SPACE=1
scripts/start-all.sh && .venv/bin/vllm-batch status; status=$?
scripts/stop-all.sh
exit $status"""
    refused = root.run(start, timeout_s=300)
    assert refused.returncode == 1
    typed = root.run(to_type(refused.stdout), user="root", timeout_s=600)
    assert typed.returncode == 0
    assert root.run(start, timeout_s=900).returncode == 0


def test_doctor(root: Root) -> None:
    """The doctor passes the machine; without a library, its checks of libraries and of vLLM both name the package."""
    assert root.run("scripts/doctor.sh").returncode == 0
    assert root.run("apt-get purge -y libnuma1 >/dev/null", user="root", timeout_s=300).returncode == 0
    ill = root.run("scripts/doctor.sh")
    assert ill.returncode == 1
    wrong = [line for line in ill.stdout.splitlines() if line.startswith("WRONG")]
    assert [line.split(":")[0].split()[1] for line in wrong] == ["libraries", "vllm"]
    assert all("libnuma.so.1" in line and line.endswith("libnuma1") for line in wrong)


def test_root_gets_it_installed(root: Root) -> None:
    """As root, setup installs what is missing by itself."""
    assert root.run("rm -rf .venv", user="root").returncode == 0
    done = root.run("scripts/setup.sh", user="root", timeout_s=1200)
    assert done.returncode == 0
    assert "setup: installing libnuma1" in done.stdout
    assert done.stdout.splitlines()[-1] == "setup: done"
