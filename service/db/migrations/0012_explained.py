"""Cached and reasoning tokens of batches; indexes of failed results, by both orders."""

from typing import Any

SCHEMA = """
ALTER TABLE batches ADD COLUMN cached_tokens bigint NOT NULL DEFAULT 0;
ALTER TABLE batches ADD COLUMN reasoning_tokens bigint NOT NULL DEFAULT 0;
-- Costs nothing for what succeeds.
CREATE INDEX results_failed ON results (batch_id, sequence) WHERE (status_code BETWEEN 200 AND 299) IS NOT TRUE;
CREATE INDEX results_failed_by_index ON results (batch_id, index)
    WHERE (status_code BETWEEN 200 AND 299) IS NOT TRUE;
"""


def up(migrator: Any, db: Any) -> None:
    """Adds them. Building the indexes reads all stored results."""
    db.execute_sql(SCHEMA)
