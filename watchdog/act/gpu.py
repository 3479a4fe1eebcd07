"""The GPUs, and which processes hold their memory, according to NVIDIA's library; none without a driver.

`python -m watchdog.act.gpu` prints those processes, `python -m watchdog.act.gpu devices` the GPUs. A call into the
driver can hang, so it runs in a process with a deadline.
"""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pynvml

from watchdog.act import commands

# Exists wherever the driver is loaded, also in containers with a GPU.
DEVICE = Path("/dev/nvidiactl")
TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Device:
    """A GPU."""

    name: str
    memory_bytes: int


def parse(output: str) -> set[int]:
    """Returns the pids that hold memory, from rows `pid, used`. An amount unknown to the driver counts as held."""
    rows = (line.split(",") for line in output.splitlines())
    return {int(row[0]) for row in rows if len(row) == 2 and row[0].strip().isdigit() and row[1].strip() != "0"}


def rows() -> list[str]:
    """Returns `pid, used` of each process on each GPU. Raises NVMLError without a driver."""
    pynvml.nvmlInit()
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        found = [process for handle in handles for process in pynvml.nvmlDeviceGetComputeRunningProcesses(handle)]
        return [f"{process.pid}, {process.usedGpuMemory}" for process in found]
    finally:
        pynvml.nvmlShutdown()


def device_rows() -> list[str]:
    """Returns `memory in bytes, name` of each GPU. Raises NVMLError without a driver."""
    pynvml.nvmlInit()
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        return [f"{pynvml.nvmlDeviceGetMemoryInfo(handle).total}, {_name(handle)}" for handle in handles]
    finally:
        pynvml.nvmlShutdown()


def _name(handle: Any) -> str:
    name = pynvml.nvmlDeviceGetName(handle)
    return name.decode() if isinstance(name, bytes) else str(name)


def holders() -> set[int]:
    """Returns the pids that hold memory of any GPU; none if there is no driver or it does not answer."""
    return parse(_ask())


def devices() -> list[Device]:
    """Returns the GPUs; none if there is no driver or it does not answer."""
    pairs = (line.split(", ", 1) for line in _ask("devices").splitlines())
    return [Device(pair[1], int(pair[0])) for pair in pairs if len(pair) == 2 and pair[0].isdigit()]


def _ask(*arguments: str) -> str:
    """Returns what this module prints when it runs by itself; empty without a driver or an answer."""
    if not DEVICE.exists():
        return ""
    command = [sys.executable, "-m", "watchdog.act.gpu", *arguments]
    try:
        done = commands.output(command, TIMEOUT_S)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout if done.returncode == 0 else ""


if __name__ == "__main__":
    sys.stdout.writelines(f"{row}\n" for row in (device_rows() if sys.argv[1:] == ["devices"] else rows()))
