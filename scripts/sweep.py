"""Ends every process of this BATCH_HOME that supervisord did not: known by what it inherited, never by name."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from service import processes


def main() -> int:
    """0 when nothing is left."""
    # Not from the settings: stopping works with wrong ones too.
    left = processes.marked(processes.Mark(Path(os.environ["BATCH_HOME"])))
    for process in left:
        print(f"stop: ending {process.pid} ({process.name()}), which was left behind", flush=True)
    still = processes.end(left, timeout_s=10)
    for process in still:
        print(f"stop: {process.pid} does not end", file=sys.stderr)
    return 1 if still else 0


if __name__ == "__main__":
    raise SystemExit(main())
