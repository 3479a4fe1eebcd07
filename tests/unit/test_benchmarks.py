"""The benchmarks: each says what it claims, and what they have in common computes what it says."""

from importlib import import_module

import pytest

from benchmarks import charts, harness, run
from benchmarks.harness import Figure, at_least, at_most


@pytest.mark.parametrize("name", run.CLAIMS)
def test_each_names_claim_and_target(name: str) -> None:
    """Every benchmark can be imported, says what is claimed, against what and to which target, and has quick sizes."""
    module = import_module(f"benchmarks.{name}")
    assert module.__doc__ is not None
    assert all(f"{word}:" in module.__doc__ for word in ("Claim", "Against", "Target"))
    assert callable(module.measure)
    assert module.SIZES
    assert all(0 < quick <= full for full, quick in module.SIZES.values())


def test_none_is_left_out_of_all() -> None:
    """`--all` runs every module that measures something."""
    # What vLLM loads into its engine needs vLLM.
    modules = {path.stem for path in (harness.ROOT / "benchmarks").glob("[a-z]*.py")} - {"counting_processor"}
    assert {name for name in modules if hasattr(import_module(f"benchmarks.{name}"), "measure")} == set(run.CLAIMS)


def test_sides_take_turns() -> None:
    """A B A B, so that what drifts on the machine is shared by both."""
    order = []

    def side(name: str, value: float) -> float:
        order.append(name)
        return value

    values = harness.alternate(2, a=lambda: side("a", 1), b=lambda: side("b", 2))
    assert order == ["a", "b", "a", "b"]
    assert values == {"a": [1, 1], "b": [2, 2]}


@pytest.mark.parametrize(("percent", "value"), [(0, 1), (50, 50), (95, 95), (99, 99), (100, 100)])
def test_percentiles(percent: float, value: float) -> None:
    """The nearest rank: always a value that was measured."""
    assert harness.percentile([*range(100, 0, -1)], percent) == value


def test_percentile_of_few() -> None:
    """The high percentiles of few values are the largest."""
    assert harness.percentile([3, 1, 2], 95) == 3
    assert harness.percentile([7], 99) == 7


def test_summary() -> None:
    """Median, extremes and every value."""
    found = harness.summary([4, 1, 3, 2])
    assert (found["median"], found["low"], found["high"], found["values"]) == (2.5, 1, 4, [4, 1, 3, 2])


def test_ratio_is_of_medians() -> None:
    """One that got out of hand on either side does not decide."""
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
    """A target is met, missed, or not to be judged."""
    assert figure.is_met is is_met


def test_table_and_chart_show_it() -> None:
    """Medians with their spread, the ratio, and what was missed, in the table; both sides in the chart."""
    figure = Figure("upload", "lines/s", [900, 1000, 1100], "<copy>", [4000], at_least("ratio", 0.5)).as_json()
    shown = harness.table([figure])
    assert (
        "| upload, lines/s | 3    | 1,000 (900 to 1,100) | <copy>  | 4,000 | 0.25  | ratio ≥ 0.50 | **no** |" in shown
    )
    drawn = charts.chart("upload", [figure])
    assert "1,000  ours" in drawn
    assert "4,000  &lt;copy&gt;" in drawn
