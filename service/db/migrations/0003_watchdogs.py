"""A key for events that exist before Postgres has them; the heartbeats of watchdogs."""

from typing import Any

SCHEMA = """
-- Events that a watchdog wrote to its journal while Postgres was away are merged once, however often it tries.
ALTER TABLE recovery_events ADD COLUMN key uuid NOT NULL DEFAULT gen_random_uuid();
CREATE UNIQUE INDEX recovery_events_by_key ON recovery_events (key);

CREATE TABLE watchdogs (
    watchdog_id text PRIMARY KEY,
    pid integer NOT NULL,
    start_time timestamptz NOT NULL,
    last_seen timestamptz NOT NULL
) WITH (fillfactor = 50);
"""


def up(migrator: Any, db: Any) -> None:
    """Adds both."""
    db.execute_sql(SCHEMA)
