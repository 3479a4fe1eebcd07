"""docs/cases.md: each row says what happens, and names tests that exist."""

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs/cases.md").read_text()
ROWS = [line for line in TEXT.splitlines() if line.startswith("| ") and not line.startswith(("| kind", "| ---"))]
NAME = re.compile(r"`([^`]*)`")


@cache
def names_in(name: str) -> set[str]:
    """The tests in the files that end with this path; more than one file would be ambiguous."""
    found = [path for path in (ROOT / "tests").rglob("test_*.py") if f"/{path}".endswith(f"/{name}")]
    assert len(found) == 1, f"{name}: {found}"
    return set(re.findall(r"def (test_\w+)", found[0].read_text()))


def named(row: str) -> Iterator[tuple[str, str]]:
    """File and test, "" for the whole file, that the last column of a row names. A test alone is of the file before."""
    file = ""
    for name in NAME.findall(row.rsplit(" | ", 1)[1]):
        before, colons, test = name.rpartition("::")
        if not colons:
            before, test = ("", name) if not name.endswith(".py") and "/" not in name else (name, "")
        file = before if before not in ("", "…") else file
        yield file, test


def test_there_are_rows() -> None:
    """The table is read: a row has three columns."""
    assert len(ROWS) > 60
    assert all(len(re.split(r" \| ", row.strip("| "))) == 3 for row in ROWS)


@pytest.mark.parametrize("row", ROWS)
def test_tests_that_are_named_exist(row: str) -> None:
    """Whoever doubts a row can run its test."""
    if row.rsplit(" | ", 1)[1] == "the same |":
        return
    found = list(named(row))
    assert found
    for file, test in found:
        # Settings that a test runs under stand in brackets behind it.
        if not re.fullmatch(r"[A-Z_]+=\w+", test):
            assert file, row
            assert not test or test.partition("[")[0] in names_in(file), f"{file}::{test}"
