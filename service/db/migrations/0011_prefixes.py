"""The order in which the requests of a batch run: by their shared prefixes, unless the batch asks for the file's."""

from typing import Any

SCHEMA = """
ALTER TABLE batches ADD COLUMN run_order text NOT NULL DEFAULT 'prefix' CHECK (run_order IN ('prefix', 'input'));

-- Both are NULL for requests of before, and `prefix` for those that it would not help.
ALTER TABLE requests
    -- Equal beginnings of prompts have equal leading bytes: see service/worker/prefixes.py.
    ADD COLUMN prefix bytea,
    ADD COLUMN estimated_tokens integer;
-- Hashes do not compress.
ALTER TABLE requests ALTER COLUMN prefix SET STORAGE EXTERNAL;

ALTER TABLE chunks
    -- The requests in the order in which they run; NULL: `count` of them from `first_index` on.
    ADD COLUMN indexes integer[],
    -- Chunks of a batch with the same number share a prefix; NULL: with no other.
    ADD COLUMN prefix_group integer,
    -- Of all its requests; NULL for chunks of before.
    ADD COLUMN estimated_tokens bigint,
    ADD CONSTRAINT chunks_indexes_check CHECK (cardinality(indexes) = count);
"""

# Called by `take_turns`, for the next chunk of a batch. A prefix is cached by the engine that computed it: a worker
# passes over groups that others have begun, if there is something else among the next chunks. It never waits for that.
NEXT_CHUNK = """
CREATE OR REPLACE FUNCTION next_chunk(batch bigint, worker text) RETURNS SETOF chunks LANGUAGE plpgsql AS $$
DECLARE
    others integer[] := ARRAY(
        SELECT DISTINCT c.prefix_group FROM chunks c
        WHERE c.state = 'leased' AND c.batch_id = batch AND c.worker_id <> worker AND c.prefix_group IS NOT NULL);
BEGIN
    IF cardinality(others) > 0 THEN
        RETURN QUERY SELECT c.* FROM chunks c
            WHERE c.state = 'pending' AND c.id = ANY (ARRAY(
                SELECT n.id FROM (
                    SELECT p.id, p.prefix_group FROM chunks p
                    WHERE p.batch_id = batch AND p.state = 'pending' AND p.deaths = 0 ORDER BY p.id LIMIT 64) n
                WHERE n.prefix_group IS NULL OR n.prefix_group <> ALL (others)))
            ORDER BY c.id LIMIT 1 FOR UPDATE SKIP LOCKED;
        IF FOUND THEN
            RETURN;
        END IF;
    END IF;
    RETURN QUERY SELECT c.* FROM chunks c WHERE c.batch_id = batch AND c.state = 'pending' AND c.deaths = 0
        ORDER BY c.id LIMIT 1 FOR UPDATE SKIP LOCKED;
END $$
"""


def up(migrator: Any, db: Any) -> None:
    """Adds the columns. Chunks of before stay as they were cut, and staged uploads run in the order of their file."""
    db.execute_sql(SCHEMA)
    db.execute_sql(NEXT_CHUNK)
