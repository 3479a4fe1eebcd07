"""Claim: the cost of a claim does not depend on how many requests are stored.

Against: the same claim with 10 thousand requests in the same Postgres, in turns.
Target: with 10 million requests at most 1.2 times that.

One claim of one chunk with its requests, exactly as the worker does it, including the commit; released afterwards.
"""

import statistics
import time
from collections.abc import Iterator
from uuid import uuid4

from benchmarks.lib.harness import Figure, Sizes, alternate, at_most, main
from benchmarks.lib.stacks import postgres
from service.db import chunks, turns
from service.db.chunks import Holder
from service.db.connection import Database
from service.db.run_order import CHUNK_SIZE

SIZES: Sizes = {"few": (10_000, 10_000), "many": (1_000_000, 50_000), "most": (10_000_000, 200_000), "rounds": (20, 5)}
CLAIMS_A_ROUND = 50
FILL = """
INSERT INTO batches (state, digest, metadata, priority, models, total)
VALUES ('in_progress', '', '{}', 0, '{tiny}', %(count)s);
INSERT INTO requests
SELECT 1, i, 'c' || i, '/v1/chat/completions', repeat('x', 150) FROM generate_series(0, %(count)s - 1) i;
INSERT INTO chunks (batch_id, first_index, count, unfinished, priority, models)
SELECT 1, i * %(chunk)s, %(chunk)s, %(chunk)s, 0, '{tiny}' FROM generate_series(0, %(count)s / %(chunk)s - 1) i;
ANALYZE
"""


def claim_ms(database: Database) -> float:
    """Times one claim of one chunk with its requests, in milliseconds."""
    mine = Holder("w", uuid4(), 60.0)
    begin_s = time.perf_counter()
    [chunk] = database.call(chunks.claim, mine, ["tiny"], 1)
    requests = database.call(chunks.unanswered, chunk)
    took_s = time.perf_counter() - begin_s
    assert len(requests) == CHUNK_SIZE
    database.call(chunks.release, mine, [chunk.id])
    return took_s * 1000


def measure(few: int, many: int, most: int, rounds: int) -> Iterator[Figure]:
    """Claims in databases of the three sizes, in turns."""
    sizes = {"few": few, "many": many, "most": most}
    with postgres(*sizes) as databases:
        for name, database in databases.items():
            database.call(
                lambda db, count=sizes[name]: db.execute_sql(FILL, {"count": count, "chunk": CHUNK_SIZE})  # type: ignore[misc]
            )
            database.call(turns.mend)
        for database in databases.values():
            database.call(lambda db: db.execute_sql("CHECKPOINT"))

        def median_ms(database: Database) -> float:
            return statistics.median(claim_ms(database) for _ in range(CLAIMS_A_ROUND))

        values = alternate(
            rounds,
            few=lambda: median_ms(databases["few"]),
            many=lambda: median_ms(databases["many"]),
            most=lambda: median_ms(databases["most"]),
        )
    against = f"with {few:,}"
    yield Figure(f"claim with {many:,} requests", "ms", values["many"], against, values["few"], at_most("ratio", 1.2))
    yield Figure(f"claim with {most:,} requests", "ms", values["most"], against, values["few"], at_most("ratio", 1.2))


if __name__ == "__main__":
    main(__file__, __doc__, SIZES, measure)
