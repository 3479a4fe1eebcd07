-- A role for the gateway that may do what the gateway does and no more: read everything; add batches (RetryBatch),
-- change the state of a batch, remove batches and what belonged to them. It cannot change a result, a request, the
-- heartbeats or the audit log, and it cannot change the schema.
--
-- Run as the owner of the schema, once the server has run, and again after an upgrade:
--
--   psql "$DATABASE_URL" -v ON_ERROR_STOP=1 -f conf/gateway-role.sql
--   psql "$DATABASE_URL" -c '\password vllm_batch_gateway'
--
-- then set BATCH_GATEWAY_DATABASE_URL=postgresql://vllm_batch_gateway:PASSWORD@host/database for the gateway.

DO $$
BEGIN
    IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'vllm_batch_gateway') THEN
        CREATE ROLE vllm_batch_gateway LOGIN;
    END IF;
END $$;

REVOKE ALL ON ALL TABLES IN SCHEMA public FROM vllm_batch_gateway;
GRANT USAGE ON SCHEMA public TO vllm_batch_gateway;
GRANT SELECT ON ALL TABLES IN SCHEMA public TO vllm_batch_gateway;
ALTER DEFAULT PRIVILEGES IN SCHEMA public GRANT SELECT ON TABLES TO vllm_batch_gateway;

GRANT USAGE ON SEQUENCE batches_id_seq TO vllm_batch_gateway;
GRANT INSERT, DELETE, UPDATE (state, end_time, failed) ON batches TO vllm_batch_gateway;
GRANT INSERT, DELETE ON requests, results, chunks, purges TO vllm_batch_gateway;
-- For SELECT FOR UPDATE, which asks for the right to update any column: these are never written.
GRANT UPDATE (priority) ON chunks TO vllm_batch_gateway;
GRANT UPDATE (create_time) ON purges TO vllm_batch_gateway;
