"""Suspects of an engine's death as chunks of their own; deleted batches whose rows are still to be removed."""

from typing import Any

SCHEMA = """
-- How many times an engine died with the chunk in it; usually 0. With 1 or more the chunk holds one request.
ALTER TABLE chunks ADD COLUMN deaths integer NOT NULL DEFAULT 0 CHECK (deaths >= 0);
DROP INDEX chunks_pending;
CREATE INDEX chunks_pending ON chunks (priority DESC, id) WHERE state = 'pending' AND deaths = 0;
CREATE INDEX chunks_suspect ON chunks (deaths DESC, id) WHERE state <> 'done' AND deaths > 0;

-- A deleted batch is gone at once; its requests and results are removed in slices later.
CREATE TABLE purges (batch_id bigint PRIMARY KEY, create_time timestamptz NOT NULL DEFAULT clock_timestamp());
CREATE INDEX batches_to_expire ON batches (expire_time) WHERE state = 'in_progress' AND expire_time IS NOT NULL;
CREATE INDEX batches_ended ON batches (end_time) WHERE end_time IS NOT NULL;
"""


def up(migrator: Any, db: Any) -> None:
    """Adds both."""
    db.execute_sql(SCHEMA)
