"""Which processes hold GPU memory, for the message that it ran out."""

import os

import psutil

MAX_HOLDERS = 3


def gpu_holders() -> str:
    """Returns for example "GPU 0: 20.1 GiB by python3 (pid 4711)", largest first, without this worker's processes.

    "" if no other process holds any, or NVIDIA's library cannot tell.
    """
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # noqa: BLE001 - not installed, no driver or no GPU: no difference here
        return ""
    try:
        own = {os.getpid(), *(child.pid for child in psutil.Process().children(recursive=True))}
        found = []
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            for process in pynvml.nvmlDeviceGetComputeRunningProcesses(handle):
                if process.pid not in own and process.usedGpuMemory:
                    found.append((process.usedGpuMemory, index, process.pid))
        found.sort(reverse=True)
        return ", ".join(
            f"GPU {index}: {used / 2**30:.1f} GiB by {_name(pid)} (pid {pid})"
            for used, index, pid in found[:MAX_HOLDERS]
        )
    except Exception:  # noqa: BLE001 - the driver cannot tell
        return ""
    finally:
        pynvml.nvmlShutdown()


def _name(pid: int) -> str:
    try:
        return psutil.Process(pid).name()
    except psutil.Error:
        return "another container's process"
