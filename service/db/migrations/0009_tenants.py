"""Whose each batch is; the tokens that tenants have used."""

from typing import Any

SCHEMA = """
ALTER TABLE batches
    ADD COLUMN tenant text COLLATE "C" NOT NULL DEFAULT 'default',
    -- Of all its requests, as estimated at creation; 0 for batches of before.
    ADD COLUMN estimated_tokens bigint NOT NULL DEFAULT 0,
    -- True once it has ended and its tokens are in `tenants`.
    ADD COLUMN is_counted boolean NOT NULL DEFAULT false,
    -- Programs of before name the constraint on request_id alone, which 0026 drops.
    ADD CONSTRAINT batches_tenant_request_id_key UNIQUE (tenant, request_id);
CREATE INDEX batches_by_tenant ON batches (tenant, id);
-- The open ones and the few that ended just now: what a tenant has in the queue is found without the batches of before.
CREATE INDEX batches_uncounted ON batches (tenant, id) WHERE NOT is_counted;
CREATE INDEX batches_to_count ON batches (id) WHERE NOT is_counted AND end_time IS NOT NULL;

-- Tokens of batches that have ended, also of those that were deleted since. Written once for each batch, by one process
-- at a time: with each result it would be a row for which all workers wait.
CREATE TABLE tenants (
    tenant text COLLATE "C" PRIMARY KEY,
    prompt_tokens bigint NOT NULL DEFAULT 0,
    completion_tokens bigint NOT NULL DEFAULT 0
);
"""


def up(migrator: Any, db: Any) -> None:
    """Adds them. What is there already belongs to the tenant `default`."""
    db.execute_sql(SCHEMA)
