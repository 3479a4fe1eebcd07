"""Batches that name several models: each model's chunks are an entry of the queue of their own."""

from typing import Any

SCHEMA = """
-- The model that it names; '': none, so that any worker runs it. NULL: not known, as for requests of before.
ALTER TABLE requests ADD COLUMN model text COLLATE "C";

-- `batch_id` is the entry's own id: that of its batch or, for all but the first entry of a batch, a negative number.
-- An entry is of the chunks of its batch that have its models.
ALTER TABLE queue ADD COLUMN of_batch bigint;
CREATE UNIQUE INDEX queue_by_batch ON queue (coalesce(of_batch, batch_id), models);

DROP INDEX chunks_pending;
CREATE INDEX chunks_pending ON chunks (batch_id, models, id) WHERE state = 'pending' AND deaths = 0;
"""

# As in migration 0011, for an entry of the queue. Groups of prefixes are numbered for each model. Its chunks are a
# range, ordered by all columns of the index: with two equalities Postgres may read those of all models, by their ids.
NEXT_CHUNK = """
CREATE OR REPLACE FUNCTION next_chunk(batch bigint, worker text) RETURNS SETOF chunks LANGUAGE plpgsql AS $$
DECLARE
    entry queue;
    others integer[];
BEGIN
    SELECT * INTO entry FROM queue q WHERE q.batch_id = batch;
    batch := coalesce(entry.of_batch, entry.batch_id);
    others := ARRAY(
        SELECT DISTINCT c.prefix_group FROM chunks c
        WHERE c.state = 'leased' AND c.batch_id = batch AND c.models = entry.models AND c.worker_id <> worker
          AND c.prefix_group IS NOT NULL);
    IF cardinality(others) > 0 THEN
        RETURN QUERY SELECT c.* FROM chunks c
            WHERE c.state = 'pending' AND c.id = ANY (ARRAY(
                SELECT n.id FROM (
                    SELECT p.id, p.prefix_group FROM chunks p
                    WHERE (p.batch_id, p.models) >= (batch, entry.models) AND p.state = 'pending'
                      AND (p.batch_id, p.models) <= (batch, entry.models) AND p.deaths = 0
                    ORDER BY p.batch_id, p.models, p.id LIMIT 64) n
                WHERE n.prefix_group IS NULL OR n.prefix_group <> ALL (others)))
            ORDER BY c.id LIMIT 1 FOR UPDATE SKIP LOCKED;
        IF FOUND THEN
            RETURN;
        END IF;
    END IF;
    RETURN QUERY SELECT c.* FROM chunks c
        WHERE (c.batch_id, c.models) >= (batch, entry.models) AND (c.batch_id, c.models) <= (batch, entry.models)
          AND c.state = 'pending' AND c.deaths = 0
        ORDER BY c.batch_id, c.models, c.id LIMIT 1 FOR UPDATE SKIP LOCKED;
END $$
"""

# What changes in the functions of migration 0010.
IN_TAKE_TURNS = {
    "s.id = batch.batch_id": "s.id = chunk.batch_id",
    "b.id = batch.batch_id": "b.id = chunk.batch_id",
}
# A gateway of before takes an entry for one whose batch has ended, if it does not have its batch's id.
IN_TAKE_OVER_CHANGES = {
    "ELSIF change.is_over THEN": """ELSIF change.is_over AND (batch.of_batch IS NULL OR NOT EXISTS (
            SELECT FROM batches b WHERE b.id = batch.of_batch AND b.state IN ('in_progress', 'cancelling')
        )) THEN""",
}


def up(migrator: Any, db: Any) -> None:
    """Adds them. Workers of before cut batches as they did, and all that they cut is one entry."""
    db.execute_sql(SCHEMA)
    db.execute_sql(NEXT_CHUNK)
    for name, changes in (("take_turns", IN_TAKE_TURNS), ("take_over_changes", IN_TAKE_OVER_CHANGES)):
        [definition] = db.execute_sql("SELECT pg_get_functiondef(%s::regproc)", (name,)).fetchone()
        for old, new in changes.items():
            assert definition.count(old) == 1, (name, old)
            definition = definition.replace(old, new)
        db.execute_sql(definition)
