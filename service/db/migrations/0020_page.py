"""What the page needs: sessions of those who signed in, and orders for watchdogs."""

from typing import Any

SCHEMA = """
-- `digest` is the SHA-256 of the cookie, `token_digest` that of the token that it was got with.
CREATE TABLE page_sessions (
    digest bytea PRIMARY KEY,
    token_digest bytea NOT NULL,
    create_time timestamptz NOT NULL DEFAULT clock_timestamp(),
    expire_time timestamptz NOT NULL
);
CREATE INDEX page_sessions_to_expire ON page_sessions (expire_time);

-- Each is deleted by the watchdog that has recorded it.
CREATE TABLE recovery_orders (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    worker_id text NOT NULL,
    kind text NOT NULL CHECK (kind IN ('paused', 'resumed', 'budget_reset')),
    reason text NOT NULL,
    lasts_s double precision NOT NULL,
    create_time timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE INDEX recovery_orders_by_worker ON recovery_orders (worker_id);
"""


def up(migrator: Any, db: Any) -> None:
    """Adds them."""
    db.execute_sql(SCHEMA)
