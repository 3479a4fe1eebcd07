"""Where files that were removed stood in the list of files, for clients that list on after one of them."""

from typing import Any

SCHEMA = """
CREATE TABLE gone_files (
    kind text NOT NULL CHECK (kind IN ('input', 'output', 'error')),
    number bigint NOT NULL,
    tenant text COLLATE "C" NOT NULL,
    create_time timestamptz NOT NULL,
    gone_time timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (kind, number)
);
CREATE INDEX gone_files_by_time ON gone_files (gone_time);
"""


def up(migrator: Any, db: Any) -> None:
    """Adds the table."""
    db.execute_sql(SCHEMA)
