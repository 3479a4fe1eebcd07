"""Files in pieces, uploads in parts; batches made from files; where the lines of output and error files are."""

from typing import Any

# No id is ever given twice, not even by a standby that took over without the last files, whose sequence begins again at
# numbers that clients know: the milliseconds since 2025 come first, then 20 bits of the sequence.
NEW_ID = """
((extract(epoch FROM clock_timestamp() - timestamptz '2025-01-01 00:00+00') * 1000)::bigint << 20)
| (nextval('file_ids') & ((1 << 20) - 1))
"""
SCHEMA = f"""
CREATE SEQUENCE file_ids;

-- `arriving`: being sent in one call. `pending`: an upload in parts. `kept`: a file. `gone`: to be removed.
CREATE TABLE files (
    id bigint PRIMARY KEY DEFAULT ({NEW_ID}),
    tenant text COLLATE "C" NOT NULL DEFAULT 'default',
    state text NOT NULL CHECK (state IN ('arriving', 'pending', 'kept', 'gone')),
    is_upload boolean NOT NULL,
    filename text NOT NULL,
    -- Of an upload that is pending: as announced.
    bytes bigint NOT NULL CHECK (bytes >= 0),
    -- How long it is kept once it is complete; null: until it is deleted.
    lifetime_s double precision,
    create_time timestamptz NOT NULL DEFAULT clock_timestamp(),
    expire_time timestamptz
);
CREATE INDEX files_kept ON files (tenant, create_time, id) WHERE state = 'kept';
CREATE INDEX files_to_expire ON files (expire_time) WHERE state <> 'gone';
CREATE INDEX files_gone ON files (id) WHERE state = 'gone';

-- A file of one call has one part. `first` is where it begins in its file; null: not a part of it yet.
CREATE TABLE file_parts (
    id bigint PRIMARY KEY DEFAULT ({NEW_ID}),
    file_id bigint NOT NULL,
    first bigint,
    bytes bigint NOT NULL DEFAULT 0,
    create_time timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE INDEX file_parts_by_file ON file_parts (file_id, first);

CREATE TABLE file_pieces (
    part_id bigint NOT NULL,
    first bigint NOT NULL,
    data bytea NOT NULL,
    PRIMARY KEY (part_id, first)
);
-- Uncompressed: to compress takes longer than to write.
ALTER TABLE file_pieces ALTER COLUMN data SET STORAGE EXTERNAL;

-- A batch whose lines are not checked yet has no requests, and one whose lines were wrong never gets any.
ALTER TABLE batches DROP CONSTRAINT batches_total_check;
ALTER TABLE batches ADD CONSTRAINT batches_total_check
    CHECK (total > 0 OR total = 0 AND state NOT IN ('in_progress', 'finalizing', 'completed')) NOT VALID;
ALTER TABLE batches ADD COLUMN cancel_time timestamptz;

-- What a batch has beside others because it was made from a file. A worker checks the file under a lease, like a chunk.
CREATE TABLE file_batches (
    batch_id bigint PRIMARY KEY REFERENCES batches ON DELETE CASCADE,
    file_id bigint NOT NULL,
    endpoint text NOT NULL,
    completion_window text NOT NULL,
    -- Of caller and content: the same again soon after is the same batch.
    create_digest bytea NOT NULL,
    output_lifetime_s double precision,
    call_id text NOT NULL,
    errors jsonb,
    begin_time timestamptz,
    worker_id text,
    incarnation uuid,
    lease_until timestamptz,
    attempts integer NOT NULL DEFAULT 0,
    -- True once it has ended and its output and error file are in `output_files`.
    is_measured boolean NOT NULL DEFAULT false
);
CREATE INDEX file_batches_unmeasured ON file_batches (batch_id) WHERE NOT is_measured;
CREATE INDEX file_batches_by_create ON file_batches (create_digest);
CREATE INDEX file_batches_by_file ON file_batches (file_id);

-- Output and error files of batches that have ended: their lines are made of the results whenever they are read.
CREATE TABLE output_files (
    batch_id bigint NOT NULL REFERENCES batches ON DELETE CASCADE,
    kind text NOT NULL CHECK (kind IN ('output', 'error')),
    bytes bigint NOT NULL,
    lines bigint NOT NULL,
    is_deleted boolean NOT NULL DEFAULT false,
    create_time timestamptz NOT NULL,
    expire_time timestamptz,
    PRIMARY KEY (batch_id, kind)
);
-- Where in the file the lines of some consecutive requests are. `large`: the bytes of the body of the one line there.
CREATE TABLE output_pages (
    batch_id bigint NOT NULL REFERENCES batches ON DELETE CASCADE,
    kind text NOT NULL,
    first bigint NOT NULL,
    bytes bigint NOT NULL,
    source text NOT NULL CHECK (source IN ('completed', 'failed', 'unanswered')),
    first_index integer NOT NULL,
    last_index integer NOT NULL,
    large bigint NOT NULL,
    PRIMARY KEY (batch_id, kind, first)
);
"""


def up(migrator: Any, db: Any) -> None:
    """Adds them."""
    db.execute_sql(SCHEMA)
