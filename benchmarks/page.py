"""The page of benchmarks: what the results there are say, with a table and a chart for each claim."""

import json
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.charts import chart
from benchmarks.harness import ROOT, result_file, table

HEAD = """# What it costs, measured

{kind}Made by `python -m benchmarks.run`; each claim is measured beside its alternative in one run, in turns, by a
command of its own, which writes every value to `var/benchmarks/`. Figures are medians, lowest and highest in
parentheses. What the machine did beside it is in the load average below each: over 1 or 2, the rates are too low.
"""
QUICK = "**Quick sizes and few runs: this shows that the benchmarks work, and proves nothing.** "


def write(names: tuple[str, ...], is_quick: bool) -> Path:
    """Writes the page from the results of these benchmarks, as far as there are any; its path.

    It is docs/benchmarks.md with docs/benchmarks/*.svg, for quick ones beside their JSON.
    """
    folder = result_file("", is_quick).parent if is_quick else ROOT / "docs"
    charts = folder / "benchmarks"
    charts.mkdir(parents=True, exist_ok=True)
    sections = [HEAD.format(kind=QUICK if is_quick else "")]
    for name in names:
        file = result_file(name, is_quick)
        if file.exists():
            result = json.loads(file.read_text())
            (charts / f"{name}.svg").write_text(chart(name, result["figures"]))
            sections.append(section(result, import_module(f"benchmarks.{name}").__doc__ or ""))
    page = folder / "benchmarks.md"
    page.write_text("\n".join(sections))
    return page


def section(result: Mapping[str, Any], doc: str) -> str:
    """One benchmark: what it claims, what came of it, and where and how it was measured."""
    name, machine = result["name"], result["machine"]
    arguments = " ".join(f"--{size.replace('_', '-')} {value}" for size, value in result["sizes"].items())
    versions = ", ".join(f"{package} {version}" for package, version in machine["versions"].items())
    return f"""## {name}

{doc.strip()}

{table(result["figures"])}

![{name}](benchmarks/{name}.svg)

`python -m benchmarks.{name} {arguments}`: {result["took_s"]:.0f} s on {machine["cores"]} cores of {machine["cpu"]},
{machine["memory_gb"]} GB, Linux {machine["kernel"]}; load average before it {machine["load_average"]};
revision {machine["revision"]}; {versions}.
"""
