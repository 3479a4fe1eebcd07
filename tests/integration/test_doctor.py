"""scripts/doctor.sh against real ports, files and Postgres, with stand-ins for the hub and the driver's library."""

import json
import os
import shutil
import socket
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from scripts.doctor import database
from tests.support.ports import free_port
from tests.support.stacks import full_stack

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.timeout(180)


def doctor(home: Path, *arguments: str, **settings: str) -> "subprocess.CompletedProcess[str]":
    """Runs the script with its own settings."""
    ports = {f"BATCH_{name}_PORT": str(free_port()) for name in ("GATEWAY", "HTTP", "WORKER", "WATCHDOG")}
    ports |= {f"BATCH_{name}_METRICS_PORT": "0" for name in ("GATEWAY", "HTTP", "WORKER", "WATCHDOG")}
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("BATCH_", "HF_")) and k != "DATABASE_URL"}
    env = kept | ports | {"BATCH_ENV_FILE": "/dev/null", "BATCH_HOME": str(home)} | settings
    command = [str(ROOT / "scripts" / "doctor.sh"), *arguments]
    return subprocess.run(command, env=env, cwd="/", capture_output=True, text=True, timeout=120)


def wrong(done: "subprocess.CompletedProcess[str]") -> list[str]:
    """The lines that report something wrong."""
    return [line for line in done.stdout.splitlines() if line.startswith("WRONG")]


def test_all_is_well(tmp_path: Path) -> None:
    """On a machine that can run the stack, every check prints one line, none is wrong, and the status is 0."""
    done = doctor(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    names = [line.split(":")[0].split(maxsplit=1)[1] for line in done.stdout.splitlines()]
    assert names[:2] == ["settings", "python"]
    assert {"libraries", "compiler", "disk", "ports", "clock", "supervisord", "postgres", "model", "vllm"} <= set(names)
    assert len(names) == len(set(names))


def test_what_is_wrong_has_a_line_each(tmp_path: Path) -> None:
    """A port in use, a folder open to others and a missing model get one line each, and the status is 1."""
    (tmp_path / "log").mkdir(mode=0o755)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = doctor(tmp_path, "--quick", BATCH_GATEWAY_PORT=port, BATCH_MODEL=str(tmp_path / "none"))
    assert done.returncode == 1
    home, ports, model = wrong(done)
    assert home.endswith(f"→ chmod 0700 {tmp_path}/log")
    assert f"BATCH_GATEWAY_PORT={port} is in use by" in ports
    assert f"(pid {os.getpid()})" in ports
    assert f"{tmp_path}/none is not a folder → correct BATCH_MODEL" in model


def test_wrong_settings(tmp_path: Path) -> None:
    """All wrong settings are named, and the value of a wrong setting is not shown."""
    done = doctor(tmp_path, BATCH_ENGINE="secret-engine", BATCH_NONSENSE="1", BATCH_MODLE="x")
    assert done.returncode == 1
    [line] = wrong(done)
    assert "BATCH_ENGINE" in line
    assert "BATCH_MODLE: no such setting; BATCH_MODEL is meant" in line
    assert "note    variables: BATCH_NONSENSE: no setting of this server; ignored" in done.stdout
    assert "secret-engine" not in line


def test_start_all_refuses_what_cannot_work(tmp_path: Path) -> None:
    """start-all.sh reports what the doctor finds and starts nothing."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        with full_stack(BATCH_ENGINE="simulated", BATCH_WATCHDOG_PORT=port) as stack:
            started = stack.script("start-all.sh")
            assert started.returncode == 1
            assert f"BATCH_WATCHDOG_PORT={port} is in use by" in started.stderr
            assert not (stack.home / "run" / "supervisord.pid").exists()


@pytest.mark.thorough
def test_running_stack_is_well() -> None:
    """Ports used by the running stack itself are fine."""
    with full_stack(BATCH_ENGINE="simulated") as stack:
        assert stack.script("start-all.sh").returncode == 0, stack.logs()
        done = stack.script("doctor.sh")
        assert done.returncode == 0, done.stdout
        assert "this stack" in done.stdout
        assert "worker RUNNING" in done.stdout


def test_postgres(postgres: str, database_url: str) -> None:
    """A usable database passes; a missing one, an unreachable server and a user without rights are recognized."""
    assert not database.judge(database.probe(database_url), "DATABASE_URL").problem
    assert '"nothing" does not exist' in database.probe(postgres % "nothing").error
    nobody = f"postgresql://a:very-secret@127.0.0.1:{free_port()}/b"
    refused = database.judge(database.probe(nobody), "DATABASE_URL")
    assert "refused" in refused.problem
    assert "very-secret" not in refused.problem
    import psycopg2

    owner = psycopg2.connect(database_url)
    owner.autocommit = True
    with owner.cursor() as cursor:
        cursor.execute("DROP ROLE IF EXISTS doctor_reader")
        cursor.execute("CREATE ROLE doctor_reader LOGIN")
    try:
        reader = database.probe(database_url.replace("user=postgres", "user=doctor_reader"))
        assert (reader.user, reader.may_write) == ("doctor_reader", False)
        for statement, told in (
            ("GRANT ALL ON ALL TABLES IN SCHEMA public TO doctor_reader", "write batches_id_seq, file_ids"),
            ("GRANT USAGE ON ALL SEQUENCES IN SCHEMA public TO doctor_reader", ""),
            ("REVOKE DELETE ON results, purges FROM doctor_reader", "may not read and write purges, results"),
            ("GRANT ALL ON ALL TABLES IN SCHEMA public TO doctor_reader", ""),
            ("ALTER ROLE doctor_reader CONNECTION LIMIT 8", "may have 8 connections"),
            ("ALTER TABLE files ENABLE ROW LEVEL SECURITY", "hides rows from doctor_reader, which is an error: files"),
        ):
            with owner.cursor() as cursor:
                cursor.execute(statement)
            problem = database.judge(
                database.probe(database_url.replace("user=postgres", "user=doctor_reader")), "DATABASE_URL"
            ).problem
            assert told in problem if told else not problem, problem
    finally:
        with owner.cursor() as cursor:
            cursor.execute("DROP OWNED BY doctor_reader; DROP ROLE doctor_reader")
        owner.close()


class Hub(BaseHTTPRequestHandler):
    """The part of the hub's API that the doctor uses: `open/model` exists, `gated/model` is gated."""

    def do_GET(self) -> None:
        """Answers as the hub does."""
        has_token = self.headers.get("Authorization") == "Bearer hf_good"
        if self.path.startswith("/api/models/open/model"):
            self._answer(
                200, {"id": "open/model", "gated": False, "siblings": [{"rfilename": "a.safetensors", "size": 5 << 30}]}
            )
        elif self.path.startswith("/api/models/gated/model/auth-check"):
            self._answer(*((200, {}) if has_token else (403, {"error": "gated"})), code="GatedRepo")
        elif self.path.startswith("/api/models/gated/model"):
            self._answer(200, {"id": "gated/model", "gated": "auto", "siblings": []})
        else:
            self._answer(404, {"error": "Repository not found"}, code="RepoNotFound")

    def _answer(self, status: int, body: dict[str, object], code: str = "") -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        if status != 200:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Logs nothing."""


@contextmanager
def hub() -> Iterator[str]:
    """The address of a stand-in for the hub."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def model_line(home: Path, model: str, **settings: str) -> str:
    """The doctor's line about a model."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    program = (
        "import sys; from scripts.doctor import models; from scripts.doctor.__main__ import line;"
        "print(line(*models.check(sys.argv[1], asks_hub=True)))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, model],
        env=kept | {"HF_HOME": str(home / "hf"), "no_proxy": "127.0.0.1"} | settings,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.thorough
def test_models_of_the_hub(tmp_path: Path) -> None:
    """Existing, missing and gated models, with and without a token, and an unreachable hub are each reported."""
    with hub() as address:
        assert "5.0 GiB to download" in model_line(tmp_path, "open/model", HF_ENDPOINT=address)
        assert "Hugging Face has no no/model" in model_line(tmp_path, "no/model", HF_ENDPOINT=address)
        assert "HF_TOKEN is not set" in model_line(tmp_path, "gated/model", HF_ENDPOINT=address)
        assert model_line(tmp_path, "gated/model", HF_ENDPOINT=address, HF_TOKEN="hf_good").startswith("ok")
        bad = model_line(tmp_path, "gated/model", HF_ENDPOINT=address, HF_TOKEN="hf_bad")
        assert "the account of this HF_TOKEN has no access" in bad
        assert "hf_bad" not in bad
    assert "Hugging Face does not answer" in model_line(tmp_path, "open/model", HF_ENDPOINT=address)
    assert "HF_HUB_OFFLINE" in model_line(tmp_path, "open/model", HF_ENDPOINT=address, HF_HUB_OFFLINE="1")


# A stand-in for the driver's library with two GPUs; this test's process holds memory of one.
NVML = """
#include <string.h>
typedef struct { unsigned long long total, free, used; } Memory;
typedef struct { unsigned pid; unsigned long long used; unsigned gi, ci; } Process;
int nvmlInit_v2(void) { return 0; }
int nvmlInitWithFlags(unsigned flags) { return 0; }
int nvmlShutdown(void) { return 0; }
const char *nvmlErrorString(int code) { return "an error"; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = 2; return 0; }
int nvmlSystemGetCudaDriverVersion_v2(int *version) { *version = CUDA_VERSION; return 0; }
int nvmlSystemGetDriverVersion(char *text, unsigned size) { strncpy(text, "535.1", size); return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **handle) { *handle = (void *)(index + 1L); return 0; }
int nvmlDeviceGetName(void *handle, char *text, unsigned size) { strncpy(text, "A100", size); return 0; }
int nvmlDeviceGetMemoryInfo(void *handle, Memory *memory) {
  memory->total = 80ULL << 30; memory->free = (handle == (void *)1 ? 10ULL : 79ULL) << 30; return 0; }
int nvmlDeviceGetComputeRunningProcesses_v3(void *handle, unsigned *count, Process *processes) {
  if (handle != (void *)1) { *count = 0; return 0; }
  if (*count < 1) { *count = 1; return 7; }
  *count = 1; processes[0].pid = HOLDER; processes[0].used = 70ULL << 30; return 0; }
"""


@pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not on PATH")
def test_gpu(tmp_path: Path) -> None:
    """A driver that is too old, and GPU memory held by another process, are reported from the driver's library."""
    source = tmp_path / "nvml.c"
    source.write_text(textwrap.dedent(NVML))
    library = tmp_path / "lib" / "libnvidia-ml.so.1"
    library.parent.mkdir()
    for version in (12020, 13000):
        flags = [f"-DCUDA_VERSION={version}", f"-DHOLDER={os.getpid()}"]
        subprocess.run(["gcc", "-shared", "-fPIC", *flags, "-o", library, source], check=True, timeout=60)
        # The module is run directly, because setup.sh would install the CUDA build.
        env = os.environ | {"LD_LIBRARY_PATH": str(library.parent), "BATCH_ENV_FILE": "/dev/null"}
        command = [str(ROOT / ".venv/bin/python"), "-W", "ignore", "-m", "scripts.doctor", "--quick"]
        env |= {"BATCH_HOME": str(tmp_path)}
        done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.returncode == 1, done.stderr
        assert ("CUDA 12.2 is too old" in done.stdout) == (version == 12020)
        [memory] = [line for line in wrong(done) if "gpu memory" in line]
        assert "GPU 0: 10.0 of 80.0 GiB free, vLLM will claim 73.6" in memory
        assert f"(pid {os.getpid()}, 70.0 GiB)" in memory
        assert "GPU 1" not in memory
        # What the watchdog waits for before it restarts a worker.
        command = [str(ROOT / ".venv/bin/python"), "-m", "watchdog.act.gpu"]
        held = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert held.stdout == f"{os.getpid()}, {70 << 30}\n"
