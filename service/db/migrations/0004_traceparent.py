"""The trace in which a batch was created, for its requests to run in."""

from typing import Any


def up(migrator: Any, db: Any) -> None:
    """Adds it."""
    db.execute_sql("ALTER TABLE batches ADD COLUMN traceparent text")
