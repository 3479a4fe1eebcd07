"""The trace that created a batch, in which its requests run."""

from typing import Any


def up(migrator: Any, db: Any) -> None:
    """Adds the column."""
    db.execute_sql("ALTER TABLE batches ADD COLUMN traceparent text")
