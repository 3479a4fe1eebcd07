"""Checks the free memory of each GPU, and names the processes that hold the rest, using NVIDIA's library."""

import os
import re
import shlex
from collections.abc import Sequence, Set
from dataclasses import dataclass
from pathlib import Path

import psutil
import pynvml

from scripts.prerequisites import Finding, GiB
from service.config import Settings
from service.processes import Mark, marked

# vLLM's own default for --gpu-memory-utilization.
UTILIZATION = 0.92


@dataclass(frozen=True)
class Holder:
    """A process that holds GPU memory. `used_bytes` is None if the driver cannot tell."""

    pid: int
    name: str
    used_bytes: int | None


@dataclass(frozen=True)
class Gpu:
    """The current state of a GPU."""

    index: int
    name: str
    free_bytes: int
    total_bytes: int
    holders: tuple[Holder, ...] = ()


def utilization(engine_args: str) -> float:
    """Returns the share of a GPU's memory that vLLM will claim."""
    found = re.search(r"--gpu[-_]memory[-_]utilization[= ]+([0-9.]+)", " ".join(shlex.split(engine_args)))
    return float(found.group(1)) if found else UTILIZATION


def judge(gpus: Sequence[Gpu], share: float, ours: Set[int]) -> Finding:
    """Checks that the share of memory that vLLM claims is free: otherwise it refuses to start."""
    wrong = []
    for gpu in gpus:
        is_ours = any(holder.pid in ours for holder in gpu.holders)
        needed = share * gpu.total_bytes
        if gpu.free_bytes < needed and not is_ours:
            who = (
                ", ".join(f"{h.name} (pid {h.pid}{_amount(h)})" for h in gpu.holders) or "no process visible from here"
            )
            wrong.append(
                f"GPU {gpu.index}: {gpu.free_bytes / GiB:.1f} of {gpu.total_bytes / GiB:.1f} GiB free,"
                f" vLLM will claim {needed / GiB:.1f}; held by {who}"
            )
    if wrong:
        fix = "stop what holds it, or lower --gpu-memory-utilization in BATCH_ENGINE_ARGS"
        return Finding("gpu memory", problem="; ".join(wrong), fix=fix)
    facts = [f"{g.index}: {g.name}, {g.free_bytes / GiB:.1f} of {g.total_bytes / GiB:.1f} GiB free" for g in gpus]
    return Finding("gpu memory", "; ".join(facts))


def _amount(holder: Holder) -> str:
    return "" if holder.used_bytes is None else f", {holder.used_bytes / GiB:.1f} GiB"


def probe() -> list[Gpu]:
    """Returns the GPUs that CUDA will see; none without a driver."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        indexes = range(pynvml.nvmlDeviceGetCount())
        return [_probe_gpu(index) for index in indexes if is_visible(index, os.environ.get("CUDA_VISIBLE_DEVICES"))]
    finally:
        pynvml.nvmlShutdown()


def is_visible(index: int, visible: str | None) -> bool:
    """Returns False for a GPU that CUDA_VISIBLE_DEVICES excludes by number."""
    if visible is None or not all(part.strip().isdigit() for part in visible.split(",")):
        return True
    return index in {int(part) for part in visible.split(",")}


def _probe_gpu(index: int) -> Gpu:
    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    holders = []
    for process in pynvml.nvmlDeviceGetComputeRunningProcesses(handle):
        try:
            name = psutil.Process(process.pid).name()
        except psutil.Error:
            name = "a process"
        holders.append(Holder(process.pid, name, process.usedGpuMemory))
    return Gpu(index, pynvml.nvmlDeviceGetName(handle), memory.free, memory.total, tuple(holders))


def check(settings: Settings) -> list[Finding]:
    """Returns one finding for all GPUs; none if there is no GPU or the engine needs none."""
    found = probe()
    if not found or settings.engine != "vllm":
        return []
    ours = {process.pid for process in marked(Mark(Path(settings.home)))}
    return [judge(found, utilization(settings.engine_args), ours)]
