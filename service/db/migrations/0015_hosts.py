"""Hosts: versions of their programs, gateways and OpenAI's door, orders of operators, what is lost."""

from typing import Any

SCHEMA = """
-- The version of the program that wrote the row, and the last migration that it knows; 0: it did not say.
ALTER TABLE heartbeats ADD COLUMN version text NOT NULL DEFAULT '';
ALTER TABLE heartbeats ADD COLUMN schema_version integer NOT NULL DEFAULT 0;
ALTER TABLE watchdogs ADD COLUMN version text NOT NULL DEFAULT '';
ALTER TABLE watchdogs ADD COLUMN schema_version integer NOT NULL DEFAULT 0;
-- What it knows about its host: programs, verdicts, budgets, GPUs.
ALTER TABLE watchdogs ADD COLUMN detail jsonb NOT NULL DEFAULT '{}';
-- It was stopped, and said so.
ALTER TABLE watchdogs ADD COLUMN is_ended boolean NOT NULL DEFAULT false;

-- Gateways and OpenAI's doors.
CREATE TABLE servers (
    server_id text PRIMARY KEY,
    program text NOT NULL,
    address text NOT NULL,
    pid integer NOT NULL,
    version text NOT NULL,
    schema_version integer NOT NULL,
    is_ended boolean NOT NULL DEFAULT false,
    start_time timestamptz NOT NULL,
    last_seen timestamptz NOT NULL
) WITH (fillfactor = 50);

-- Orders about hosts. Without `drain_time` none is in force.
CREATE TABLE hosts (
    name text PRIMARY KEY,
    drain_time timestamptz,
    drain_reason text NOT NULL DEFAULT ''
);

-- What other hosts have found to be gone and have reported, once: a host, a watchdog, the last host of a model.
CREATE TABLE reported_losses (
    kind text NOT NULL CHECK (kind IN ('host', 'watchdog', 'model')),
    subject text NOT NULL,
    since timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (kind, subject)
);

-- The last migration that a program must know to work with this schema; it rises with each contraction.
CREATE TABLE schema_floor (
    is_only boolean PRIMARY KEY DEFAULT true CHECK (is_only),
    oldest integer NOT NULL
);
INSERT INTO schema_floor (oldest) VALUES (0);

ALTER TABLE recovery_events DROP CONSTRAINT recovery_events_kind_check;
ALTER TABLE recovery_events ADD CONSTRAINT recovery_events_kind_check
    CHECK (kind IN ('restart', 'gave_up', 'give_up_ended', 'paused', 'resumed', 'budget_reset', 'verdict',
                    'host_lost', 'host_back', 'watchdog_lost', 'watchdog_back', 'model_lost', 'model_back',
                    'host_drained', 'host_resumed', 'host_forgotten'));

CREATE FUNCTION host_of(id text) RETURNS text LANGUAGE sql IMMUTABLE AS $$
    SELECT regexp_replace(id, ':[^:]*$', '')
$$;

-- The two below run with the rights of their owner: the gateway's role may write neither heartbeats nor the audit log,
-- and needs to do no more to them than this.
CREATE FUNCTION note_of_host(host text, what text, why text) RETURNS void LANGUAGE sql
SECURITY DEFINER AS $$
    INSERT INTO recovery_events (worker_id, kind, verdict, reason, evidence, end_time)
    SELECT host, what, '', why, '{}', clock_timestamp()
    WHERE what IN ('host_drained', 'host_resumed', 'host_forgotten')
$$;

-- Removes what is stored about a host that was not seen for `quiet_s`, and for 30 s at least. Returns false if it was.
CREATE FUNCTION forget_host(host text, quiet_s double precision) RETURNS boolean LANGUAGE plpgsql
SECURITY DEFINER AS $$
DECLARE
    since timestamptz := clock_timestamp() - make_interval(secs => greatest(quiet_s, 30));
BEGIN
    IF EXISTS (SELECT FROM heartbeats WHERE host_of(worker_id) = host AND last_seen > since)
        OR EXISTS (SELECT FROM watchdogs WHERE watchdog_id = host AND last_seen > since)
        OR EXISTS (SELECT FROM servers WHERE host_of(server_id) = host AND last_seen > since)
    THEN
        RETURN false;
    END IF;
    DELETE FROM heartbeats WHERE host_of(worker_id) = host;
    DELETE FROM watchdogs WHERE watchdog_id = host;
    DELETE FROM servers WHERE host_of(server_id) = host;
    DELETE FROM hosts WHERE name = host;
    DELETE FROM reported_losses WHERE kind IN ('host', 'watchdog') AND subject = host;
    RETURN true;
END
$$;

REVOKE EXECUTE ON FUNCTION note_of_host, forget_host FROM PUBLIC;
-- Not a schema in which a caller could have tables of these names, with triggers that would run as the owner.
DO $$
DECLARE
    path text := ' SET search_path = ' || quote_ident(current_schema()) || ', pg_temp';
BEGIN
    EXECUTE 'ALTER FUNCTION note_of_host(text, text, text)' || path;
    EXECUTE 'ALTER FUNCTION forget_host(text, double precision)' || path;
END
$$;
"""


def up(migrator: Any, db: Any) -> None:
    """Adds them."""
    db.execute_sql(SCHEMA)
