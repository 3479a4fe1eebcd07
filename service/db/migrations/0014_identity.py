"""Where the process behind each heartbeat runs, and until when its name is its own; whose each recovery event is."""

from typing import Any

SCHEMA = """
-- Empty and null: written by a version that did not know it.
ALTER TABLE heartbeats ADD COLUMN machine text NOT NULL DEFAULT '';
ALTER TABLE heartbeats ADD COLUMN pid_space text NOT NULL DEFAULT '';
ALTER TABLE heartbeats ADD COLUMN network text NOT NULL DEFAULT '';
ALTER TABLE heartbeats ADD COLUMN start_ticks bigint NOT NULL DEFAULT 0;
ALTER TABLE heartbeats ADD COLUMN lease_until timestamptz;

ALTER TABLE recovery_events ADD COLUMN machine text NOT NULL DEFAULT '';
-- One restart is open at a time on each machine of a name, not one on all of them.
CREATE UNIQUE INDEX recovery_events_open_by_machine ON recovery_events (worker_id, machine) WHERE outcome = 'open';
DROP INDEX recovery_events_open;
ALTER TABLE watchdogs ADD COLUMN machine text NOT NULL DEFAULT '';
"""


def up(migrator: Any, db: Any) -> None:
    """Adds them."""
    db.execute_sql(SCHEMA)
