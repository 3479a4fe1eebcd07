"""Runs benchmarks one after another and makes the page of what came of them: `python -m benchmarks.run --all`.

`python -m benchmarks.run upload claim` runs these two; without names only the page is made anew. `--quick` takes less
than 5 minutes for all and leaves docs/ alone.
"""

import argparse
import subprocess
import sys

from benchmarks import page
from tests.stacks import ROOT

# The quickest first, so that what is wrong is seen soon.
CLAIMS = (
    "idle",
    "calls",
    "claim",
    "storage",
    "workers",
    "pipeline",
    "poison",
    "upload",
    "results",
    "detection",
    "throughput",
    "recovery",
)


def main() -> int:
    """0 when all that was asked for could be measured, whatever came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(CLAIMS))
    parser.add_argument("--all", action="store_true", help="all of them")
    parser.add_argument("--quick", action="store_true", help="small sizes and few runs: does it work, no more")
    options = parser.parse_args()
    unknown = sorted(set(options.names) - set(CLAIMS))
    if unknown:
        parser.error(f"no such benchmark: {', '.join(unknown)}")
    failed = []
    for name in CLAIMS if options.all else options.names:
        # Each in a process of its own: nothing of one is left for the next.
        command = [sys.executable, "-m", f"benchmarks.{name}", *(["--quick"] if options.quick else [])]
        if subprocess.run(command, cwd=ROOT).returncode != 0:
            failed.append(name)
    sys.stdout.write(f"{page.write(CLAIMS, options.quick)}\n")
    if failed:
        sys.stdout.write(f"not measured: {', '.join(failed)}\n")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
