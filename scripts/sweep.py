"""Ends a supervisord of this BATCH_HOME that does not answer, and what any has left.

Both are identified by their environment, never by name alone.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from service import processes

# For a supervisord that was not asked to stop: for its programs to end, the worker's drain included.
STOP_TIMEOUT_S = 120.0


def main() -> int:
    """Returns 0 when no process is left, else 1."""
    # From the environment: stopping must work with invalid settings too.
    home = Path(os.environ["BATCH_HOME"])
    # Without its socket nobody can ask it to stop, and it would start again what ends.
    if silent := processes.supervisords(home):
        pids = ", ".join(str(process.pid) for process in silent)
        print(f"stop: supervisord does not answer; ending it (pid {pids})", flush=True)
        processes.end(silent, STOP_TIMEOUT_S)
    left = processes.marked(processes.Mark(home))
    for process in left:
        print(f"stop: ending leftover process {process.pid} ({process.name()})", flush=True)
    still = processes.end(left, timeout_s=10)
    for process in still:
        print(f"stop: process {process.pid} does not end, even by SIGKILL", file=sys.stderr)
    return 1 if still else 0


if __name__ == "__main__":
    raise SystemExit(main())
