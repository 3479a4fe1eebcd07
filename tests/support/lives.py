"""Restarting a process that died at a failpoint, and the invariants of the database afterwards."""

import psycopg2

from tests.support.servers import Server, Stack
from tests.support.waiting import until

# Violations in a database at rest: each query must return nothing.
INVARIANTS = {
    "a completed batch without all its results": """
        SELECT b.id FROM batches b WHERE state IN ('completed', 'expired')
        AND total <> (SELECT count(*) FROM results r WHERE r.batch_id = b.id)""",
    "counts that are not those of the results": """
        SELECT b.id FROM batches b
        LEFT JOIN (SELECT batch_id, count(*) FILTER (WHERE status_code BETWEEN 200 AND 299) AS good, count(*) AS all
                   FROM results GROUP BY batch_id) r ON r.batch_id = b.id
        WHERE b.completed <> coalesce(r.good, 0) OR b.completed + b.failed <> coalesce(r.all, 0)""",
    "sequence numbers with gaps": """
        SELECT batch_id FROM results GROUP BY batch_id HAVING max(sequence) <> count(*) OR min(sequence) <> 1""",
    "a chunk that is held": "SELECT id FROM chunks WHERE state = 'leased'",
    "chunks that count wrongly": "SELECT id FROM chunks WHERE (state = 'done') <> (unfinished = 0)",
    "requests of no batch": """
        SELECT batch_id FROM requests
        WHERE batch_id NOT IN (SELECT id FROM batches UNION SELECT batch_id FROM purges)""",
    "results of no request": """
        SELECT batch_id FROM results r
        WHERE NOT EXISTS (SELECT FROM requests q WHERE q.batch_id = r.batch_id AND q.index = r.index)""",
    "a batch without all its requests": """
        SELECT b.id FROM batches b WHERE total <> (SELECT count(*) FROM requests q WHERE q.batch_id = b.id)""",
    "a batch in progress that nobody will finish": """
        SELECT b.id FROM batches b WHERE state IN ('in_progress', 'cancelling')
        AND NOT EXISTS (SELECT FROM chunks c WHERE c.batch_id = b.id AND c.state <> 'done')""",
}


def check_invariants(stack: Stack) -> None:
    with psycopg2.connect(stack.database_url) as connection, connection.cursor() as cursor:
        for name, query in INVARIANTS.items():
            cursor.execute(query)
            assert cursor.fetchall() == [], name


def dies_and_comes_back(server: Server) -> None:
    until(lambda: server.process.poll() is not None, "the process to die at its failpoint")
    assert server.process.returncode == -9
    server.disarm()
    server.start()
