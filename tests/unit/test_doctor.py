"""What the doctor and setup.sh report for each kind of problem."""

import errno
import re
import socket
from pathlib import Path
from uuid import uuid4

import pytest

from scripts.doctor import database, gpus, models, neighbours, stack
from scripts.doctor.__main__ import line
from scripts.doctor.models import Answer, Hub
from scripts.prerequisites import (
    CUDA,
    LIBRARIES,
    ROOT,
    SHM_BYTES,
    Finding,
    GiB,
    Nvidia,
    Plan,
    given_settings,
    install_command,
    judge_compiler,
    judge_disk,
    judge_driver,
    judge_engine,
    judge_libraries,
    judge_platform,
    judge_python,
    judge_shm,
    plan,
)
from service.config import Settings
from service.db.heartbeats import Beat, SeenBeat
from service.machine import Place

GPU = Nvidia(1, "580.95.05", (13, 0))


def test_line() -> None:
    """A finding is one line: ok, a note, or WRONG with a remedy."""
    assert line(Finding("disk", "9 GiB free")) == "ok      disk: 9 GiB free"
    assert line(Finding("disk", problem="full", fix="make room")) == "WRONG   disk: full → make room"
    assert line(Finding("disk", problem="small", fix="make room", is_blocking=False)).startswith("note    disk: small")


@pytest.mark.parametrize(
    ("nvidia", "settings", "expected"),
    [
        (Nvidia(), {}, Plan("cpu", compiles=False, is_parallel=False)),
        (Nvidia(), {"BATCH_MODEL": "m"}, Plan("cpu", compiles=True, is_parallel=True)),
        (Nvidia(), {"BATCH_MODEL": "m", "BATCH_ENGINE": "simulated"}, Plan("cpu", compiles=False, is_parallel=False)),
        (
            Nvidia(),
            {"BATCH_MODEL": "m", "BATCH_ENGINE_ARGS": "--enforce-eager"},
            Plan("cpu", compiles=False, is_parallel=True),
        ),
        (GPU, {}, Plan("cuda", compiles=True, is_parallel=False)),
        (GPU, {"BATCH_ENGINE_ARGS": "--tensor-parallel-size 4"}, Plan("cuda", compiles=True, is_parallel=True)),
        (GPU, {"BATCH_ENGINE_ARGS": "-tp 4"}, Plan("cuda", compiles=True, is_parallel=True)),
        (Nvidia(error="mismatch"), {}, Plan("cuda", compiles=True, is_parallel=False)),
    ],
)
def test_plan(nvidia: Nvidia, settings: dict[str, str], expected: Plan) -> None:
    """The tiny model on a CPU needs neither a compiler nor much shared memory; real models and GPUs do."""
    assert plan(nvidia, settings) == expected


def test_settings_before_anything_is_installed() -> None:
    """`.env` is parsed as the server parses it, without quotes and comments, and the environment takes precedence."""
    text = '# BATCH_MODEL=a\nexport BATCH_ENGINE_ARGS="-tp 2"  # two\nBATCH_MODEL=b\n'
    assert given_settings({}, text) == {"BATCH_ENGINE_ARGS": "-tp 2", "BATCH_MODEL": "b"}
    assert given_settings({"BATCH_MODEL": "c", "HOME": "/"}, text)["BATCH_MODEL"] == "c"


def test_python() -> None:
    """Python versions other than 3.11 to 3.13 are rejected, and a missing venv is reported with its package."""
    assert not judge_python((3, 13), "python3", has_venv=True).problem
    assert "3.14" in judge_python((3, 14), "python3", has_venv=True).problem
    assert "3.10" in judge_python((3, 10), "python3", has_venv=True).problem
    assert judge_python((3, 12), "python3", has_venv=False).packages == ("python3.12-venv",)


def test_platform() -> None:
    """Other processors, old or other C libraries, and CPUs without AVX2 are rejected; with a GPU, AVX2 is optional."""
    assert not judge_platform("x86_64", (2, 36), ["avx2"], "cpu").problem
    assert "riscv64" in judge_platform("riscv64", (2, 36), [], "cpu").problem
    assert "glibc 2.28; 2.31" in judge_platform("x86_64", (2, 28), ["avx2"], "cpu").problem
    assert "2.34" in judge_platform("aarch64", (2, 31), [], "cuda").problem
    assert "no glibc" in judge_platform("x86_64", None, ["avx2"], "cpu").problem
    assert "AVX2" in judge_platform("x86_64", (2, 36), ["avx"], "cpu").problem
    assert not judge_platform("x86_64", (2, 36), ["avx"], "cuda").problem
    assert not judge_platform("aarch64", (2, 31), [], "cpu").problem


def test_libraries() -> None:
    """A missing library is reported with its package, and each engine requires only its own libraries."""
    found = judge_libraries(["libnuma.so.1"], "cpu")
    assert found.is_wrong
    assert "libnuma.so.1" in found.problem
    assert found.packages == ("libnuma1",)
    assert not judge_libraries([], "cpu").problem
    assert "libnuma.so.1" not in LIBRARIES["cuda"]


def test_compiler() -> None:
    """A missing compiler or missing headers are reported, and block only what has to be compiled."""
    both = judge_compiler(None, has_headers=False, version=(3, 11), compiles=True)
    assert both.is_wrong
    assert both.packages == ("g++", "python3.11-dev")
    assert judge_compiler("/usr/bin/g++", has_headers=False, version=(3, 13), compiles=True).packages == (
        "python3.13-dev",
    )
    later = judge_compiler(None, has_headers=True, version=(3, 11), compiles=False)
    assert later.problem
    assert not later.is_wrong
    assert not judge_compiler("/usr/bin/g++", has_headers=True, version=(3, 11), compiles=True).problem


def test_shared_memory() -> None:
    """Too little space in /dev/shm blocks a model that runs in several processes and is only a note otherwise."""
    assert judge_shm(64 << 20, is_parallel=True).is_wrong
    assert judge_shm(64 << 20, is_parallel=False).problem
    assert not judge_shm(64 << 20, is_parallel=False).is_wrong
    assert judge_shm(None, is_parallel=False).is_wrong
    assert not judge_shm(SHM_BYTES, is_parallel=True).problem


def test_disk() -> None:
    """Too little disk space for the installation is reported as wrong."""
    assert judge_disk(1 * GiB, "cpu", Path("/opt")).is_wrong
    assert not judge_disk(20 * GiB, "cpu", Path("/opt")).problem
    assert judge_disk(10 * GiB, "cuda", Path("/opt")).is_wrong


def test_driver() -> None:
    """A driver that is too old for the CUDA build or does not answer is rejected; having no GPU is fine."""
    assert not judge_driver(Nvidia()).problem
    assert not judge_driver(GPU).problem
    old = judge_driver(Nvidia(2, "535.1", (12, 2)))
    assert "12.2" in old.problem
    assert "580" in old.fix
    assert judge_driver(Nvidia(error="Driver/library version mismatch")).is_wrong


def test_cuda_is_what_is_installed() -> None:
    """The CUDA version required of the driver is the one in the locked requirements."""
    locked = (ROOT / "conf" / "requirements-cuda.txt").read_text()
    assert re.search(rf"^nvidia-cuda-runtime=={CUDA[0]}\.{CUDA[1]}\.", locked, re.MULTILINE)


def test_engine() -> None:
    """An extension that does not load is reported with the reason, and with the package of a missing library."""
    assert not judge_engine("", "cpu").problem
    reason = "ImportError('libnuma.so.1: cannot open shared object file: No such file or directory')"
    assert judge_engine(reason, "").packages == ("libnuma1",)
    assert "libfoo.so.2" in judge_engine(reason.replace("numa.so.1", "foo.so.2"), "").fix
    assert "setup.sh" in judge_engine("undefined symbol: _ZN3c10", "").fix


@pytest.mark.parametrize(
    ("has_apt", "is_root", "has_sudo", "expected"),
    [
        (True, True, False, "type: apt-get update && apt-get install -y --no-install-recommends a b"),
        (True, False, False, "type as root: apt-get update && apt-get install -y --no-install-recommends a b"),
        (True, False, True, "type: sudo apt-get update && sudo apt-get install -y --no-install-recommends a b"),
        (False, True, True, "install your system's equivalents of the Debian packages a, b"),
    ],
)
def test_what_to_type(has_apt: bool, is_root: bool, has_sudo: bool, expected: str) -> None:
    """The suggested command fits the system: apt or not, root or not, sudo or not."""
    assert install_command(["a", "b"], has_apt=has_apt, is_root=is_root, has_sudo=has_sudo) == expected


def test_settings() -> None:
    """All problems with the settings are reported on one line."""
    assert not stack.judge_settings([]).problem
    assert stack.judge_settings(["BATCH_A: no", "BATCH_B: no"]).problem == "BATCH_A: no; BATCH_B: no"


@pytest.mark.parametrize(
    ("port", "expected"),
    [
        (stack.Port("P", 1), ""),
        (stack.Port("P", 1, errno.EADDRINUSE, "gateway (pid 5)", is_ours=True), ""),
        (stack.Port("P", 1, errno.EADDRINUSE, "nginx (pid 5)"), "P=1 is in use by nginx (pid 5)"),
        (stack.Port("P", 1, errno.EADDRINUSE), "P=1 is in use by another process"),
        (stack.Port("P", 1, errno.EACCES), "P=1 is reserved for root"),
        (stack.Port("P", 1, errno.EADDRNOTAVAIL), "10.0.0.1 is not an address of this machine"),
    ],
)
def test_ports(port: stack.Port, expected: str) -> None:
    """A port is free, in use by this stack, or reported with the reason."""
    assert stack.judge_ports([port], "10.0.0.1").problem == expected


def test_a_port_that_is_let_go_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """A port whose process is ending, so that nobody can be named, is looked at again, and not reported as taken."""
    held = socket.create_server(("127.0.0.1", 0))
    number = held.getsockname()[1]

    def ended(_: int) -> None:
        held.close()

    monkeypatch.setattr(stack, "_listener", ended)
    found = stack.probe_ports(Settings(gateway_port=number, programs="gateway", gateway_metrics_port=0))
    assert [(port.number, port.error) for port in found] == [(number, 0)]


def test_ports_of_all_programs() -> None:
    """The ports of each program that the host runs are looked at, those of metrics too unless there are none."""
    numbers = {name: number for number, name in enumerate(Settings.model_fields, 40_000) if name.endswith("_port")}
    found = stack.probe_ports(Settings(**(numbers | {"http_metrics_port": 0})))  # type: ignore[arg-type]
    names = {port.setting.removeprefix("BATCH_").lower() for port in found}
    assert names == numbers.keys() - {"http_metrics_port"}


def test_home() -> None:
    """A home that belongs to someone else, is not writable, or has folders open to others is rejected."""
    home = stack.Folder(Path("/var/x"), "ada", 0o755, True)
    assert not stack.judge_home([home], "ada").problem
    assert "belongs to ada" in stack.judge_home([home], "root").problem
    assert "not writable" in stack.judge_home([stack.Folder(Path("/var/x"), "ada", 0o555, False)], "ada").problem
    log = stack.Folder(Path("/var/x/log"), "ada", 0o755, True)
    assert stack.judge_home([home, log], "ada").fix == "chmod 0700 /var/x/log"


def test_env_file() -> None:
    """A `.env` that others can read is reported with the command that fixes it."""
    assert stack.judge_env_file(Path(".env"), 0o644).fix == "chmod 600 .env"
    assert not stack.judge_env_file(Path(".env"), 0o600).problem
    assert not stack.judge_env_file(Path(".env"), None).problem


def test_home_disk_files_clock() -> None:
    """A nearly full disk, few open files, an unsynchronized clock and a clock that is years behind are reported."""
    assert stack.judge_home_disk(GiB, Path("/var")).is_wrong
    assert not stack.judge_home_disk(100 * GiB, Path("/var")).problem
    assert stack.judge_files(1023).is_wrong
    assert stack.judge_files(1024).problem
    assert not stack.judge_files(1024).is_wrong
    assert not stack.judge_files(-1).problem
    assert stack.judge_clock(0, is_synchronized=True).is_wrong
    assert not stack.judge_clock(2e9, is_synchronized=False).is_wrong
    assert not stack.judge_clock(2e9, is_synchronized=True).problem


def test_supervisord() -> None:
    """A missing supervisord and a program that failed for good are wrong; a stack that is not running is fine."""
    home = Path("/var/x")
    assert stack.judge_supervisord(False, None, False, home).is_wrong
    assert not stack.judge_supervisord(True, None, True, home).problem
    assert not stack.judge_supervisord(True, {"worker": "RUNNING"}, True, home).problem
    failed = stack.judge_supervisord(True, {"worker": "FATAL"}, True, home)
    assert failed.fix == "tail -n 50 /var/x/log/worker.log"
    for has_socket in (True, False):
        silent = stack.judge_supervisord(True, None, has_socket, home, 7)
        assert silent.is_wrong
        assert silent.fix == "scripts/stop-all.sh"
    assert not stack.judge_supervisord(True, {"worker": "RUNNING"}, True, home, 7).problem


def test_embedded_postgres() -> None:
    """Missing binaries, no way to create Postgres's user, and too little shared memory are reported."""
    assert stack.judge_embedded_postgres("no binary", False, True).is_wrong
    assert stack.judge_embedded_postgres("", True, False).packages == ("passwd",)
    assert not stack.judge_embedded_postgres("", False, False).problem
    assert "/etc/passwd" in stack.judge_embedded_postgres("", False, True, has_account=False).problem
    assert "1 MiB free in /dev/shm" in stack.judge_embedded_postgres("", False, True, shm_bytes=1 << 20).problem
    assert not stack.judge_embedded_postgres("", False, True, shm_bytes=64 << 20).problem


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (database.Database("", 15, False, "batch", "batch", True), ""),
        (database.Database("password authentication failed"), "password authentication failed"),
        (database.Database("", 12, False, "batch", "batch", True), "Postgres 12 is too old"),
        (database.Database("", 15, True, "batch", "batch", True), "a standby"),
        (database.Database("", 15, False, "reader", "batch", False), "reader may not create or change tables in batch"),
        (database.Database("", 15, False, "a", "b", True, collations="2.28, now 2.36"), "(2.28, now 2.36)"),
        (database.Database("", 15, False, "a", "b", True, connections=4), "a may have 4 connections to b"),
        (database.Database("", 15, False, "a", "b", True, lacking="results"), "a may not read and write results"),
        (database.Database("", 15, False, "a", "b", True, hidden="files"), "row-level security hides rows from a"),
    ],
)
def test_database(found: database.Database, expected: str) -> None:
    """A Postgres that cannot be used is reported with the reason."""
    problem = database.judge(found, "DATABASE_URL").problem
    assert expected in problem
    assert bool(problem) == bool(expected)


def test_gpu_memory() -> None:
    """GPU memory held by other processes is reported with their names; memory held by this stack is fine."""
    busy = gpus.Gpu(0, "H100", 10 * GiB, 80 * GiB, (gpus.Holder(7, "python", 60 * GiB),))
    found = gpus.judge([busy], 0.9, ours=set())
    assert "held by python (pid 7, 60.0 GiB)" in found.problem
    assert "72.0" in found.problem
    assert not gpus.judge([busy], 0.9, ours={7}).problem
    assert not gpus.judge([busy], 0.1, ours=set()).problem
    unknown = gpus.Gpu(0, "H100", 0, 80 * GiB, (gpus.Holder(7, "python", None),))
    assert "python (pid 7)" in gpus.judge([unknown], 0.9, ours=set()).problem
    assert "no process visible" in gpus.judge([gpus.Gpu(0, "H100", 0, GiB)], 0.9, ours=set()).problem


def test_gpu_settings() -> None:
    """The share of GPU memory and the visible GPUs are read from the settings."""
    assert gpus.utilization("--max-model-len 8 --gpu-memory-utilization 0.5") == 0.5
    assert gpus.utilization("--gpu-memory-utilization=0.5") == 0.5
    assert gpus.utilization("") == gpus.UTILIZATION
    assert gpus.is_visible(0, None)
    assert gpus.is_visible(1, "1,3")
    assert not gpus.is_visible(0, "1,3")
    assert gpus.is_visible(0, "GPU-8932f937")


SIZES = {"config.json": 600, "a.safetensors": 2 * GiB, "b.safetensors": 2 * GiB}
PATH = Path("/models/m")


@pytest.mark.parametrize(
    ("folder", "expected"),
    [
        (models.Folder(PATH, sizes=SIZES, shards=["a.safetensors", "b.safetensors"]), ""),
        (models.Folder(PATH, sizes={"m.gguf": GiB}, config_error="missing"), ""),
        (models.Folder(PATH, exists=False), "not a folder"),
        (models.Folder(PATH, sizes=SIZES, config_error="missing"), "config.json: missing"),
        (models.Folder(PATH, sizes=SIZES, shards=["a.safetensors", "c.safetensors"]), "1 of 2 weight files"),
        (models.Folder(PATH, sizes={"config.json": 600}), "no weights"),
        (models.Folder(PATH, sizes={**SIZES, "a.safetensors": 0}), "a.safetensors is empty"),
        (models.Folder(PATH, sizes=SIZES, pointers=["a.safetensors"]), "git-lfs pointer"),
    ],
)
def test_model_folder(folder: models.Folder, expected: str) -> None:
    """A model folder in which something is missing or broken is reported with what it is."""
    found = models.judge_folder(folder)
    assert expected in found.problem
    assert found.is_wrong == bool(expected)


@pytest.mark.parametrize(
    ("hub", "expected", "is_wrong"),
    [
        (Hub(Answer.OK, free_bytes=GiB), "", False),
        (Hub(Answer.OK, download_bytes=2 * GiB, free_bytes=GiB), "takes 2.0 GiB", True),
        (Hub(Answer.GATED), "HF_TOKEN is not set", True),
        (Hub(Answer.GATED, has_token=True), "the account of this HF_TOKEN has no access", True),
        (Hub(Answer.GATED, is_cached=True), "gated", False),
        (Hub(Answer.NOT_FOUND), "Hugging Face has no", True),
        (Hub(Answer.AWAY, "timed out"), "timed out", True),
        (Hub(Answer.AWAY, "timed out", is_cached=True), "timed out", False),
        (Hub(Answer.OFFLINE), "HF_HUB_OFFLINE", True),
        (Hub(Answer.OFFLINE, is_cached=True), "", False),
    ],
)
def test_model_of_the_hub(hub: Hub, expected: str, is_wrong: bool) -> None:
    """Each answer of the hub is judged, including whether a cached copy makes up for it."""
    found = models.judge_hub("org/model", hub)
    assert expected in found.problem
    assert bool(found.problem) == bool(expected)
    assert found.is_wrong == is_wrong


def test_model_is_a_folder_or_of_the_hub(tmp_path: Path) -> None:
    """A path is a folder even if it does not exist; any other name is a hub model unless such a folder exists."""
    assert models.is_folder("/models/m")
    assert models.is_folder("./m")
    assert models.is_folder(str(tmp_path))
    assert not models.is_folder("Qwen/Qwen3-0.6B")


@pytest.mark.parametrize("engine", ["cpu", "cuda"])
def test_locked_versions(engine: str) -> None:
    """Every locked version is exact and has hashes, and the file contains no URLs."""
    text = (ROOT / "conf" / f"requirements-{engine}.txt").read_text()
    entries = re.split(r"\n(?=[a-z])", re.sub(r"^#.*\n|^ +#.*\n", "", text, flags=re.MULTILINE).strip())
    assert len(entries) > 100
    for entry in entries:
        assert re.match(r"[a-z0-9._-]+(\[[a-z,_-]+\])?==\S+", entry), entry[:100]
        assert "--hash=sha256:" in entry, entry[:100]
    assert "://" not in text


@pytest.mark.parametrize(
    ("host", "name", "announced", "expected"),
    [
        (
            "127.0.0.1",
            "gpu2",
            "10.0.0.1:1",
            ["WRONG   address: other hosts use this Postgres (gpu1:worker at 10.0.0.1:1)"],
        ),
        (
            "10.0.0.2",
            "gpu1",
            "10.0.0.1:1",
            ["WRONG   name: another machine runs as gpu1:worker, at 10.0.0.1:1 (pid 7)"],
        ),
        ("10.0.0.2", "gpu2", "127.0.0.1:1", ["note    address: gpu1:worker on another host announces 127.0.0.1:1"]),
        ("10.0.0.2", "gpu2", "10.0.0.1:1", ["ok      hosts"]),
    ],
)
def test_other_hosts(host: str, name: str, announced: str, expected: list[str]) -> None:
    """A name that another machine has and an address that others cannot reach are wrong; theirs is worth a note."""
    settings = Settings(_env_file=None, host=host, allow_insecure=True)  # type: ignore[call-arg]
    beat = Beat("gpu1:worker", uuid4(), announced, "ready", 7, place=Place("m1", "b1/1", "b1/2"))
    findings = neighbours.judge(settings, name, [SeenBeat(beat, 1.0, lease_left_s=59)], Place("m2", "b2/1", "b2/2"))
    assert [line(one)[: len(text)] for one, text in zip(findings, expected, strict=True)] == expected
