"""Runs benchmarks one after another and generates the page of their results: `python -m benchmarks.run --all`.

`python -m benchmarks.run upload claim` runs these two; without names it only regenerates the page. `--quick` takes less
than 5 minutes for all and leaves docs/ alone.
"""

import argparse
import subprocess
import sys

from benchmarks.lib import page
from tests.support.stacks import ROOT

# The quickest first, so that problems show soon.
CLAIMS = (
    "idle",
    "calls",
    "claim",
    "turns",
    "storage",
    "workers",
    "sharing",
    "pipeline",
    "poison",
    "estimate",
    "webhooks",
    "upload",
    "prefixes",
    "results",
    "http",
    "detection",
    "failover",
    "throughput",
    "recovery",
    "large_batch",
)


def main() -> int:
    """Returns 0 if every requested benchmark could be measured, whatever its result."""
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
        # Each in a process of its own, so that nothing is left over for the next.
        command = [sys.executable, "-m", f"benchmarks.claims.{name}", *(["--quick"] if options.quick else [])]
        if subprocess.run(command, cwd=ROOT).returncode != 0:
            failed.append(name)
    sys.stdout.write(f"{page.write(CLAIMS, options.quick)}\n")
    if failed:
        sys.stdout.write(f"not measured: {', '.join(failed)}\n")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
