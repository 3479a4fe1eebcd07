"""Ends processes of this BATCH_HOME that supervisord left, identified by their environment, never by name."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from service import processes


def main() -> int:
    """Returns 0 when no process is left, else 1."""
    # From the environment: stopping must work with invalid settings too.
    left = processes.marked(processes.Mark(Path(os.environ["BATCH_HOME"])))
    for process in left:
        print(f"stop: ending leftover process {process.pid} ({process.name()})", flush=True)
    still = processes.end(left, timeout_s=10)
    for process in still:
        print(f"stop: process {process.pid} does not end, even by SIGKILL", file=sys.stderr)
    return 1 if still else 0


if __name__ == "__main__":
    raise SystemExit(main())
