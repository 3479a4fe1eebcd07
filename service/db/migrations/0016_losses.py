"""What gateways see of workers that may be lost; which requests may be in an engine; where suspects died."""

from typing import Any

SCHEMA = """
-- One row per worker's life and host that looks at it, kept up to date while its heartbeats are missing.
CREATE TABLE losses (
    incarnation uuid NOT NULL,
    -- The host of the gateway.
    seen_from text COLLATE "C" NOT NULL,
    is_reachable boolean NOT NULL,
    report_time timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (incarnation, seen_from)
) WITH (fillfactor = 50, autovacuum_vacuum_threshold = 200);

ALTER TABLE chunks
    -- How many of its requests, in the order in which they run, may be in the engine or were; NULL: not known.
    ADD COLUMN begun integer,
    -- The hosts of a suspect's deaths, each once.
    ADD COLUMN death_hosts text[] NOT NULL DEFAULT '{}',
    -- Its one death was the loss of a host.
    ADD COLUMN is_lost boolean NOT NULL DEFAULT false;
"""


def up(migrator: Any, db: Any) -> None:
    """Adds them. Workers of before write none of it."""
    db.execute_sql(SCHEMA)
