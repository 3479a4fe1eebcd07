"""A result has its request's custom_id: reading a million of them would look up as many requests."""

from typing import Any

SCHEMA = """
ALTER TABLE results ADD COLUMN custom_id text;
"""


def up(migrator: Any, db: Any) -> None:
    """Adds the column. Results of before, and those of requests that were never run, are looked up as ever."""
    db.execute_sql(SCHEMA)
