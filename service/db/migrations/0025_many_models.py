"""Workers may serve any number of models, such as LoRA adapters."""

from typing import Any

SCHEMA = """
-- A row of a B-tree has room for some 2,700 bytes; this index keeps a hash of the names.
ALTER TABLE pools ADD CONSTRAINT pools_of_models EXCLUDE USING hash (models WITH =);
ALTER TABLE pools DROP CONSTRAINT pools_models_key;
"""


def up(migrator: Any, db: Any) -> None:
    """Keeps pools unique by another index. Programs of before name neither."""
    db.execute_sql(SCHEMA)
