"""Whose memory a GPU still holds, by nvidia-smi; nothing where there is none."""

import shutil
import subprocess

QUERY = ("--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits")
TIMEOUT_S = 5.0


def parse(output: str) -> set[int]:
    """The pids that hold memory, of what nvidia-smi answers to QUERY. An amount that it does not know counts too."""
    rows = (line.split(",") for line in output.splitlines())
    return {int(row[0]) for row in rows if len(row) == 2 and row[0].strip().isdigit() and row[1].strip() != "0"}


def holders() -> set[int]:
    """The pids that hold memory of any GPU; none where nvidia-smi is not there or does not answer."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return set()
    try:
        done = subprocess.run([command, *QUERY], capture_output=True, text=True, timeout=TIMEOUT_S)
    except (OSError, subprocess.SubprocessError):
        return set()
    return parse(done.stdout) if done.returncode == 0 else set()
