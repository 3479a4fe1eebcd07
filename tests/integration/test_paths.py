"""Homes and checkouts whose names contain characters special to shells, configuration files, URLs and Postgres."""

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from service.processes import Mark, marked
from tests.support.batches import lines
from tests.support.stacks import ROOT, FullStack
from vllm_batch import Client

pytestmark = pytest.mark.timeout(240)

# Each has several characters that something along the way could interpret.
NASTY = [
    "100%s %(here)s %41 ",
    "quotes ' \" a&b|c ;y #z",
    "-ünï-日本 $HOME `id` \\n *?[=:@+",
]


@contextmanager
def folder(name: str) -> Iterator[Path]:
    """A folder of this name; not in pytest's folder, whose path is too long for a socket."""
    with tempfile.TemporaryDirectory(prefix="vbn-", ignore_cleanup_errors=True) as parent:
        path = Path(parent) / name
        path.mkdir()
        yield path


def runs_a_batch(stack: FullStack) -> None:
    """Starts the stack, runs a batch, stops it, and checks that no process is left."""
    try:
        stack.start_all()
        with Client(stack.target) as client:
            *_, done = client.watch(client.submit_lines(lines(5)).id)
        assert done.counts.completed == 5
        states = dict(text.split()[:2] for text in stack.supervisorctl("status").splitlines())
        assert states == dict.fromkeys(("gateway", "http", "postgres", "watchdog", "worker"), "RUNNING")
        shown = stack.script("status.sh")
        assert shown.returncode == 0, shown.stderr
    finally:
        stopped = stack.script("stop-all.sh")
    assert stopped.returncode == 0, stopped.stderr
    assert "left behind" not in stopped.stdout
    assert marked(Mark(stack.home)) == []


@pytest.mark.parametrize("name", [NASTY[0], *(pytest.param(name, marks=pytest.mark.thorough) for name in NASTY[1:])])
def test_home_of_any_name(name: str) -> None:
    """A stack starts, runs a batch and stops in a home of any name."""
    with folder(name) as home:
        runs_a_batch(FullStack(home, {"BATCH_ENGINE": "simulated"}))


@pytest.mark.thorough
def test_home_over_a_link() -> None:
    """A home may be a symbolic link."""
    with folder("a home") as home:
        link = home.parent / "link"
        link.symlink_to(home)
        runs_a_batch(FullStack(link, {"BATCH_ENGINE": "simulated"}))
        assert (home / "pgdata").is_dir()


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["%s %(x)s & 'it' ünï ;#"])
def test_checkout_of_any_name(name: str) -> None:
    """A checkout may have any name, and its var/ is then the home."""
    with folder(name) as root:
        files = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT, capture_output=True, text=True, check=True, timeout=30,
        ).stdout.split("\0")  # fmt: skip
        for file in filter(None, files):
            if (ROOT / file).is_file():
                (root / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / file, root / file)
        (root / ".venv").symlink_to(ROOT / ".venv")
        stack = FullStack(root / "var", {"BATCH_ENGINE": "simulated", "PYTHONPATH": str(root / "client")})
        del stack.env["BATCH_HOME"]
        stack.root, stack.conf = root, root / "conf/supervisord.conf"
        runs_a_batch(stack)
