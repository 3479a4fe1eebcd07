"""The contract: stubs as generated, proto as linted, layers as drawn, the wheel as promised."""

import ast
import re
import subprocess
import sys
import zipfile
from filecmp import dircmp
from pathlib import Path

import pytest

from tests.wheels import build_wheel

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
STDLIB_IO = {"socket", "subprocess", "time", "threading", "asyncio", "os", "psutil", "peewee", "psycopg2", "random"}


def imports(path: Path) -> set[str]:
    """All modules that a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def roots(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(path)}


def sources(*folders: str) -> list[Path]:
    return [path for folder in folders for path in (ROOT / folder).rglob("*.py")]


def test_stubs_are_those_of_the_proto(tmp_path: Path) -> None:
    """Who changes the proto regenerates the stubs and docs/api.md."""
    subprocess.run([str(ROOT / "scripts/gen-proto.sh"), str(tmp_path)], check=True, timeout=60, capture_output=True)
    compared = dircmp(tmp_path / "vllm_batch/v1", ROOT / "client/vllm_batch/v1", ignore=["__pycache__", "__init__.py"])
    assert compared.left_list
    assert (compared.left_only, compared.right_only, compared.diff_files) == ([], [], [])
    assert (tmp_path / "api.md").read_text() == (ROOT / "docs/api.md").read_text()


def reasons() -> set[str]:
    """What errors of calls and of requests are called: constants of the code that name themselves, and what is given
    to a call that makes an error or a result.
    """
    found = {"batch_expired"}
    for path in sources("service"):
        for node in ast.walk(ast.parse(path.read_text())):
            values: list[ast.expr] = []
            if isinstance(node, ast.Call):
                if re.search("(?i)error|refus|result", ast.unparse(node.func)):
                    values = [*node.args, *(keyword.value for keyword in node.keywords)]
            elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
                values = [node.value] if ast.unparse(node.targets[0]) == node.value.value else []
            texts = [value.value for value in values if isinstance(value, ast.Constant)]
            found |= {text for text in texts if isinstance(text, str) and re.fullmatch("[A-Z]+(_[A-Z]+)+", text)}
    return found


def test_each_reason_is_explained() -> None:
    """Whoever meets the name of an error finds what it means and what to do."""
    headings = re.findall(r"^### (\w+)$", (ROOT / "docs/troubleshooting.md").read_text(), re.MULTILINE)
    assert len(reasons()) >= 11
    assert reasons() <= set(headings)


def test_buf_lint() -> None:
    """The contract follows the standard rules."""
    done = subprocess.run([str(BIN / "buf"), "lint"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


def test_vllm_is_known_in_one_file() -> None:
    """What moves inside vLLM is met in one place."""
    found = [path.name for path in sources("service", "watchdog", "client", "scripts") if "vllm" in roots(path)]
    assert found == ["vllm_engine.py"]


@pytest.mark.parametrize(
    "name",
    [
        "service/lines.py",
        "service/messages.py",
        "service/errors.py",
        "service/gateway/wanted.py",
        "service/rate_limit.py",
        "service/roles.py",
        "service/tokens.py",
        "service/gateway/workers.py",
        "watchdog/policy.py",
    ],
)
def test_pure_modules_do_no_io(name: str) -> None:
    """Decisions can be tested without a clock, a socket or a database."""
    assert not roots(ROOT / name) & STDLIB_IO


def test_watchdog_knows_little_of_the_service() -> None:
    """The watchdog must not share the faults of what it guards: nothing of worker, gateway or engine."""
    allowed = {"db", "config", "clock", "logs", "metrics", "processes", "errors"}
    allowed |= {"access", "roles", "ports", "handlers"}
    for path in sources("watchdog"):
        used = {name.split(".")[1] for name in imports(path) if name.startswith("service.")}
        assert used <= allowed, path


def test_client_needs_no_server() -> None:
    """What a client installs imports neither service nor watchdog nor what only they need."""
    for path in sources("client"):
        assert not roots(path) & {"service", "watchdog", "peewee", "vllm", "pydantic_settings", "grpc_health"}, path


def test_wheel_holds_the_client_alone(tmp_path: Path) -> None:
    """A package called watchdog or service would overwrite others' of that name."""
    names = zipfile.ZipFile(build_wheel(tmp_path)).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"vllm_batch"}
    assert {"vllm_batch/py.typed", "vllm_batch/cli.py", "vllm_batch/v1/batch_service_pb2.pyi"} <= set(names)
