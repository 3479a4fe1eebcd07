"""Claim: watching costs next to nothing while all is well.

Against: an idle machine without watchdog and heartbeat: 0.
Target: watchdog and heartbeat each under 1 % of one core and under 80 MB (not counting the worker's engine).

Processor time per second of a stack without work, with the default intervals. The heartbeat is measured as a worker's
heart in a process of its own. Gateway and Postgres are shown for comparison.
"""

import json
import subprocess
import sys
import time
from collections.abc import Iterator

import psutil

from benchmarks.lib.harness import Figure, Sizes, at_most, main
from benchmarks.lib.stacks import processor_s, simulated, url
from tests.support.stacks import ROOT

SIZES: Sizes = {"seconds": (60, 8), "rounds": (5, 1)}


def measure(seconds: int, rounds: int) -> Iterator[Figure]:
    """Measures all processes at the same time, round after round."""
    with simulated() as stack:
        watched = {name: stack.pid(name) for name in ("watchdog", "gateway", "postgres")}
        shares: dict[str, list[float]] = {name: [] for name in (*watched, "heartbeat")}
        memories: dict[str, list[float]] = {"watchdog": [], "heartbeat": []}
        for _ in range(rounds):
            command = [sys.executable, "-m", "benchmarks.lib.heart_alone", url(stack), str(seconds)]
            with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as heart:
                before, begin_s = {name: processor_s(pid) for name, pid in watched.items()}, time.monotonic()
                printed, _error = heart.communicate(timeout=seconds + 60)
            took_s = time.monotonic() - begin_s
            for name, pid in watched.items():
                shares[name].append(100 * (processor_s(pid) - before[name]) / took_s)
            memories["watchdog"].append(psutil.Process(watched["watchdog"]).memory_info().rss / 2**20)
            beating = json.loads(printed)
            shares["heartbeat"].append(100 * beating["core"])
            memories["heartbeat"].append(beating["mb"])
    for name in ("watchdog", "heartbeat"):
        yield Figure(name, "% of a core", shares[name], "none", target=at_most("median", 1))
        yield Figure(f"{name}: memory", "MB", memories[name], "none", target=at_most("median", 80))
    for name in ("gateway", "postgres"):
        yield Figure(f"{name}, for comparison", "% of a core", shares[name], "none")


if __name__ == "__main__":
    main(__file__, __doc__, SIZES, measure)
