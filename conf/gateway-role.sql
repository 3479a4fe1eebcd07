-- A role for the gateway and for OpenAI's API (http) with the rights that they need and no more: read everything; add
-- batches and files, change the state of a batch, delete batches, files and what belongs to them, add up tenants' tokens,
-- keep the queue in order, say which gateways there are and which workers they reach, give orders about hosts, deliver
-- webhooks. It can change neither results, requests, heartbeats or the audit log nor the schema.
--
-- Run as the owner of the schema after the server's first start, and again after each upgrade:
--
--   psql "$DATABASE_URL" -v ON_ERROR_STOP=1 -f conf/gateway-role.sql
--   psql "$DATABASE_URL" -c '\password vllm_batch_gateway'
--
-- The schema is the one in which our tables are for DATABASE_URL: the first of its search_path. The role gets it as its
-- own search_path in this database, unless its URL or `options` say otherwise.
--
-- Then set BATCH_GATEWAY_DATABASE_URL=postgresql://vllm_batch_gateway:PASSWORD@host/database for both.

-- All or nothing: gateways that run have their rights all the time, also if the schema is of a version before this file.
BEGIN;

DO $$
BEGIN
    IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'vllm_batch_gateway') THEN
        CREATE ROLE vllm_batch_gateway LOGIN;
    END IF;
END $$;

SELECT current_schema() AS schema, current_database() AS database \gset
ALTER ROLE vllm_batch_gateway IN DATABASE :"database" SET search_path TO :"schema";

REVOKE ALL ON ALL TABLES IN SCHEMA :"schema" FROM vllm_batch_gateway;
GRANT USAGE ON SCHEMA :"schema" TO vllm_batch_gateway;
GRANT SELECT ON ALL TABLES IN SCHEMA :"schema" TO vllm_batch_gateway;
ALTER DEFAULT PRIVILEGES IN SCHEMA :"schema" GRANT SELECT ON TABLES TO vllm_batch_gateway;

GRANT USAGE ON SEQUENCE batches_id_seq TO vllm_batch_gateway;
GRANT INSERT, DELETE, UPDATE (state, end_time, cancel_time, failed, is_counted) ON batches TO vllm_batch_gateway;
GRANT INSERT, UPDATE ON tenants TO vllm_batch_gateway;
GRANT INSERT, DELETE ON requests, results, chunks, purges TO vllm_batch_gateway;
GRANT USAGE ON SEQUENCE file_ids TO vllm_batch_gateway;
GRANT INSERT, UPDATE, DELETE ON files, file_parts TO vllm_batch_gateway;
GRANT INSERT, DELETE ON file_pieces, gone_files TO vllm_batch_gateway;
GRANT INSERT ON file_batches, output_pages TO vllm_batch_gateway;
GRANT UPDATE (is_measured) ON file_batches TO vllm_batch_gateway;
GRANT INSERT, UPDATE (is_deleted) ON output_files TO vllm_batch_gateway;
-- SELECT FOR UPDATE needs the right to update at least one column: these are never written.
GRANT UPDATE (priority) ON chunks TO vllm_batch_gateway;
GRANT UPDATE (create_time) ON purges TO vllm_batch_gateway;
GRANT INSERT ON pools, queue, queue_changes TO vllm_batch_gateway;
GRANT INSERT, UPDATE, DELETE ON tenant_weights TO vllm_batch_gateway;
-- What it sees of workers: alone it ends no lease.
GRANT INSERT, UPDATE ON losses TO vllm_batch_gateway;
GRANT INSERT, DELETE ON urgent_batches TO vllm_batch_gateway;
GRANT INSERT, UPDATE, DELETE ON webhook_deliveries TO vllm_batch_gateway;
GRANT INSERT, UPDATE, DELETE ON servers, hosts TO vllm_batch_gateway;
-- They add to the audit log what was ordered, and remove what is stored about hosts that are gone, and no more.
GRANT EXECUTE ON FUNCTION note_of_host, forget_host TO vllm_batch_gateway;
-- The page: sessions, and orders that the watchdogs take and record.
GRANT INSERT, DELETE ON page_sessions TO vllm_batch_gateway;
GRANT INSERT ON recovery_orders TO vllm_batch_gateway;

COMMIT;
