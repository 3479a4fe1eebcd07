"""Cuts the stored requests of a new batch into chunks, each of one model, in the order in which they are to run."""

from collections.abc import Iterator, Sequence
from itertools import islice

import peewee
from psycopg2.extras import execute_values

from service.db.run_order import FAR_LONGER, Plan, Row, cut_by_model

# Rows are read, and chunks written, so many at a time: memory is flat at any size of a batch.
ROWS, CHUNKS = 5_000, 500

# Requests of before have no estimate: about that of service/worker/estimates.py.
TOKENS = "coalesce(estimated_tokens, octet_length(body) / 4 + 256)"
ORDERS = {
    "input": "index",
    "length": f"{TOKENS} DESC, index",
    "prefix": f"{TOKENS} > %(far)s DESC, prefix NULLS LAST, index",
}
READ = f"SELECT index, {TOKENS}, prefix, model FROM requests WHERE batch_id = %(batch)s ORDER BY {{order}}"
COUNT = "SELECT model, count(*) FROM requests WHERE batch_id = %s GROUP BY model"
WRITE = """
INSERT INTO chunks (batch_id, first_index, count, unfinished, priority, models, indexes, prefix_group, estimated_tokens)
VALUES %s
"""
WRITE_IN_FILE_ORDER = """
INSERT INTO chunks (batch_id, first_index, count, unfinished, priority, models, estimated_tokens)
SELECT %(batch)s, first, "end" - first, "end" - first, %(priority)s, %(models)s::text[], tokens
FROM (SELECT coalesce(lag("end") OVER place, 0) AS first, "end", tokens, number
      FROM unnest(%(ends)s::integer[], %(tokens)s::bigint[]) WITH ORDINALITY AS given ("end", tokens, number)
      WINDOW place AS (ORDER BY number)) cuts
ORDER BY number
"""


def store_chunks(
    db: peewee.PostgresqlDatabase, batch_id: int, priority: int, models: Sequence[str], total: int, plan: Plan
) -> None:
    """Stores the chunks of a batch of `total` requests; by their ids they are in the order in which they run.

    A batch that names one model is of that model, also its requests that name none. Within a transaction.
    """
    is_mixed = len(models) > 1
    if plan.ends and not is_mixed:
        names = {"batch": batch_id, "priority": priority, "models": list(models)}
        db.execute_sql(WRITE_IN_FILE_ORDER, names | {"ends": list(plan.ends), "tokens": list(plan.tokens)})
        return
    rows = _read(db, batch_id, plan, is_mixed)
    totals = dict(db.execute_sql(COUNT, (batch_id,)).fetchall()) if is_mixed else {None: total}
    runs = cut_by_model(rows, totals)
    with db.cursor() as cursor:
        while some := list(islice(runs, CHUNKS)):
            values = [
                (
                    batch_id,
                    run.indexes[0],
                    len(run.indexes),
                    len(run.indexes),
                    priority,
                    list(models) if run.model is None else [run.model] if run.model else [],
                    None if run.is_consecutive else f"{{{','.join(map(str, run.indexes))}}}",
                    run.group,
                    run.tokens,
                )
                for run in some
            ]
            execute_values(
                cursor, WRITE, values, "(%s, %s, %s, %s, %s, %s::text[], %s::integer[], %s, %s)", len(values)
            )


def _read(db: peewee.PostgresqlDatabase, batch_id: int, plan: Plan, by_model: bool) -> Iterator[Row]:
    """The requests in their order, within their models if `by_model`, through a cursor of the server."""
    is_prefix = plan.order == "prefix"
    far = plan.far_longer
    if is_prefix and far is None:
        mean = db.execute_sql(f"SELECT avg({TOKENS})::bigint FROM requests WHERE batch_id = %s", (batch_id,)).fetchone()
        far = FAR_LONGER * mean[0]
    sql = READ.replace("{order}", f"{'model, ' if by_model else ''}{ORDERS[plan.order]}")
    # Postgres keeps the rows and gives some at a time.
    db.execute_sql(f"DECLARE in_run_order NO SCROLL CURSOR FOR {sql}", {"batch": batch_id, "far": far})
    while rows := db.execute_sql(f"FETCH {ROWS} FROM in_run_order").fetchall():
        for index, tokens, prefix, model in rows:
            key = bytes(prefix) if is_prefix and prefix is not None else b""
            yield Row(index, tokens, key, model if by_model else None)
    db.execute_sql("CLOSE in_run_order")
