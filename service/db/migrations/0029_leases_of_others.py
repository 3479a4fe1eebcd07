"""A claim in a large batch of which others hold chunks costs what it costs in a small one, also before an ANALYZE."""

from typing import Any

# What changes in `next_chunk` of migration 0023. Of a batch that is newer than its statistics Postgres believes that it
# has next to no chunks, and would read all of them instead of those that are leased.
OLD = "WHERE c.state = 'leased' AND c.batch_id = batch AND"
NEW = "WHERE c.state = 'leased' AND c.batch_id + 0 = batch AND"


def up(migrator: Any, db: Any) -> None:
    """Replaces the function. Programs of before call it as they did."""
    [definition] = db.execute_sql("SELECT pg_get_functiondef('next_chunk'::regproc)").fetchone()
    assert definition.count(OLD) == 1
    db.execute_sql(definition.replace(OLD, NEW))
