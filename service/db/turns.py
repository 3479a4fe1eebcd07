"""The queue of open batches: what enters it, what is pulled forward in it, and the weights of tenants.

Claims (`chunks.claim`) take turns by it. Migration 0010 has its tables, and the function that takes turns.
"""

from collections import defaultdict
from collections.abc import Mapping

import peewee
from psycopg2.extras import execute_values

from service import turns
from service.db.batches import NEW_ID
from service.db.chunks import HAS_PENDING
from service.turns import Expiring

# A pool that nobody has claimed from for so long has no workers.
ALIVE_S = 60.0
ESTIMATE = 500  # tokens per request, where nothing was estimated


# What a batch is in the queue: one entry, or one for each model that its chunks are of.
ENTRIES = """
SELECT models, total::bigint AS requests, estimated_tokens::float8 AS estimated FROM batches
WHERE id = %(id)s AND cardinality(models) < 2
UNION ALL
SELECT c.models, sum(c.count), sum(c.estimated_tokens) FROM batches b JOIN chunks c ON c.batch_id = b.id
WHERE b.id = %(id)s AND cardinality(b.models) > 1 GROUP BY c.models
"""

# Entries of the queue that have chunks which wait, of which it does not know.
UNNOTICED = f"""
SELECT pool_id, batch_id, tenant, true FROM queue q
WHERE NOT waits AND {HAS_PENDING}
  AND NOT EXISTS (SELECT FROM queue_changes c WHERE c.batch_id = q.batch_id AND c.has_pending)
"""


def enqueue(db: peewee.PostgresqlDatabase, batch_id: int) -> None:
    """Puts a new batch into the queue: the chunks of each model into the smallest pool of live workers with it."""
    db.execute_sql(
        f"""
        INSERT INTO pools (models)
        SELECT models FROM ({ENTRIES}) e
        WHERE NOT EXISTS (SELECT FROM pools p WHERE p.models @> e.models)
        ON CONFLICT DO NOTHING
        """,
        {"id": batch_id},
    )
    db.execute_sql(
        f"""
        WITH queued AS (
            INSERT INTO queue (batch_id, of_batch, pool_id, tenant, models, priority, expire_time, total, estimate,
                               tokens, expected)
            SELECT CASE WHEN e.number = 1 THEN b.id ELSE -{NEW_ID} END,
                   CASE WHEN e.number > 1 THEN b.id END, p.id, b.tenant, e.models, b.priority, b.expire_time,
                   e.requests, e.estimate, (b.prompt_tokens + b.completion_tokens) * e.requests / b.total,
                   e.estimate * (b.completed + b.failed) * e.requests / b.total
            FROM batches b CROSS JOIN LATERAL (
                SELECT models, requests, row_number() OVER (ORDER BY models) AS number,
                       coalesce(nullif(estimated / requests, 0), nullif(b.estimated_tokens::float8 / b.total, 0),
                                %(estimate)s) AS estimate
                FROM ({ENTRIES}) e) e
            CROSS JOIN LATERAL (
                SELECT id FROM pools WHERE pools.models @> e.models
                ORDER BY last_turn < clock_timestamp() - make_interval(secs => %(alive)s), cardinality(pools.models), id
                LIMIT 1) p
            WHERE b.id = %(id)s
            RETURNING batch_id, pool_id, tenant
        )
        INSERT INTO queue_changes (pool_id, batch_id, tenant, has_pending)
        SELECT pool_id, batch_id, tenant, true FROM queued
        """,
        {"id": batch_id, "alive": ALIVE_S, "estimate": ESTIMATE},
    )


def mend(db: peewee.PostgresqlDatabase) -> None:
    """Removes batches from the queue that have ended, and puts back what is missing in it.

    A batch is missing after a worker of an earlier version has stored it; pending chunks, after a transaction that had
    locked them was rolled back.
    """
    db.execute_sql(
        """
        INSERT INTO queue_changes (pool_id, batch_id, tenant, is_over)
        SELECT q.pool_id, q.batch_id, q.tenant, true
        FROM queue q LEFT JOIN batches b ON b.id = coalesce(q.of_batch, q.batch_id)
                                      AND b.state IN ('in_progress', 'cancelling')
        WHERE b.id IS NULL AND NOT EXISTS (SELECT FROM queue_changes c WHERE c.batch_id = q.batch_id AND c.is_over)
        """
    )
    db.execute_sql(f"INSERT INTO queue_changes (pool_id, batch_id, tenant, has_pending) {UNNOTICED}")
    for (batch_id,) in db.execute_sql(
        "SELECT id FROM batches b WHERE state = 'in_progress'"
        " AND NOT EXISTS (SELECT FROM queue q WHERE q.batch_id = b.id) ORDER BY id"
    ).fetchall():
        enqueue(db, batch_id)


def settle_abandoned(db: peewee.PostgresqlDatabase) -> None:
    """Takes batches that have ended out of a pool that nobody claims from, as claims would: else they would seem to
    wait there for ever, for models that are gone. One pool at a time, and none that is locked.

    It may have workers all the same, whose requests take long: what these used counts for the pool's rate.
    """
    db.execute_sql(
        """
        UPDATE pools SET rate_tokens = rate_tokens + take_over_changes(id) WHERE id = (
            SELECT p.id FROM pools p
            WHERE last_turn < clock_timestamp() - make_interval(secs => %s)
              AND EXISTS (SELECT FROM queue_changes c WHERE c.pool_id = p.id AND c.is_over)
            LIMIT 1 FOR UPDATE SKIP LOCKED)
        """,
        (ALIVE_S,),
    )


def pull_forward(db: peewee.PostgresqlDatabase) -> list[int]:
    """Decides which entries of the queue are pulled forward from now on. Returns the batches that were not before."""
    before = {row[0] for row in db.execute_sql("SELECT batch_id FROM urgent_batches").fetchall()}
    rows = db.execute_sql(
        """
        SELECT q.pool_id, q.priority, q.batch_id, coalesce(q.of_batch, q.batch_id),
               greatest(0, extract(epoch FROM q.expire_time - clock_timestamp()))::float8,
               greatest(0, q.total * q.estimate - q.expected) / (q.expected + 10 * q.estimate)
               * (q.tokens + 10 * q.estimate * coalesce(t.actual / nullif(t.expected, 0), 1)) / p.rate,
               (SELECT sum(a.in_flight) FROM pool_tenants a WHERE a.pool_id = p.id)::float8 / p.rate
        FROM queue q JOIN pools p ON p.id = q.pool_id
        JOIN pool_tenants t ON t.pool_id = q.pool_id AND t.tenant = q.tenant
        WHERE q.expire_time IS NOT NULL AND q.waits AND p.rate > 0
        """
    ).fetchall()
    expiring: dict[tuple[int, int], list[Expiring]] = defaultdict(list)
    busy_s = {}
    batch_of = {}
    for pool_id, priority, entry_id, batch_of[entry_id], left_s, needs_s, pool_busy_s in rows:
        expiring[pool_id, priority].append(Expiring(entry_id, left_s, needs_s))
        busy_s[pool_id] = pool_busy_s or 0.0
    pulled = [
        (entry_id, pool_id, rank)
        for (pool_id, priority), entries in expiring.items()
        for rank, entry_id in enumerate(turns.pulled_forward(entries, busy_s[pool_id]))
    ]
    if before or pulled:
        with db.atomic():
            db.execute_sql("DELETE FROM urgent_batches")
            if pulled:
                with db.cursor() as cursor:
                    execute_values(cursor, "INSERT INTO urgent_batches (batch_id, pool_id, rank) VALUES %s", pulled)
    return [batch_of[entry_id] for entry_id, _, _ in pulled if entry_id not in before]


def set_weights(db: peewee.PostgresqlDatabase, weights: Mapping[str, float], otherwise: float) -> None:
    """Sets the weights of tenants, and the one of all others. A tenant's takes effect at its next turn."""
    wanted = {**weights, "": otherwise}
    if wanted == dict(db.execute_sql("SELECT tenant, weight FROM tenant_weights").fetchall()):
        return
    with db.atomic(), db.cursor() as cursor:
        db.execute_sql("DELETE FROM tenant_weights WHERE tenant <> ALL(%s)", (list(wanted),))
        execute_values(
            cursor,
            "INSERT INTO tenant_weights (tenant, weight) VALUES %s ON CONFLICT (tenant) DO UPDATE"
            " SET weight = EXCLUDED.weight",
            sorted(wanted.items()),
        )
