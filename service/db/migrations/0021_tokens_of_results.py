"""The tokens of a batch up to each of its results: how fast it went of late, in tokens."""

from typing import Any

SCHEMA = """
-- NULL: the result was stored by an earlier version, or when its batch expired.
ALTER TABLE results ADD COLUMN batch_tokens bigint;
"""


def up(migrator: Any, db: Any) -> None:
    """Adds them."""
    db.execute_sql(SCHEMA)
