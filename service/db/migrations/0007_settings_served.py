"""The settings that a worker runs with, and those that it was last ready with."""

from typing import Any

SCHEMA = """
-- Fingerprints of the settings.
ALTER TABLE heartbeats ADD COLUMN settings text NOT NULL DEFAULT '';
ALTER TABLE heartbeats ADD COLUMN served_settings text NOT NULL DEFAULT '';
ALTER TABLE recovery_events DROP CONSTRAINT recovery_events_kind_check;
ALTER TABLE recovery_events ADD CONSTRAINT recovery_events_kind_check
    CHECK (kind IN ('restart', 'gave_up', 'give_up_ended', 'paused', 'resumed', 'budget_reset', 'verdict'));
"""


def up(migrator: Any, db: Any) -> None:
    """Adds the columns."""
    db.execute_sql(SCHEMA)
