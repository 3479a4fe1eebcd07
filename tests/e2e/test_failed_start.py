"""A failed start of real vLLM is explained: cause and advice are in the log and in the heartbeat.

Each test starts a worker that lacks something or has a setting that cannot work. THOROUGH=1 includes the slow
tests; tests that change the worker's view of the machine need root.
"""

import json
import os
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest

from service.db import heartbeats
from service.db.connection import Database, migrate
from service.worker.engine import tiny_model
from tests.support.ports import free_port
from tests.support.screens import screens
from tests.support.servers import PostgresServer
from tests.support.stacks import full_stack
from tests.support.waiting import until
from vllm_batch.client import Client

pytestmark = pytest.mark.timeout(600)
ROOT = Path(__file__).resolve().parents[2]
LIBRARIES = "/usr/lib/x86_64-linux-gnu"
# One engine process, compiled: like a real model on a CPU.
COMPILED = "--distributed-executor-backend vllm.v1.executor.uniproc_executor.UniProcExecutor"
EAGER = f"{COMPILED} --enforce-eager"
# Links to all programs except compilers.
WITHOUT_COMPILERS = (
    "find /usr/bin /usr/sbin ! -type d | grep -Ev '/([^/]*-)?(g?cc|cc|[cg][+][+]|clang)[^/]*$'"
    " | xargs ln -sf -t {folder}"
)


@dataclass
class Machine:
    """Where workers are started: a Postgres, the tiny model, and a folder for what a test needs."""

    home: Path
    database: Database
    postgres_url: str

    @property
    def model(self) -> Path:
        """The tiny model, to be copied and broken."""
        return tiny_model.ensure(self.home / "models" / "tiny")

    def start(self, worker: str, env: dict[str, str], prepare: str = "", port: int = 0) -> "subprocess.Popen[str]":
        """Starts a worker; commands in `prepare` run before it, in a mount namespace of its own."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith("BATCH_") and k != "SENTRY_DSN"}
        settings = {
            "BATCH_ENV_FILE": "/dev/null",
            "BATCH_HOME": str(self.home),
            "BATCH_WORKER_PORT": str(port or free_port()),
            "BATCH_WORKER_METRICS_PORT": "0",
            "DATABASE_URL": self.postgres_url,
            "SUPERVISOR_PROCESS_NAME": worker,
            "VLLM_CPU_KVCACHE_SPACE": "1",
        }
        command = [sys.executable, "-m", "service.worker"]
        if prepare:
            command = [
                "/usr/bin/unshare",
                "-m",
                "/bin/bash",
                "-c",
                f'set -e; {prepare}\nexec "$@"',
                "prepare",
                *command,
            ]
        return subprocess.Popen(
            command, env=kept | settings | env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def beat(self, worker: str) -> heartbeats.Beat:
        """The worker's last heartbeat."""
        beats = [seen.beat for seen in self.database.call(heartbeats.read)]
        (beat,) = [beat for beat in beats if beat.worker_id.endswith(f":{worker}")]
        return beat


@dataclass(frozen=True)
class Case:
    """A fault, and the cause and advice expected for it.

    `prepare` are shell commands that change the worker's view of the machine; `spoil` are shell commands run in a copy
    of the model, which is then `BATCH_MODEL`.
    """

    name: str
    cause: str
    advice: str
    env: dict[str, str] = field(default_factory=dict)
    prepare: str = ""
    spoil: str = ""
    in_ci: bool = False
    # Nothing but other settings, or another vLLM, can help.
    recurs: bool = False


CASES = (
    Case(
        "unknown_flag",
        "BATCH_ENGINE_ARGS: unrecognized arguments: --max-model-length 1024",
        "Did you mean --max-model-len?",
        {"BATCH_ENGINE_ARGS": "--max-model-length 1024"},
        recurs=True,
    ),
    Case(
        "ray_without_gpus",
        "this build of vLLM cannot use Ray: it is for cpu",
        "Remove --distributed-executor-backend ray",
        {"BATCH_ENGINE_ARGS": "--distributed-executor-backend ray"},
        recurs=True,
    ),
    Case(
        "data_parallel_ray_without_gpus",
        "this build of vLLM cannot use Ray: it is for cpu",
        "and --data-parallel-backend ray",
        {"BATCH_ENGINE_ARGS": "--data-parallel-size 2 --data-parallel-backend ray"},
        recurs=True,
    ),
    Case(
        "no_such_folder", "'/nonexistent/model'", "BATCH_MODEL must be a folder", {"BATCH_MODEL": "/nonexistent/model"}
    ),
    Case(
        "not_in_the_cache",
        "Qwen/Qwen3-0.6B: LocalEntryNotFoundError: Cannot find an appropriate cached snapshot folder",
        "HF_HUB_OFFLINE is set and the model is not in the cache",
        {"BATCH_MODEL": "Qwen/Qwen3-0.6B", "HF_HUB_OFFLINE": "1"},
    ),
    Case(
        "max_model_len_over_cache",
        "To serve at least one request with the model's max seq len (2048)",
        "Add --max-model-len 896 (or less) to BATCH_ENGINE_ARGS",
        {"BATCH_ENGINE_ARGS": "--num-gpu-blocks-override 8"},
        in_ci=True,
    ),
    Case(
        "max_model_len_over_model",
        "User-specified max_model_len (100000) is greater than the derived max_model_len",
        "The model supports at most 2048 tokens",
        {"BATCH_ENGINE_ARGS": "--max-model-len 100000"},
        recurs=True,
    ),
    Case(
        "cache_over_memory",
        "is less than requested memory for kv (4000.0 GiB)",
        "GiB are free: set VLLM_CPU_KVCACHE_SPACE",
        {"VLLM_CPU_KVCACHE_SPACE": "4000"},
    ),
    Case(
        "no_weights",
        "Cannot find any model weights",
        "download the model again",
        spoil="rm model.safetensors",
    ),
    Case(
        "cut_weights",
        "SafetensorError: Error while deserializing header",
        "download the model again",
        spoil="truncate -s 300000 model.safetensors",
    ),
    Case("no_config", "Invalid repository ID or local directory", "a folder with config.json", spoil="rm config.json"),
    Case("broken_config", "is not a valid JSON file", "download the model again", spoil="echo '{' > config.json"),
    Case(
        "unknown_architecture",
        "Model architectures ['Qwen99ForCausalLM'] are not supported",
        "supported_models",
        spoil="sed -i s/Qwen3ForCausalLM/Qwen99ForCausalLM/ config.json",
        recurs=True,
    ),
    Case(
        "no_library",
        "vllm._C does not load: libnuma.so.1: cannot open shared object file",
        "apt-get install libnuma1",
        # An overlay of the folder without the library: as if its package were not installed.
        prepare=f"mount -t tmpfs none {{folder}}; mkdir {{folder}}/up {{folder}}/work; mount -t overlay none"
        f" -o lowerdir={LIBRARIES},upperdir={{folder}}/up,workdir={{folder}}/work {LIBRARIES};"
        f" rm {LIBRARIES}/libnuma.so.1*",
        in_ci=True,
    ),
    Case(
        "no_compiler",
        "No working C++ compiler found",
        "apt-get install g++ python3-dev; or add --enforce-eager",
        {"PATH": "{folder}", "TORCHINDUCTOR_CACHE_DIR": "{folder}/cache", "VLLM_CACHE_ROOT": "{folder}/cache"},
        prepare=f"PATH={os.defpath}; {WITHOUT_COMPILERS}; PATH={{folder}}",
        spoil="true",
    ),
    Case(
        "no_python_headers",
        "fatal error: Python.h: No such file or directory",
        "apt-get install g++ python3-dev (the headers of the Python",
        {"TORCHINDUCTOR_CACHE_DIR": "{folder}/cache", "VLLM_CACHE_ROOT": "{folder}/cache"},
        prepare=f"mount -t tmpfs none {sysconfig.get_paths()['include']}",
        spoil="true",
    ),
    Case(
        "small_shared_memory",
        "Insufficient space in /dev/shm for shared-memory allocation",
        "--shm-size=2g",
        # Two processes, which communicate through shared memory.
        {"BATCH_ENGINE_ARGS": "--distributed-executor-backend mp"},
        prepare="mount -t tmpfs -o size=1m none /dev/shm",
    ),
    Case(
        "full_disk",
        "No space left on device",
        "A disk is full",
        {"TORCHINDUCTOR_CACHE_DIR": "{folder}/cache", "VLLM_CACHE_ROOT": "{folder}/cache"},
        prepare="mount -t tmpfs -o size=100k none {folder}",
        spoil="true",
    ),
)


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    """One Postgres and one home for all tests of this file."""
    # Not in pytest's folder: its path is too long for a socket.
    with tempfile.TemporaryDirectory(prefix="vbf-", ignore_cleanup_errors=True) as folder:
        server = PostgresServer(Path(folder))
        server.start()
        try:
            url = server.url % "batch"
            database = Database(url, "test")
            database.call(migrate)
            yield Machine(Path(folder), database, url)
            database.close()
        finally:
            server.stop()


def check_reported(machine: Machine, worker: str, log: str, cause: str, advice: str, recurs: bool = False) -> None:
    """Checks that log and last heartbeat have the cause, and that the worker itself prints no traceback."""
    events = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    (event,) = [event for event in events if event.get("event") == "start_failed"]
    assert cause in event["cause"], event
    assert advice in event["advice"], event
    beat = machine.beat(worker)
    assert beat.phase == "stopping"
    assert (beat.detail["cause"], beat.detail["advice"]) == (event["cause"], event["advice"])
    assert beat.detail["cause_key"]
    assert ("cause_recurs" in beat.detail) is recurs
    engines = ("(EngineCore", "(Worker")
    own = [line for line in log.splitlines() if not line.startswith(engines)]
    # multiprocessing prints a process's traceback once more, without a mark.
    own = own[: own.index("Process EngineCore:")] if "Process EngineCore:" in own else own
    assert not [line for line in own if "Traceback" in line]


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=case.name, marks=() if case.in_ci else pytest.mark.thorough) for case in CASES]
)
def test_failed_start_says_why(machine: Machine, case: Case, tmp_path: Path) -> None:
    """A worker that cannot start exits with 1, and reports cause and advice in its log and its heartbeat."""
    if case.prepare and os.geteuid() != 0:
        pytest.skip("needs root, to change what the worker sees of the machine")
    env = {name: value.format(folder=tmp_path) for name, value in case.env.items()}
    if case.spoil:
        model = tmp_path.with_name(f"{tmp_path.name}-model")
        subprocess.run(["cp", "-r", machine.model, model], check=True)
        subprocess.run(["bash", "-c", case.spoil], cwd=model, check=True)
        env = {"BATCH_MODEL": str(model), "BATCH_ENGINE_ARGS": COMPILED if "VLLM_CACHE_ROOT" in env else EAGER} | env
    process = machine.start(case.name, env, case.prepare.format(folder=tmp_path))
    log, _ = process.communicate(timeout=500)
    assert process.returncode == 1, log[-3000:]
    check_reported(machine, case.name, log, case.cause, case.advice, case.recurs)


# Cases that start-all.sh does not detect by itself before it starts anything.
FOUND_BY_THE_WORKER = [case for case in CASES if not case.prepare and not case.spoil and "BATCH_MODEL" not in case.env]


@pytest.mark.thorough
@pytest.mark.parametrize("case", FOUND_BY_THE_WORKER, ids=lambda case: case.name)
def test_every_screen_says_why(case: Case) -> None:
    """When the worker cannot start, start-all.sh, the refusal, the audit log and the commands all show the cause."""
    with full_stack(BATCH_RESTART_BACKOFF_MAX_S="1", **case.env) as stack:
        started = stack.script("start-all.sh", 500)
        assert started.returncode == 1
        told = {"the end of start-all.sh": started.stderr.strip().splitlines()[-1], **screens(stack)}
        assert len(stack.restarts()) == (0 if case.recurs else 2)
    for name, shown in told.items():
        assert case.cause in shown, (name, shown)
        assert case.advice in shown, (name, shown)


def engine_process(worker: psutil.Process, name: str) -> psutil.Process | None:
    """The engine process with this name in its title, once there is one."""
    for child in worker.children(recursive=True):
        try:
            if any(name in word for word in child.cmdline()[:1]):
                return child
        except psutil.Error:
            continue
    return None


@pytest.mark.parametrize(
    ("title", "args"),
    [
        ("EngineCore", ""),
        pytest.param("VLLM::Worker", "--distributed-executor-backend mp", marks=pytest.mark.thorough),
    ],
)
def test_killed_while_loading(machine: Machine, title: str, args: str) -> None:
    """If the kernel kills an engine process while it loads, as when memory runs out, the cause names the signal."""
    worker = f"killed-{len(args)}"
    process = machine.start(worker, {"BATCH_ENGINE_ARGS": args})
    victim = until(lambda: engine_process(psutil.Process(process.pid), title), "the engine process to start", 300)
    os.kill(victim.pid, signal.SIGKILL)
    log, _ = process.communicate(timeout=500)
    assert process.returncode == 1, log[-3000:]
    check_reported(machine, worker, log, "was killed by signal 9 (out of memory?)", "dmesg")


class GatedHub(BaseHTTPRequestHandler):
    """Answers as Hugging Face does for a gated model."""

    def do_GET(self) -> None:
        self.send_response(401)
        self.send_header("X-Error-Code", "GatedRepo")
        self.send_header("X-Error-Message", "Access to model meta-llama/Llama-3.2-1B is restricted. Please log in.")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *_: Any) -> None:
        pass


@pytest.mark.thorough
def test_gated_model(machine: Machine) -> None:
    """A gated model is reported as such, with the advice to set HF_TOKEN, and without the token that was given."""
    hub = ThreadingHTTPServer(("127.0.0.1", 0), GatedHub)
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    try:
        env = {
            "BATCH_MODEL": "meta-llama/Llama-3.2-1B",
            "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
            "HF_HUB_OFFLINE": "0",
            "HF_TOKEN": "hf_secretsecretsecret",
        }
        process = machine.start("gated", env)
        log, _ = process.communicate(timeout=500)
    finally:
        hub.shutdown()
        hub.server_close()
    assert process.returncode == 1, log[-3000:]
    check_reported(machine, "gated", log, "gated repo", "set HF_TOKEN")
    assert "hf_secret" not in log


@pytest.mark.parametrize("args", [EAGER, "--distributed-executor-backend mp"], ids=["in the core", "in its worker"])
@pytest.mark.thorough
def test_engine_that_dies_later(machine: Machine, args: str) -> None:
    """An exception in a running engine process becomes the cause in the heartbeat of its worker."""
    name, port = f"dies-{len(args)}", free_port()
    flags = f"--logits-processors tests.e2e.crashing_processor:CrashOnRequest {args}"
    with (machine.home / f"{name}.log").open("w") as log:
        process = machine.start(name, {"BATCH_ENGINE_ARGS": flags}, port=port)
        assert process.stdout is not None
        threading.Thread(target=lambda: log.writelines(process.stdout), daemon=True).start()
        with Client(f"127.0.0.1:{port}", patience_s=0) as client:
            until(lambda: not client.accepting(), "the worker to be ready", 200)
            body = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "vllm_xargs": {"raise": 1}}
            client.submit_lines([json.dumps({"custom_id": "a", "url": "/v1/chat/completions", "body": body}).encode()])
            beat = until(lambda: "cause" in (beat := machine.beat(name)).detail and beat, "the cause of the death")
        process.terminate()
        process.wait(60)
    assert beat.phase == "engine_dead"
    assert beat.detail["cause"] == "CUDA error: out of memory"
    assert "nvidia-smi" in beat.detail["advice"]
