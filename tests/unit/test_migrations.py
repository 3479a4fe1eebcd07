"""The rule for migrations: they expand, or say what a program must know to work without what they remove."""

import importlib.util
import re
from pathlib import Path

import pytest

from service.db import schema

# Applied before the rule was made, when all hosts were stopped for an upgrade.
FIRST_RULED = 15
# What programs that do not know the migration may still need, or would not write.
REMOVES = re.compile(
    r"\bDROP\s+(?:TABLE|COLUMN|VIEW|SEQUENCE|FUNCTION|TYPE|SCHEMA)\b"
    r"|\bRENAME\b|\bALTER\s+COLUMN\s+\w+\s+(?:SET\s+DATA\s+)?TYPE\b|\bSET\s+NOT\s+NULL\b|\bDROP\s+DEFAULT\b|\bTRUNCATE\b",
    re.IGNORECASE,
)
ADDED = re.compile(r"\bADD\s+COLUMN\s+(?:IF\s+NOT\s+EXISTS\s+)?(\w+)([^;,]*)", re.IGNORECASE)
CHECKS = re.compile(r"\bADD\s+(?:CONSTRAINT\s+\w+\s+)?(?:CHECK|UNIQUE|FOREIGN\s+KEY|PRIMARY\s+KEY)\b", re.IGNORECASE)
DROPPED = re.compile(r"\bDROP\s+CONSTRAINT\s+(?:IF\s+EXISTS\s+)?(\w+)", re.IGNORECASE)
RENEWED = re.compile(r"\bADD\s+CONSTRAINT\s+(\w+)", re.IGNORECASE)


def wrong(sql: str) -> list[str]:
    """What an expansion may not do: old programs would fail on the schema, or could not write to it."""
    sql = re.sub(r"--[^\n]*", "", sql)
    found = [match.group(0) for match in REMOVES.finditer(sql)]
    for name, rest in ADDED.findall(sql):
        if re.search(r"NOT\s+NULL", rest, re.IGNORECASE) and "DEFAULT" not in rest.upper():
            found.append(f"ADD COLUMN {name} NOT NULL without DEFAULT")
    # A check that takes the place of one of the same name is for a wider one; the reader judges that.
    if len(CHECKS.findall(sql)) > len(set(DROPPED.findall(sql)) & set(RENEWED.findall(sql))):
        found.append("a new constraint on a table that old programs write to")
    return found


def ruled() -> list[Path]:
    return [path for path in sorted(schema.MIGRATIONS.glob("[0-9]*.py")) if int(path.name[:4]) >= FIRST_RULED]


@pytest.mark.parametrize("path", ruled(), ids=lambda path: path.stem)
def test_a_migration_expands_or_says_what_it_needs(path: Path) -> None:
    """A migration without NEEDS removes nothing; one with NEEDS asks for a migration before its own."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    needs = getattr(module, "NEEDS", None)
    if needs is None:
        assert wrong(path.read_text()) == []
    else:
        # Expand, then contract in the next version: what reports its version at all, and knows the expansion.
        assert FIRST_RULED <= needs < int(path.name[:4])


@pytest.mark.parametrize(
    ("sql", "is_allowed"),
    [
        ("CREATE TABLE a (id int CHECK (id > 0)); CREATE INDEX ON b (c); -- DROP TABLE x", True),
        ("ALTER TABLE a ADD COLUMN b int NOT NULL DEFAULT 0", True),
        ("ALTER TABLE a DROP CONSTRAINT c; ALTER TABLE a ADD CONSTRAINT c CHECK (x IN (1, 2))", True),
        ("ALTER TABLE a ADD COLUMN b int NOT NULL", False),
        ("ALTER TABLE a DROP COLUMN b", False),
        ("ALTER TABLE a RENAME COLUMN b TO c", False),
        ("ALTER TABLE a ALTER COLUMN b TYPE bigint", False),
        ("ALTER TABLE a ALTER COLUMN b SET NOT NULL", False),
        ("ALTER TABLE a ADD CONSTRAINT c CHECK (x > 1)", False),
        ("DROP TABLE a", False),
    ],
)
def test_what_the_rule_finds(sql: str, is_allowed: bool) -> None:
    """The rule accepts what only adds, and finds what old programs could not work with."""
    assert (wrong(sql) == []) is is_allowed


def test_numbers_of_migrations_are_given_once() -> None:
    """Two migrations never have the same number: the number of the last is the version of the schema."""
    numbers = [int(path.name[:4]) for path in schema.MIGRATIONS.glob("[0-9]*.py")]
    assert len(numbers) == len(set(numbers))
    assert schema.known() == max(numbers)
