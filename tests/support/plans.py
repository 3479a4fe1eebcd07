"""How many rows statements look at, as EXPLAIN ANALYZE counts them."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Concatenate, ParamSpec

import peewee
import psycopg2.extensions

from service.db.connection import Database

P = ParamSpec("P")
LOOKED_AT = ("Actual Rows", "Rows Removed by Join Filter", "Rows Removed by Filter", "Rows Removed by Index Recheck")
# Others have no plan.
PLANNED = re.compile(rb"\s*(SELECT|WITH|INSERT|UPDATE|DELETE)\b")


def rows(plan: Mapping[str, Any]) -> float:
    """The rows that all nodes of a plan looked at, also those compared with one another in vain."""
    mine = plan["Actual Loops"] * sum(plan.get(name, 0) for name in LOOKED_AT)
    return float(mine + sum(map(rows, plan.get("Plans", ()))))


class Explaining(psycopg2.extensions.cursor):
    """Executes each statement twice: first to explain it, which is rolled back."""

    seen: float

    def execute(self, query: str | bytes, params: Sequence[Any] | Mapping[str, Any] | None = None) -> None:
        sql = self.mogrify(query, params)
        if PLANNED.match(sql):
            is_idle = self.connection.info.transaction_status == psycopg2.extensions.TRANSACTION_STATUS_IDLE
            super().execute("BEGIN" if is_idle else "SAVEPOINT explained")
            super().execute(b"EXPLAIN (ANALYZE, FORMAT JSON) " + sql)
            [[found]] = self.fetchall()
            super().execute("ROLLBACK" if is_idle else "ROLLBACK TO SAVEPOINT explained")
            type(self).seen += rows(found[0]["Plan"])
        super().execute(query, params)


def looked_at(
    database: Database,
    function: Callable[Concatenate[peewee.PostgresqlDatabase, P], object],
    *args: P.args,
    **kwargs: P.kwargs,
) -> float:
    """Calls the function, and returns how many rows its statements looked at."""

    class Counting(Explaining):
        seen = 0.0

    def call(db: peewee.PostgresqlDatabase) -> None:
        connection = db.connection()
        connection.cursor_factory = Counting
        try:
            function(db, *args, **kwargs)
        finally:
            connection.cursor_factory = psycopg2.extensions.cursor

    database.call(call)
    return Counting.seen
