"""A process's peak memory. Imports nothing that would add to it."""

from pathlib import Path


def peak_mb(pid: int | str = "self") -> float:
    """The largest resident memory of a process so far, in MB."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) / 1024
