"""Events that are known before Postgres has them; the heartbeat of watchdogs."""

from typing import Any

SCHEMA = """
-- What a watchdog wrote into its journal while Postgres was away is merged once, however often it tries.
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
