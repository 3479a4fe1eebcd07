"""Uploads that are stored piece by piece: rows that never become a batch are removed when due."""

from typing import Any

SCHEMA = """
ALTER TABLE purges ADD COLUMN due_time timestamptz NOT NULL DEFAULT clock_timestamp();
CREATE INDEX purges_due ON purges (due_time);
"""


def up(migrator: Any, db: Any) -> None:
    """Adds the time at which a purge is due: at once for a deleted batch."""
    db.execute_sql(SCHEMA)
