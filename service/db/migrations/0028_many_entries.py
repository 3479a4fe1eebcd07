"""Claims cost the same however many entries of the queue wait: those pulled forward, those of one chunk, changes."""

from typing import Any

SCHEMA = "CREATE INDEX urgent_batches_by_rank ON urgent_batches (pool_id, rank)"

# What changes in `take_turns` of migration 0010.
IN_TAKE_TURNS = {
    # From the first that is pulled forward on. A join may begin with the entries that wait, which are as many as there
    # are batches and models: of a table that is empty, as this one mostly is, Postgres keeps no statistics.
    """FROM urgent_batches u JOIN queue q ON q.batch_id = u.batch_id
            WHERE""": """FROM urgent_batches u
            CROSS JOIN LATERAL (SELECT * FROM queue e WHERE e.batch_id = u.batch_id OFFSET 0) q
            WHERE""",
    # An entry whose only chunk is claimed would have another turn to find that out.
    "UPDATE queue q SET in_flight = q.in_flight + charge, turn = pool.turns + 1 WHERE": """UPDATE queue q SET
            in_flight = q.in_flight + charge,
            turn = pool.turns + 1,
            waits = q.waits AND chunk.unfinished < q.total
        WHERE""",
}

# As in migrations 0010 and 0023, but what entries of one tenant add up to is one change of the tenant.
TAKE_OVER_CHANGES = """
CREATE OR REPLACE FUNCTION take_over_changes(pool bigint) RETURNS bigint LANGUAGE plpgsql
SET enable_seqscan = off SET enable_bitmapscan = off SET enable_sort = off AS $$
DECLARE
    change record;
    batch queue;
    owner pool_tenants;
    level double precision;
    all_tokens bigint := 0;
    -- Of the tenant's changes so far; `highest`: of what begins to wait, NULL: nothing does.
    used bigint := 0;
    estimated double precision := 0;
    charged bigint := 0;
    highest integer;
BEGIN
    FOR change IN
        WITH taken AS (
            DELETE FROM queue_changes
            WHERE id IN (SELECT c.id FROM queue_changes c WHERE c.pool_id = pool ORDER BY c.id LIMIT 1000)
            RETURNING *
        )
        SELECT t.batch_id, t.tenant, sum(t.tokens)::bigint AS tokens, sum(t.expected) AS expected,
               sum(t.in_flight)::bigint AS in_flight, bool_or(t.has_pending) AS has_pending,
               bool_or(t.is_over) AS is_over,
               lead(t.tenant) OVER (ORDER BY t.tenant, t.batch_id) IS DISTINCT FROM t.tenant AS is_last
        FROM taken t GROUP BY t.tenant, t.batch_id ORDER BY t.tenant, t.batch_id
    LOOP
        SELECT * INTO batch FROM queue q WHERE q.batch_id = change.batch_id;
        IF NOT FOUND THEN
            -- All that was in flight was settled when it ended.
            change.in_flight := 0;
            change.has_pending := false;
        -- A gateway of before 0023 takes an entry for one whose batch has ended, if it does not have its batch's id.
        ELSIF change.is_over AND (batch.of_batch IS NULL OR NOT EXISTS (
            SELECT FROM batches b WHERE b.id = batch.of_batch AND b.state IN ('in_progress', 'cancelling')
        )) THEN
            change.in_flight := -batch.in_flight;
            change.has_pending := false;
            DELETE FROM queue q WHERE q.batch_id = change.batch_id;
        ELSE
            level := batch.virtual;
            IF change.has_pending AND NOT batch.waits THEN
                -- Begins beside the others of its tenant: it has saved up nothing while it did not wait.
                SELECT q.virtual INTO level FROM queue q
                WHERE q.pool_id = pool AND q.tenant = batch.tenant AND q.waits AND q.priority = batch.priority
                ORDER BY q.place, q.turn LIMIT 1;
                IF NOT FOUND THEN
                    SELECT t.batch_virtual INTO level FROM pool_tenants t
                    WHERE t.pool_id = pool AND t.tenant = batch.tenant;
                END IF;
            END IF;
            UPDATE queue q SET
                waits = q.waits OR change.has_pending,
                virtual = greatest(q.virtual, level) + change.tokens,
                in_flight = greatest(0, q.in_flight + change.in_flight),
                tokens = q.tokens + change.tokens,
                expected = q.expected + change.expected
            WHERE q.batch_id = change.batch_id;
        END IF;
        used := used + change.tokens;
        estimated := estimated + change.expected;
        charged := charged + change.in_flight;
        highest := CASE WHEN change.has_pending THEN greatest(highest, batch.priority) ELSE highest END;
        CONTINUE WHEN NOT change.is_last;

        SELECT * INTO owner FROM pool_tenants t WHERE t.pool_id = pool AND t.tenant = change.tenant;
        IF NOT FOUND THEN
            INSERT INTO pool_tenants (pool_id, tenant, priority, weight, virtual)
            VALUES (pool, change.tenant, 0, weight_of(change.tenant), 0) RETURNING * INTO owner;
        END IF;
        level := owner.virtual;
        IF highest IS NOT NULL AND NOT owner.waits THEN
            SELECT t.virtual INTO level FROM pool_tenants t
            WHERE t.pool_id = pool AND t.waits AND t.priority = highest ORDER BY t.place, t.turn LIMIT 1;
            IF NOT FOUND THEN
                SELECT t.virtual INTO level FROM pool_tenants t
                WHERE t.pool_id = pool AND t.waits ORDER BY t.priority DESC, t.place, t.turn LIMIT 1;
            END IF;
            IF NOT FOUND THEN
                SELECT p.virtual INTO level FROM pools p WHERE p.id = pool;
            END IF;
        END IF;
        UPDATE pool_tenants t SET
            waits = t.waits OR highest IS NOT NULL,
            priority = CASE WHEN highest IS NULL THEN t.priority
                            WHEN t.waits THEN greatest(t.priority, highest) ELSE highest END,
            virtual = greatest(t.virtual, level) + used / t.weight,
            actual = CASE WHEN estimated = 0 THEN t.actual ELSE 0.9 * t.actual + used END,
            expected = CASE WHEN estimated = 0 THEN t.expected ELSE 0.9 * t.expected + estimated END,
            in_flight = greatest(0, t.in_flight + charged)
        WHERE t.pool_id = pool AND t.tenant = change.tenant;
        all_tokens := all_tokens + used;
        used := 0;
        estimated := 0;
        charged := 0;
        highest := NULL;
    END LOOP;
    RETURN all_tokens;
END $$
"""


def up(migrator: Any, db: Any) -> None:
    """Replaces the functions. Programs of before call them as they did."""
    db.execute_sql(SCHEMA)
    db.execute_sql(TAKE_OVER_CHANGES)
    [definition] = db.execute_sql("SELECT pg_get_functiondef('take_turns'::regproc)").fetchone()
    for old, new in IN_TAKE_TURNS.items():
        assert definition.count(old) == 1, old
        definition = definition.replace(old, new)
    db.execute_sql(definition)
