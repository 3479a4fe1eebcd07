"""The benchmarks: each states its claim, and their shared code computes correctly."""

from importlib import import_module
from pathlib import Path

import pytest

from benchmarks import run
from benchmarks.lib import charts, harness, page
from benchmarks.lib.harness import Figure, at_least, at_most


@pytest.mark.parametrize("name", run.CLAIMS)
def test_each_names_claim_and_target(name: str) -> None:
    """Every benchmark can be imported, states claim, alternative and target, and has sizes for quick runs."""
    module = import_module(f"benchmarks.claims.{name}")
    assert module.__doc__ is not None
    assert all(f"{word}:" in module.__doc__ for word in ("Claim", "Against", "Target"))
    assert callable(module.measure)
    assert module.SIZES
    assert all(0 < quick <= full for full, quick in module.SIZES.values())


def test_none_is_left_out_of_all() -> None:
    """`--all` runs every benchmark module."""
    modules = {path.stem for path in (harness.ROOT / "benchmarks/claims").glob("[a-z]*.py")}
    assert modules == set(run.CLAIMS)


def test_sides_take_turns() -> None:
    """Measurements alternate A B A B, so that drift of the machine affects both sides alike."""
    order = []

    def side(name: str, value: float) -> float:
        order.append(name)
        return value

    values = harness.alternate(2, a=lambda: side("a", 1), b=lambda: side("b", 2))
    assert order == ["a", "b", "a", "b"]
    assert values == {"a": [1, 1], "b": [2, 2]}


@pytest.mark.parametrize(("percent", "value"), [(0, 1), (50, 50), (95, 95), (99, 99), (100, 100)])
def test_percentiles(percent: float, value: float) -> None:
    """A percentile is the nearest rank, so it is always a measured value."""
    assert harness.percentile([*range(100, 0, -1)], percent) == value


def test_percentile_of_few() -> None:
    """High percentiles of a few values are the largest value."""
    assert harness.percentile([3, 1, 2], 95) == 3
    assert harness.percentile([7], 99) == 7


def test_summary() -> None:
    """A summary has the median, the extremes and every value."""
    found = harness.summary([4, 1, 3, 2])
    assert (found["median"], found["low"], found["high"], found["values"]) == (2.5, 1, 4, [4, 1, 3, 2])


def test_ratio_is_of_medians() -> None:
    """The ratio is that of the medians, so one outlier on either side does not decide."""
    assert Figure("f", "s", [1, 2, 300], "other", [4, 4, 0.1]).ratio == 0.5
    assert Figure("f", "s", [1]).ratio is None
    assert Figure("f", "s", [1], "other", [0]).ratio is None


@pytest.mark.parametrize(
    ("figure", "is_met"),
    [
        (Figure("f", "s", [1, 2, 3], "o", [2, 2, 2], at_least("ratio", 1.0)), True),
        (Figure("f", "s", [1, 2, 3], "o", [4, 4, 4], at_least("ratio", 0.6)), False),
        (Figure("f", "s", [1, 2, 3], "o", [4, 4, 4], at_most("ratio", 0.6)), True),
        (Figure("f", "s", [1, 2, 9], target=at_most("median", 2)), True),
        (Figure("f", "s", [1, 2, 9], target=at_most("high", 3)), False),
        (Figure("f", "s", [*range(1, 101)], target=at_most("p95", 95)), True),
        (Figure("f", "s", [*range(1, 101)], target=at_most("p99", 98)), False),
        (Figure("f", "s", [1]), None),
        (Figure("f", "s", [1], target=at_least("ratio", 1.0)), None),
    ],
)
def test_targets(figure: Figure, is_met: bool | None) -> None:
    """A target is met, missed, or cannot be judged."""
    assert figure.is_met is is_met


def test_table_and_chart_show_it() -> None:
    """The table shows medians with their spread, the ratio and missed targets; the chart shows both sides."""
    figure = Figure("upload", "lines/s", [900, 1000, 1100], "<copy>", [4000], at_least("ratio", 0.5)).as_json()
    shown = harness.table([figure])
    assert (
        "| upload, lines/s | 3    | 1,000 (900 to 1,100) | <copy>  | 4,000 | 0.25  | ratio ≥ 0.50 | **no** |" in shown
    )
    drawn = charts.chart("upload", [figure])
    assert "1,000  ours" in drawn
    assert "4,000  &lt;copy&gt;" in drawn


def test_page_keeps_what_was_not_measured_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rewriting the page without any new results leaves it unchanged."""
    (tmp_path / "docs").mkdir()
    written = (harness.ROOT / "docs/benchmarks.md").read_text()
    (tmp_path / "docs/benchmarks.md").write_text(written)
    monkeypatch.setattr(page, "ROOT", tmp_path)
    monkeypatch.setattr(page, "result_file", lambda name, is_quick: tmp_path / f"{name}.json")
    assert page.write(run.CLAIMS, is_quick=False).read_text() == written
