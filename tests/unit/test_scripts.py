"""The scripts' arguments: asking for help or a typing error starts and stops nothing."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from service import processes

ROOT = Path(__file__).resolve().parents[2]
# Those that take no arguments.
NAMES = ("start-all", "stop-all", "status", "demo", "screenshots")
SOURCING = sorted(path.name for path in (ROOT / "scripts").glob("*.sh") if "/lib.sh" in path.read_text())


def run(name: str, argument: str, home: Path) -> "subprocess.CompletedProcess[str]":
    env = {"PATH": os.environ["PATH"], "BATCH_HOME": str(home), "BATCH_ENV_FILE": "/dev/null"}
    command = [ROOT / f"scripts/{name}.sh", argument]
    return subprocess.run(command, env=env, cwd="/", capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("argument", ["--help", "-h"])
@pytest.mark.parametrize("name", NAMES)
def test_help_is_all_that_help_does(name: str, argument: str, tmp_path: Path) -> None:
    """Help is the comment that a script begins with, and the script does nothing else."""
    done = run(name, argument, tmp_path / "home")
    said = [line.removeprefix("# ") for line in (ROOT / f"scripts/{name}.sh").read_text().splitlines()[1:]]
    lines = done.stdout.splitlines()
    assert (done.returncode, done.stderr) == (0, "")
    assert lines
    assert lines == said[: len(lines)]
    assert said[len(lines)].startswith("set -")
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize("name", NAMES)
def test_a_script_is_found_over_a_link(name: str, tmp_path: Path) -> None:
    """A link to a script, such as in a folder of the PATH, does what the script does, by its relative path too."""
    (tmp_path / "link").symlink_to(ROOT / f"scripts/{name}.sh")
    env = {"PATH": os.environ["PATH"], "BATCH_HOME": str(tmp_path / "home"), "BATCH_ENV_FILE": "/dev/null"}
    command = ["./link", "--help"]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == run(name, "--help", tmp_path / "home").stdout


@pytest.mark.parametrize("script", SOURCING)
def test_each_script_finds_the_others_over_a_link(script: str, tmp_path: Path) -> None:
    """A link to a script that sources lib.sh finds it beside the script, and not beside the link."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / script, tmp_path / "scripts")
    (tmp_path / "scripts/lib.sh").write_text("echo found; exit")
    (tmp_path / "link").symlink_to(tmp_path / "scripts" / script)
    done = subprocess.run(["bash", "./link"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "found\n", "")


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder whose path leaves room for sockets, unlike pytest's."""
    with tempfile.TemporaryDirectory(prefix="vb-") as made:
        yield Path(made).resolve()


def test_a_checkout_over_a_link_has_the_shipped_configuration(short: Path) -> None:
    """A checkout that is called over a link keeps its supervisord.conf, which another home would get a copy of."""
    real, link = short / "real", short / "link"
    link.symlink_to(real)
    for name in ("scripts", "service", "client/vllm_batch"):
        shutil.copytree(ROOT / name, real / name)
    shutil.copytree(ROOT / "conf", real / "conf")
    (real / ".venv").symlink_to(ROOT / ".venv")
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(real / "client"), "BATCH_ENV_FILE": "/dev/null"}
    command = [
        "bash",
        "-c",
        'source "$0/scripts/lib.sh" && know_settings && write_supervisord_conf && echo "$conf"',
        link,
    ]
    done = subprocess.run(command, env=env, cwd="/", capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{real}/conf/supervisord.conf\n", "")
    shipped = "conf/supervisord.conf"
    assert (real / shipped).read_text() == (ROOT / shipped).read_text()


@pytest.mark.parametrize(
    "variable", ["CDPATH=.", "CDPATH=..:.", "CDPATH=/tmp", "CDPATH=:/usr", "PYTHONSAFEPATH=1", "PYTHONHOME=/nowhere"]
)
def test_everything_is_found_whatever_the_variables(variable: str, tmp_path: Path) -> None:
    """The scripts find the checkout and its modules whatever shell and Python are told about where to look."""
    name, value = variable.split("=")
    env = {"PATH": os.environ["PATH"], "BATCH_HOME": str(tmp_path), "BATCH_ENV_FILE": "/dev/null", name: value}
    # By a relative path, as scripts call each other.
    command = ["bash", "-c", 'source scripts/lib.sh && know_settings && printf "%s %s" "$root" "$BATCH_HOME"']
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{ROOT} {tmp_path}", "")


def test_python_does_what_the_scripts_expect() -> None:
    """Whatever Python is told by variables, it writes UTF-8, ends at its end, and does not fail for a warning."""
    told = {"PYTHONINSPECT": "1", "PYTHONIOENCODING": "utf-16", "PYTHONWARNINGS": "error"}
    asked = "import sys; print(sys.stdout.encoding, sys.flags.inspect, sys.warnoptions)"
    command = ["bash", "-c", f'source scripts/lib.sh && "$python" -c "{asked}"']
    env = {"PATH": os.environ["PATH"], **told}
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("utf-8 0 []\n", "")


def test_closed_descriptors_are_opened(tmp_path: Path) -> None:
    """Where the caller has closed stdin, stdout and stderr, no other file takes their place."""
    told = tmp_path / "told"
    script = 'exec <&- >&- 2>&-; source scripts/lib.sh && readlink /proc/$$/fd/{0,1,2} >"$0"'
    subprocess.run(["bash", "-c", script, told], env={"PATH": os.environ["PATH"]}, cwd=ROOT, check=True, timeout=60)
    assert told.read_text() == "/dev/null\n" * 3


@pytest.mark.parametrize("mask", ["000", "077"])
def test_nobody_else_may_write(mask: str, tmp_path: Path) -> None:
    """Other users may write nothing that the scripts make, whatever the umask, and a stricter one is kept."""
    env = {"PATH": os.environ["PATH"], "BATCH_HOME": str(tmp_path / "home"), "BATCH_ENV_FILE": "/dev/null"}
    command = ["bash", "-c", f"umask {mask}; source scripts/lib.sh && know_settings && write_supervisord_conf"]
    subprocess.run(command, env=env, cwd=ROOT, check=True, timeout=60)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "home", *(tmp_path / "home").iterdir())}
    others = {"000": (0o775, 0o664), "077": (0o700, 0o600)}[mask]
    assert modes == {"home": others[0], "supervisord.conf": others[1], "run": 0o700, "log": 0o700}


@pytest.mark.parametrize("argument", ["extra", "--hlep", ""])
@pytest.mark.parametrize("name", NAMES)
def test_what_a_script_does_not_know_is_refused(name: str, argument: str, tmp_path: Path) -> None:
    """An argument that is not expected is a usage error, and the script does nothing."""
    done = run(name, argument, tmp_path / "home")
    assert (done.returncode, done.stdout) == (2, "")
    assert "takes no arguments" in done.stderr
    assert not (tmp_path / "home").exists()


def test_a_supervisord_without_its_socket_is_ended(tmp_path: Path) -> None:
    """What nobody can ask to stop is ended before its programs, which it would start again; those of others are not."""
    wait = [sys.executable, "-c", "import sys; print(flush=True); sys.stdin.read()", "supervisor.supervisord"]

    def started(home: str, **more: str) -> "subprocess.Popen[bytes]":
        env = {"BATCH_HOME": str(tmp_path / home), **more}
        process = subprocess.Popen(wait, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        return process

    theirs, other = started("home"), started("other")
    program = started("home", SUPERVISOR_PROCESS_NAME="worker")
    try:
        assert [found.pid for found in processes.supervisords(tmp_path / "home")] == [theirs.pid]
        env = os.environ | {"BATCH_HOME": str(tmp_path / "home")}
        command = [sys.executable, ROOT / "scripts/sweep.py"]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0
        assert done.stdout.splitlines()[0] == f"stop: supervisord does not answer; ending it (pid {theirs.pid})"
        assert (theirs.wait(30), program.wait(30), other.poll()) == (-15, -15, None)
    finally:
        for process in (theirs, other, program):
            process.kill()
            process.communicate()
