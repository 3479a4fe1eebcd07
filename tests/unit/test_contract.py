"""The contract: stubs are current, the proto passes lint, layering holds, the wheel has the right contents."""

import ast
import re
import subprocess
import sys
import zipfile
from filecmp import dircmp
from pathlib import Path

import pytest

from tests.support.wheels import build_wheel

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
STDLIB_IO = {"socket", "subprocess", "time", "threading", "asyncio", "os", "psutil", "peewee", "psycopg2", "random"}


def imports(path: Path) -> set[str]:
    """All modules that a file imports, including imports inside functions."""
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
    """After a change of the proto, the stubs and docs/api.md have been regenerated."""
    subprocess.run([str(ROOT / "scripts/gen-proto.sh"), str(tmp_path)], check=True, timeout=60, capture_output=True)
    compared = dircmp(tmp_path / "vllm_batch/v1", ROOT / "client/vllm_batch/v1", ignore=["__pycache__", "__init__.py"])
    assert compared.left_list
    assert (compared.left_only, compared.right_only, compared.diff_files) == ([], [], [])
    assert (tmp_path / "api.md").read_text() == (ROOT / "docs/api.md").read_text()


def reasons() -> set[str]:
    """The error reasons in the code: constants that equal their own name, and literals passed to calls that make an
    error or a result.
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
    """docs/troubleshooting.md has a heading for every error reason."""
    headings = re.findall(r"^### (\w+)$", (ROOT / "docs/troubleshooting.md").read_text(), re.MULTILINE)
    assert len(reasons()) >= 11
    assert reasons() <= set(headings)


def test_buf_lint() -> None:
    """The contract passes buf's lint rules."""
    done = subprocess.run([str(BIN / "buf"), "lint"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


def test_vllm_is_known_in_one_file() -> None:
    """Only one file imports vLLM, so that a change in vLLM affects one place."""
    found = [path.name for path in sources("service", "watchdog", "client", "scripts") if "vllm" in roots(path)]
    assert found == ["vllm.py"]


@pytest.mark.parametrize(
    "name",
    [
        "service/worker/lines.py",
        "service/worker/offer.py",
        "service/worker/prefixes.py",
        "service/worker/survey.py",
        "service/worker/sharing.py",
        "service/db/run_order.py",
        "service/api/messages.py",
        "service/errors.py",
        "service/api/named_models.py",
        "service/rpc/pages.py",
        "service/turns.py",
        "service/rpc/rate_limit.py",
        "service/rpc/times.py",
        "service/http/browsers.py",
        "service/http/errors.py",
        "service/http/objects.py",
        "service/http/ranges.py",
        "service/worker/wrong_lines.py",
        "service/auth/callers.py",
        "service/tenants.py",
        "service/webhook_targets.py",
        "service/webhooks/retries.py",
        "service/webhooks/signing.py",
        "service/worker/estimates.py",
        "service/auth/roles.py",
        "service/auth/tokens.py",
        "service/insight/routing.py",
        "service/insight/estimate.py",
        "service/insight/waiting.py",
        "service/api/error_kinds.py",
        "watchdog/judge.py",
        "watchdog/policy.py",
    ],
)
def test_pure_modules_do_no_io(name: str) -> None:
    """Decision modules import no I/O, clock or randomness, so they can be tested without them."""
    assert not roots(ROOT / name) & STDLIB_IO


# What each layer may import from the layers below it. A loose file of `service` is a layer of its own.
LAYERS = {
    "service.errors": set(),
    "service.clock": set(),
    "service.processes": set(),
    "service.machine": set(),
    "service.announce": {"service.addresses", "service.db", "service.machine"},
    "service.failpoints": set(),
    "service.addresses": set(),
    "service.variables": set(),
    "service.tenants": {"service.webhook_targets"},
    "service.webhook_targets": {"service.addresses"},
    "service.turns": set(),
    "service.telemetry": {"service.addresses"},
    "service.auth": {"service.errors", "service.telemetry", "service.tenants"},
    "service.database_url": set(),
    "service.endpoints": set(),
    "service.config": {
        *("service.addresses", "service.auth", "service.database_url", "service.endpoints", "service.machine"),
        *("service.tenants", "service.variables", "service.webhook_targets"),
    },
    "service.embedded_postgres": {"service.config", "service.processes", "service.telemetry"},
    "service.programs": {"service.announce", "service.config", "service.db", "service.processes", "service.telemetry"},
    "service.db": {
        *("service.database_url", "service.failpoints", "service.machine", "service.telemetry", "service.tenants"),
        "service.turns",
    },
    "service.rpc": {
        *("service.addresses", "service.auth", "service.clock", "service.config", "service.db", "service.errors"),
        *("service.telemetry", "service.tenants"),
    },
    "service.api": {
        "service.auth",
        "service.db",
        "service.errors",
        "service.processes",
        "service.rpc",
        "service.telemetry",
        "service.tenants",
        "service.webhook_targets",
    },
    # Its own process could run it; the gateway is the one that every stack has.
    "service.webhooks": {
        *("service.auth", "service.clock", "service.db", "service.failpoints", "service.telemetry", "service.tenants"),
        "service.webhook_targets",
    },
    # What is known of workers, and what follows from it for batches: for servers that are no workers.
    "service.insight": {
        *("service.announce", "service.api", "service.auth", "service.clock", "service.config", "service.db"),
        *("service.errors", "service.machine", "service.rpc", "service.telemetry"),
    },
    "service.gateway": {
        *("service.api", "service.auth", "service.clock", "service.config", "service.db", "service.errors"),
        *("service.announce", "service.insight", "service.machine", "service.processes", "service.programs"),
        *("service.rpc", "service.telemetry", "service.tenants", "service.webhook_targets", "service.webhooks"),
    },
    "service.http": {
        *("service.addresses", "service.api", "service.auth", "service.clock", "service.config", "service.db"),
        *("service.errors", "service.insight", "service.machine", "service.processes", "service.programs"),
        *("service.rpc", "service.telemetry", "service.webhook_targets"),
    },
    "service.worker": {
        *("service.api", "service.auth", "service.clock", "service.config", "service.db", "service.errors"),
        *("service.failpoints", "service.processes", "service.rpc", "service.telemetry", "service.tenants"),
        *("service.announce", "service.machine", "service.programs", "service.worker.engine"),
    },
    "service.worker.engine": {"service.config", "service.telemetry"},
    # It must not share the faults of what it guards: no imports from worker, gateway or engine.
    "watchdog": {
        *("service.clock", "service.config", "service.db", "service.errors", "service.machine", "service.processes"),
        *(
            "service.programs",
            "service.rpc",
            "service.telemetry",
            "watchdog.act",
            "watchdog.observe",
            "watchdog.record",
        ),
    },
    "watchdog.observe": {"service.clock", "service.db", "service.machine", "service.processes", "watchdog"},
    "watchdog.record": {"service.clock", "service.db", "service.telemetry", "watchdog"},
    "watchdog.act": {"service.clock", "service.processes", "service.telemetry", "watchdog"},
}


def layer(module: str) -> str | None:
    """The layer that a module, or a name in a module, belongs to; None for modules that are not ours."""
    parts = module.split(".")
    candidates = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
    return next((name for name in candidates if name in LAYERS), None)


@pytest.mark.parametrize("path", sources("service", "watchdog"), ids=lambda path: str(path.relative_to(ROOT)))
def test_layers(path: Path) -> None:
    """Each layer imports only the layers that the table allows."""
    mine = layer(".".join(path.relative_to(ROOT).with_suffix("").parts))
    if mine is None:
        assert path.name == "__init__.py"
        return
    used = {found for name in imports(path) if (found := layer(name))}
    assert used <= LAYERS[mine] | {mine}


def test_no_file_is_loose() -> None:
    """Every file directly in service/ is listed as a layer of its own; any other file belongs in a folder."""
    loose = {path.stem for path in (ROOT / "service").glob("*.py")} - {"__init__"}
    assert loose == {name.split(".")[1] for name in LAYERS if (ROOT / f"{name.replace('.', '/')}.py").exists()}


def test_client_needs_no_server() -> None:
    """The client package imports neither service nor watchdog, nor libraries that only they need."""
    for path in sources("client"):
        assert not roots(path) & {"service", "watchdog", "peewee", "vllm", "pydantic_settings", "grpc_health"}, path


def test_library_knows_no_command_line() -> None:
    """The client library loads neither the command line nor libraries that draw on terminals."""
    # command.py is where the command line begins.
    library = [path for path in sources("client") if "cli" not in path.parts and path.name != "command.py"]
    assert {"client.py", "output.py"} <= {path.name for path in library}
    for path in library:
        assert not roots(path) & {"click", "rich"}, path
        command_line = (["vllm_batch", "cli"], ["vllm_batch", "command"])
        assert not [name for name in imports(path) if name.split(".")[:2] in command_line], path


def test_wheel_holds_the_client_alone(tmp_path: Path) -> None:
    """The wheel holds vllm_batch alone: a package called watchdog or service would overwrite others of that name."""
    names = zipfile.ZipFile(build_wheel(tmp_path)).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"vllm_batch"}
    assert {"vllm_batch/py.typed", "vllm_batch/cli/__init__.py", "vllm_batch/v1/batch_service_pb2.pyi"} <= set(names)
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
