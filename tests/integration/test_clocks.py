"""Postgres' clock is set in mid-batch: no lease and no result is lost."""

import psycopg2
import pytest

from service.database_url import parse
from tests.support.batches import lines, ready, run_sql
from tests.support.servers import Stack
from tests.support.waiting import until
from vllm_batch import Client
from vllm_batch.v1 import batch_service_pb2 as pb

COUNT = 1500
# With this search_path, statements find these functions before Postgres' own.
CLOCK = "CREATE TABLE clock_set (by interval NOT NULL); INSERT INTO clock_set VALUES ('0');" + "".join(
    f"CREATE FUNCTION public.{name}() RETURNS timestamptz LANGUAGE sql VOLATILE AS"
    f" $$ SELECT pg_catalog.{name}() + by FROM public.clock_set $$;"
    for name in ("clock_timestamp", "statement_timestamp", "transaction_timestamp", "now")
)


@pytest.mark.parametrize("by", ["-1 hour", pytest.param("1 hour", marks=pytest.mark.thorough)])
def test_two_workers(stack: Stack, client: Client, by: str) -> None:
    """After a jump of Postgres' clock both workers keep their leases, and each request has exactly one result."""
    name = parse(stack.database_url)["dbname"]
    run_sql(stack, CLOCK + f"ALTER DATABASE {name} SET search_path = public, pg_catalog")
    stack.gateway()
    workers = [stack.worker(name, window=50, lease_s=5) for name in ("worker", "worker2")]
    until(lambda: ready(stack) == 2, "both workers")
    stack.wait_until_accepting()
    batch = client.submit_lines(lines(COUNT, vllm_xargs={"simulate": 0.3}))
    until(lambda: client.get(batch.id).counts.completed > 100, "part of the batch")
    run_sql(stack, f"UPDATE clock_set SET by = '{by}'")
    with Client(stack.target, patience_s=60) as patient:
        *_, done = patient.watch(batch.id)
        assert (done.state, done.counts.completed) == (pb.BATCH_STATE_COMPLETED, COUNT)
        assert [result.custom_id for result in patient.results(batch.id)] == [f"c{i}" for i in range(COUNT)]
        again = patient.submit_lines(lines(3))
        *_, done = patient.watch(again.id)
        assert done.counts.completed == 3
    with psycopg2.connect(stack.database_url) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT extract(epoch FROM clock_timestamp() - pg_catalog.clock_timestamp())")
        assert abs(float((cursor.fetchone() or [0])[0])) > 3000
    for worker in workers:
        assert worker.events("expired_leases_released") == []
        assert worker.process.poll() is None
