"""Orders about recovery, left for the watchdog of a worker or gateway."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

import peewee

Kind = Literal["paused", "resumed", "budget_reset"]

# Recovery can be paused for so long at most, whoever orders it.
MAX_PAUSE = timedelta(hours=24)


@dataclass(frozen=True)
class Order:
    """An order that a watchdog has not recorded yet. `left_s`: of a pause, what is left of it."""

    id: int
    worker_id: str
    kind: Kind
    reason: str
    left_s: float


def leave(db: peewee.PostgresqlDatabase, worker_id: str, kind: Kind, reason: str, lasts_s: float) -> bool:
    """Leaves an order for the watchdog of one worker or gateway. False: no watchdog has told of it."""
    query = """
        INSERT INTO recovery_orders (worker_id, kind, reason, lasts_s)
        SELECT %(id)s, %(kind)s, %(reason)s, %(lasts_s)s FROM watchdogs
        WHERE watchdog_id = host_of(%(id)s)
          AND detail->'guards' @> jsonb_build_array(jsonb_build_object('worker_id', %(id)s::text))
    """
    given = {"id": worker_id, "kind": kind, "reason": reason, "lasts_s": lasts_s}
    return bool(db.execute_sql(query, given).rowcount)


def waiting(db: peewee.PostgresqlDatabase, worker_ids: Sequence[str] | None = None) -> list[Order]:
    """The orders for these workers and gateways (None: for all) that were not recorded yet, oldest first."""
    rows = db.execute_sql(
        "SELECT id, worker_id, kind, reason,"
        " lasts_s - extract(epoch FROM clock_timestamp() - create_time)::float8"
        " FROM recovery_orders WHERE %(ids)s::text[] IS NULL OR worker_id = ANY(%(ids)s) ORDER BY id",
        {"ids": None if worker_ids is None else list(worker_ids)},
    )
    return [Order(*row) for row in rows.fetchall()]


def recorded(db: peewee.PostgresqlDatabase, order_id: int) -> None:
    """Removes an order that its watchdog has recorded."""
    db.execute_sql("DELETE FROM recovery_orders WHERE id = %s", (order_id,))
