"""What tenants have in the queue and what they have used, with batches that were deleted since."""

from dataclasses import dataclass

import peewee

from service.db.batches import IN_SCOPE
from service.db.limits import QUEUED_TOKENS


@dataclass(frozen=True)
class Usage:
    """One tenant: its open batches with their requests without a result, and the tokens of all results it ever had."""

    tenant: str
    open_batches: int = 0
    queued_requests: int = 0
    queued_tokens: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


TAKE = f"""
SELECT tenant, sum(open)::bigint, sum(requests)::bigint, sum(tokens)::bigint, sum(prompt)::bigint,
       sum(completion)::bigint
FROM (
    SELECT tenant, count(*) FILTER (WHERE state IN ('validating', 'in_progress')) AS open,
           coalesce(sum(total - completed - failed) FILTER (WHERE state = 'in_progress'), 0) AS requests,
           coalesce(sum({QUEUED_TOKENS}) FILTER (WHERE state = 'in_progress'), 0) AS tokens,
           sum(prompt_tokens) AS prompt, sum(completion_tokens) AS completion
    FROM batches WHERE NOT is_counted AND {IN_SCOPE} GROUP BY tenant
    UNION ALL
    SELECT tenant, 0, 0, 0, prompt_tokens, completion_tokens FROM tenants WHERE {IN_SCOPE}
) each_part GROUP BY tenant ORDER BY tenant
"""
# The rows of `tenants` are locked in the order of their names, after those of batches.
COUNT = """
WITH ended AS MATERIALIZED (
    SELECT id, tenant, prompt_tokens, completion_tokens FROM batches
    WHERE NOT is_counted AND end_time IS NOT NULL AND (%(id)s::bigint IS NULL OR id = %(id)s)
    ORDER BY id LIMIT %(limit)s FOR UPDATE SKIP LOCKED
), added AS (
    INSERT INTO tenants (tenant, prompt_tokens, completion_tokens)
    SELECT tenant, sum(prompt_tokens), sum(completion_tokens) FROM ended GROUP BY tenant ORDER BY tenant
    ON CONFLICT (tenant) DO UPDATE SET prompt_tokens = tenants.prompt_tokens + excluded.prompt_tokens,
                                       completion_tokens = tenants.completion_tokens + excluded.completion_tokens
)
UPDATE batches SET is_counted = true WHERE id IN (SELECT id FROM ended)
"""


def take(db: peewee.PostgresqlDatabase, tenant: str | None = None) -> list[Usage]:
    """The usage of one tenant, or of all that have ever had a batch. Reads open batches and a row for each tenant."""
    return [Usage(*row) for row in db.execute_sql(TAKE, {"tenant": tenant}).fetchall()]


def count_ended(db: peewee.PostgresqlDatabase, limit: int, batch_id: int | None = None) -> int:
    """Adds the tokens of up to `limit` ended batches to those of their tenants, each batch once. Returns how many."""
    return int(db.execute_sql(COUNT, {"limit": limit, "id": batch_id}).rowcount)
