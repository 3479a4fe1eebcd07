"""Uploads that are stored by and by: what never becomes a batch is removed when it is due."""

from typing import Any

SCHEMA = """
ALTER TABLE purges ADD COLUMN due_time timestamptz NOT NULL DEFAULT clock_timestamp();
CREATE INDEX purges_due ON purges (due_time);
"""


def up(migrator: Any, db: Any) -> None:
    """Adds when a purge is due: at once for a deleted batch."""
    db.execute_sql(SCHEMA)
