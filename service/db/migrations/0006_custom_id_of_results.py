"""The custom_id in each result: without it, reading a million results looks up a million requests."""

from typing import Any

SCHEMA = """
ALTER TABLE results ADD COLUMN custom_id text;
"""


def up(migrator: Any, db: Any) -> None:
    """Adds the column. Results that lack it, such as earlier ones, still take it from their request."""
    db.execute_sql(SCHEMA)
