"""Runs commands that may hang for good: a call into a driver can withstand SIGKILL."""

import subprocess
from collections.abc import Sequence
from contextlib import suppress

# How long a command that was killed may take to be gone.
KILL_TIMEOUT_S = 0.5


def output(command: Sequence[str], timeout_s: float) -> "subprocess.CompletedProcess[str]":
    """Returns how the command ended and what it printed.

    Raises subprocess.TimeoutExpired after `timeout_s`, whether or not it can be killed, and OSError.
    """
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        printed, said = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        # Unlike subprocess.run, which waits for as long as it takes.
        with suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=KILL_TIMEOUT_S)
        raise
    return subprocess.CompletedProcess(command, process.returncode, printed, said)
