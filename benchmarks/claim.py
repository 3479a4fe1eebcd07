"""What a claim costs with 10 thousand and with 10 million requests waiting: `python -m benchmarks.claim`.

Both in one Postgres, alternately; a claim as the worker's, with its commit, and given back after it.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from uuid import uuid4

from service.db import chunks
from service.db.connection import Database, migrate
from tests.integration.conftest import PostgresServer

CHUNK = 100
FILL = """
INSERT INTO batches (state, digest, metadata, priority, models, total)
VALUES ('in_progress', '', '{}', 0, '{tiny}', %(count)s);
INSERT INTO requests
SELECT 1, i, 'c' || i, '/v1/chat/completions', repeat('x', 150) FROM generate_series(0, %(count)s - 1) i;
INSERT INTO chunks (batch_id, first_index, count, unfinished, priority, models)
SELECT 1, i * 100, 100, 100, 0, '{tiny}' FROM generate_series(0, %(count)s / 100 - 1) i;
ANALYZE
"""


def claim_ms(database: Database) -> float:
    """One claim of one chunk, and its requests."""
    mine = uuid4()
    begin_s = time.perf_counter()
    [chunk] = database.call(chunks.claim, "w", mine, ["tiny"], 1, 60.0)
    requests = database.call(chunks.unanswered, chunk)
    took_s = time.perf_counter() - begin_s
    assert len(requests) == CHUNK
    database.call(chunks.release, [chunk.id], mine)
    return took_s * 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--few", type=int, default=10_000)
    parser.add_argument("--many", type=int, default=10_000_000)
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="vbb-", ignore_cleanup_errors=True) as home:
        server = PostgresServer(Path(home))
        server.start()
        try:
            databases = {}
            for name, count in (("few", options.few), ("many", options.many)):
                admin = Database(server.url % "postgres", "benchmark", 3600, connections=1)
                admin._pool.connect()
                admin._pool.connection().autocommit = True
                admin._pool.cursor().execute(f"CREATE DATABASE {name}")
                admin.close()
                databases[name] = Database(server.url % name, "benchmark", 3600, connections=1)
                databases[name].call(migrate)
                databases[name].call(lambda db, count=count: db.execute_sql(FILL, {"count": count}))
            medians: dict[str, list[float]] = {"few": [], "many": []}
            for _ in range(options.rounds):
                for name, database in databases.items():
                    medians[name].append(statistics.median(claim_ms(database) for _ in range(50)))
            few, many = (statistics.median(medians[name]) for name in ("few", "many"))
            sys.stdout.write(
                f"claim with {options.few:,} requests {few:.2f} ms, with {options.many:,} {many:.2f} ms;"
                f" ratio {many / few:.2f}\n"
            )
        finally:
            server.stop()


if __name__ == "__main__":
    main()
