"""Files that name only models which are away are checked again when one of these is back."""

from typing import Any


def up(migrator: Any, db: Any) -> None:
    """Adds the models that a file which waits to be checked was found to need one of."""
    db.execute_sql("ALTER TABLE file_batches ADD COLUMN away text[]")
