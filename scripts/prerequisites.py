"""Checks what this machine must have before anything is downloaded. Used by setup.sh and the doctor.

Nothing is installed yet when this runs, so it uses only the standard library, except for `--load`.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import platform
import re
import shutil
import sys
import sysconfig
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GiB = 1 << 30
MiB = 1 << 20

PYTHONS = ((3, 11), (3, 13))
# The glibc that the newest of the wheels are built for, by processor and engine.
GLIBC = {
    ("x86_64", "cpu"): (2, 31),
    ("x86_64", "cuda"): (2, 31),
    ("aarch64", "cpu"): (2, 31),
    ("aarch64", "cuda"): (2, 34),
}
# The CUDA version in conf/requirements-cuda.txt, and the first driver that supports it.
CUDA, CUDA_DRIVER = (13, 0), 580
# .venv with pip's temporary files and cache.
DISK_BYTES = {"cpu": 6 * GiB, "cuda": 20 * GiB}
# vLLM's processes exchange messages through /dev/shm: it refuses to start with less than 160 MiB.
SHM_BYTES = 192 * MiB
# Debian packages of the shared libraries that the wheels load but do not contain.
LIBRARIES = {
    "cpu": {"libnuma.so.1": "libnuma1", "libstdc++.so.6": "libstdc++6", "libgcc_s.so.1": "libgcc-s1"},
    "cuda": {"libstdc++.so.6": "libstdc++6", "libgcc_s.so.1": "libgcc-s1"},
}

# vLLM's flags that start several processes on GPUs.
PARALLEL = r"-parallel-size|(^|\s)-[tpd]p\b"


@dataclass(frozen=True)
class Finding:
    """The outcome of one check: fine unless `problem` is set."""

    name: str
    fact: str = ""
    problem: str = ""
    fix: str = ""
    # Debian packages that fix it.
    packages: tuple[str, ...] = ()
    # False: worth knowing, but the stack can start without a fix.
    is_blocking: bool = True

    @property
    def is_wrong(self) -> bool:
        """True when the problem prevents a start."""
        return bool(self.problem) and self.is_blocking


@dataclass(frozen=True)
class Nvidia:
    """What the NVIDIA driver reports. `error`: there are devices, but the driver does not answer."""

    gpus: int = 0
    driver: str = ""
    cuda: tuple[int, int] = (0, 0)
    error: str = ""


@dataclass(frozen=True)
class Plan:
    """Which build of vLLM runs here, whether it compiles the model, and whether it uses several processes."""

    engine: str
    compiles: bool
    is_parallel: bool


def plan(nvidia: Nvidia, settings: Mapping[str, str]) -> Plan:
    """Plans for the CUDA build if there is a GPU. It compiles with any model, the CPU build only with a real one."""
    arguments = settings.get("BATCH_ENGINE_ARGS", "")
    if nvidia.gpus or nvidia.error:
        return Plan("cuda", compiles=True, is_parallel=re.search(PARALLEL, arguments) is not None)
    is_real = bool(settings.get("BATCH_MODEL")) and settings.get("BATCH_ENGINE", "vllm") == "vllm"
    return Plan("cpu", compiles=is_real and "--enforce-eager" not in arguments, is_parallel=is_real)


def given_settings(environ: Mapping[str, str], env_file: str) -> dict[str, str]:
    """Returns BATCH_ settings as the server will read them: the environment overrides `.env`."""
    pattern = re.compile(r"^\s*(?:export\s+)?(BATCH_\w+)\s*=\s*(.*?)(?:\s+#.*)?\s*$", re.MULTILINE)
    found = {name: value.strip("'\"") for name, value in pattern.findall(env_file)}
    return found | {name: value for name, value in environ.items() if name.startswith("BATCH_")}


def judge_python(version: tuple[int, int], executable: str, *, has_venv: bool) -> Finding:
    """Checks the interpreter that creates .venv."""
    shown = f"{version[0]}.{version[1]}"
    if not PYTHONS[0] <= version <= PYTHONS[1]:
        problem = f"{executable} is Python {shown}; 3.11, 3.12 or 3.13 is required"
        return Finding("python", problem=problem, fix="PYTHON=/path/to/python3.12 scripts/setup.sh")
    if not has_venv:
        package = f"python{shown}-venv"
        return Finding("python", problem=f"{executable} cannot make virtual environments", packages=(package,))
    return Finding("python", f"{shown} ({executable})")


def judge_platform(machine: str, glibc: tuple[int, int] | None, cpu_flags: Iterable[str], engine: str) -> Finding:
    """Checks processor and C library against what the wheels are built for."""
    needed = GLIBC.get((machine, engine))
    if needed is None:
        return Finding("platform", problem=f"vLLM has no build for {machine}", fix="use x86_64 or aarch64")
    if glibc is None or glibc < needed:
        found = "no glibc" if glibc is None else f"glibc {glibc[0]}.{glibc[1]}"
        problem = f"{found}; {needed[0]}.{needed[1]} or newer is required"
        return Finding("platform", problem=problem, fix="use Debian 12, Ubuntu 22.04 or newer")
    if engine == "cpu" and machine == "x86_64" and "avx2" not in set(cpu_flags):
        problem = "the processor has no AVX2, which vLLM's CPU build requires"
        return Finding("platform", problem=problem, fix="use another machine, or in a VM the CPU type `host`")
    return Finding("platform", f"{machine}, glibc {glibc[0]}.{glibc[1]}")


def judge_libraries(missing: Sequence[str], engine: str) -> Finding:
    """Checks the shared libraries that vLLM loads but does not contain."""
    needed = LIBRARIES[engine]
    if not missing:
        return Finding("libraries", ", ".join(needed))
    packages = tuple(needed[name] for name in missing)
    return Finding("libraries", problem=f"vLLM needs {', '.join(missing)}: not found", packages=packages)


def judge_compiler(compiler: str | None, *, has_headers: bool, version: tuple[int, int], compiles: bool) -> Finding:
    """Checks for a C++ compiler and Python's headers: torch.compile and Triton use them while a model loads."""
    if compiler and has_headers:
        return Finding("compiler", f"{compiler}, Python.h")
    missing = [] if compiler else ["a C++ compiler"]
    packages = [] if compiler else ["g++"]
    if not has_headers:
        missing.append(f"Python.h for Python {version[0]}.{version[1]}")
        packages.append(f"python{version[0]}.{version[1]}-dev")
    when = "required to load a model" if compiles else "required for real models, not for the tiny one"
    problem = f"{' and '.join(missing)} not found: {when}"
    return Finding("compiler", problem=problem, packages=tuple(packages), is_blocking=compiles)


def judge_shm(free_bytes: int | None, *, is_parallel: bool) -> Finding:
    """Checks free space in /dev/shm, through which vLLM's processes communicate."""
    fix = "mount -o remount,size=2G /dev/shm (as root); in a container, --shm-size or --ipc=host"
    if free_bytes is None:
        return Finding("shared memory", problem="/dev/shm is not writable", fix=fix)
    if free_bytes < SHM_BYTES:
        problem = f"{free_bytes // MiB} MiB free in /dev/shm; a real model needs {SHM_BYTES // MiB}"
        return Finding("shared memory", problem=problem, fix=fix, is_blocking=is_parallel)
    return Finding("shared memory", f"{free_bytes // MiB} MiB free in /dev/shm")


def judge_disk(free_bytes: int, engine: str, folder: Path) -> Finding:
    """Checks disk space for the download and .venv."""
    needed = DISK_BYTES[engine]
    if free_bytes >= needed:
        return Finding("disk", f"{free_bytes / GiB:.1f} GiB free in {folder}")
    problem = f"{free_bytes / GiB:.1f} GiB free in {folder}; the installation needs {needed // GiB}"
    return Finding("disk", problem=problem, fix="free some space, or clone onto a larger disk")


def judge_driver(nvidia: Nvidia) -> Finding:
    """Checks that the NVIDIA driver answers and is new enough for the CUDA build."""
    if nvidia.error:
        problem = f"there is an NVIDIA GPU, but its driver does not answer: {nvidia.error}"
        return Finding("gpu driver", problem=problem, fix="see nvidia-smi; after a driver upgrade, reboot")
    if not nvidia.gpus:
        return Finding("gpu driver", "no NVIDIA GPU: uses the CPU build of vLLM")
    shown = f"driver {nvidia.driver}, CUDA {nvidia.cuda[0]}.{nvidia.cuda[1]}"
    if nvidia.cuda < CUDA:
        problem = f"{shown} is too old; the CUDA build of vLLM needs CUDA {CUDA[0]}.{CUDA[1]}"
        return Finding("gpu driver", problem=problem, fix=f"install NVIDIA driver {CUDA_DRIVER} or newer, then reboot")
    return Finding("gpu driver", f"{nvidia.gpus} GPU, {shown}" if nvidia.gpus == 1 else f"{nvidia.gpus} GPUs, {shown}")


def install_command(packages: Sequence[str], *, has_apt: bool, is_root: bool, has_sudo: bool) -> str:
    """Returns what to type to install Debian packages."""
    if not has_apt:
        return f"install your system's equivalents of the Debian packages {', '.join(packages)}"
    sudo = "sudo " if has_sudo and not is_root else ""
    command = f"{sudo}apt-get update && {sudo}apt-get install -y --no-install-recommends {' '.join(packages)}"
    return f"type: {command}" if sudo or is_root else f"type as root: {command}"


def what_to_do(finding: Finding) -> str:
    """Returns the fix for a finding on this machine."""
    return finding.fix or how_to_install(finding.packages)


def how_to_install(packages: Sequence[str]) -> str:
    """Returns what to type on this machine to install Debian packages."""
    return install_command(
        packages,
        has_apt=shutil.which("apt-get") is not None,
        is_root=os.geteuid() == 0,
        has_sudo=shutil.which("sudo") is not None,
    )


def probe_nvidia() -> Nvidia:
    """Queries the driver's library. Returns zeros if there is neither driver nor device."""
    has_device = Path("/dev/nvidiactl").exists()
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
        library.nvmlErrorString.restype = ctypes.c_char_p
        code = library.nvmlInit_v2()
    except (OSError, AttributeError) as error:
        return Nvidia(error=str(error)) if has_device else Nvidia()
    if code != 0:
        return Nvidia(error=library.nvmlErrorString(code).decode()) if has_device else Nvidia()
    try:
        count, cuda, driver = ctypes.c_uint(), ctypes.c_int(), ctypes.create_string_buffer(96)
        library.nvmlDeviceGetCount_v2(ctypes.byref(count))
        library.nvmlSystemGetCudaDriverVersion_v2(ctypes.byref(cuda))
        library.nvmlSystemGetDriverVersion(driver, ctypes.c_uint(len(driver)))
        return Nvidia(count.value, driver.value.decode(), (cuda.value // 1000, cuda.value % 1000 // 10))
    finally:
        library.nvmlShutdown()


def probe_libraries(engine: str) -> list[str]:
    """Returns those of LIBRARIES that the loader does not find."""
    missing = []
    for name in LIBRARIES[engine]:
        try:
            ctypes.CDLL(name)
        except OSError:
            missing.append(name)
    return missing


def probe_compiler() -> str | None:
    """Returns the C++ compiler that torch uses. The C compiler that Triton uses comes with it."""
    return shutil.which(os.environ.get("CXX", "g++"))


def has_headers() -> bool:
    """Returns True if this interpreter's Python.h is installed."""
    return Path(sysconfig.get_path("include"), "Python.h").exists()


def probe_shm() -> int | None:
    """Returns the bytes free in /dev/shm; None if it is not writable."""
    if not os.access("/dev/shm", os.W_OK):
        return None
    space = os.statvfs("/dev/shm")
    return space.f_bavail * space.f_frsize


def probe_cpu_flags() -> list[str]:
    """Returns the processor's feature flags."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return []
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    return found.group(1).split() if found else []


def probe_glibc() -> tuple[int, int] | None:
    """Returns the version of glibc; None with another C library."""
    name, version = platform.libc_ver()
    numbers = version.split(".")
    return (int(numbers[0]), int(numbers[1])) if name == "glibc" and len(numbers) >= 2 else None


def read_settings() -> dict[str, str]:
    """Returns the BATCH_ settings of this checkout."""
    path = Path(os.environ.get("BATCH_ENV_FILE", ROOT / ".env"))
    text = ""
    # What is no file, or a huge one, is refused later, by what reads it properly.
    with suppress(OSError):
        if path.is_file():
            with path.open(errors="replace") as file:
                text = file.read(16 * MiB)
    return given_settings(os.environ, text)


def machine_checks(wanted: Plan, nvidia: Nvidia) -> list[Finding]:
    """Returns the checks that still apply after the installation."""
    version = (sys.version_info.major, sys.version_info.minor)
    # Inside .venv: the interpreter that created it.
    base = os.path.realpath(sys.executable)
    return [
        judge_python(version, base, has_venv=find_spec("ensurepip") is not None),
        judge_platform(platform.machine(), probe_glibc(), probe_cpu_flags(), wanted.engine),
        judge_libraries(probe_libraries(wanted.engine), wanted.engine),
        judge_compiler(probe_compiler(), has_headers=has_headers(), version=version, compiles=wanted.compiles),
        judge_shm(probe_shm(), is_parallel=wanted.is_parallel),
        judge_driver(nvidia),
    ]


def judge_engine(error: str, device: str) -> Finding:
    """Checks that vLLM's compiled extension loads. The loader's `error` names a missing library."""
    if not error:
        return Finding("vllm", f"its extension loads for {device}")
    problem = f"vLLM's extension does not load: {error}"
    library = re.search(r"(lib[\w.+-]+\.so[.\d]*): cannot open shared object file", error)
    if library is None:
        return Finding("vllm", problem=problem, fix="rm -rf .venv && scripts/setup.sh")
    name = library.group(1)
    known = {**LIBRARIES["cpu"], **LIBRARIES["cuda"]}
    if name in known:
        return Finding("vllm", problem=problem, packages=(known[name],))
    return Finding("vllm", problem=problem, fix=f"install the package of {name} (on Debian: apt-file search {name})")


def load_engine() -> Finding:
    """Loads vLLM's compiled extension as its processes will. Takes seconds; vLLM must be installed."""
    from service.worker.engine.vllm import load_extension

    try:
        return judge_engine("", load_extension())
    except Exception as error:  # noqa: BLE001 - any failure to load is the finding
        return judge_engine(f"{type(error).__name__}: {error}", "")


def shown(finding: Finding) -> str:
    """Formats a problem and its fix as one line."""
    return f"{finding.name}: {finding.problem} → {what_to_do(finding)}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0 if the installation can begin, else 1."""
    parser = argparse.ArgumentParser(description=__doc__)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--engine", action="store_true", help="print the build of vLLM for this machine: cpu or cuda")
    mode.add_argument("--packages", action="store_true", help="print the missing Debian packages")
    mode.add_argument("--load", action="store_true", help="check that the installed vLLM's extension loads")
    options = parser.parse_args(arguments)
    nvidia = probe_nvidia()
    wanted = plan(nvidia, read_settings())
    if options.engine:
        print(wanted.engine)
        return 0
    if options.load:
        findings = [load_engine()]
    else:
        free = shutil.disk_usage(ROOT).free
        findings = [*machine_checks(wanted, nvidia), judge_disk(free, wanted.engine, ROOT)]
    wrong = [finding for finding in findings if finding.is_wrong]
    packages = [package for finding in wrong for package in finding.packages]
    if options.packages:
        print(" ".join(packages))
        return 0
    for finding in wrong:
        if not finding.packages:
            print(f"setup: {shown(finding)}", file=sys.stderr)
        else:
            print(f"setup: {finding.name}: {finding.problem}", file=sys.stderr)
    if packages:
        print(f"setup: nothing was installed; {how_to_install(packages)}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
