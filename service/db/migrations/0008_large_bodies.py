"""Where large bodies are kept: as bytes and uncompressed, so that a part of one is read without the rest."""

from typing import Any

SCHEMA = """
ALTER TABLE results ADD COLUMN large_body bytea;
ALTER TABLE results ALTER COLUMN large_body SET STORAGE EXTERNAL;
ALTER TABLE results DROP CONSTRAINT results_check;
-- What is there already keeps to the one before, which is stricter: it need not be read to know.
ALTER TABLE results ADD CONSTRAINT results_check
    CHECK ((status_code IS NULL) = (num_nonnulls(body, large_body) = 0) AND num_nonnulls(body, large_body) <= 1)
    NOT VALID;
"""


def up(migrator: Any, db: Any) -> None:
    """Adds the column. Earlier large bodies stay where they are and are still read, only more slowly."""
    db.execute_sql(SCHEMA)
