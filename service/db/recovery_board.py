"""What watchdogs conclude about the processes that they guard, for all who read it; and the orders left for them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import peewee
from psycopg2.extras import execute_values

Kind = Literal["paused", "resumed", "budget_reset"]


@dataclass(frozen=True)
class Status:
    """A `WorkerStatus` in JSON, and how long ago it was written."""

    worker_id: str
    host: str
    is_gateway: bool
    status: Mapping[str, Any]
    age_s: float


@dataclass(frozen=True)
class Order:
    """An order that a watchdog has not recorded yet. `left_s`: of a pause, what is left of it."""

    id: int
    worker_id: str
    kind: Kind
    reason: str
    left_s: float


def put(
    db: peewee.PostgresqlDatabase,
    host: str,
    workers: Mapping[str, Mapping[str, Any]],
    gateways: Mapping[str, Mapping[str, Any]],
) -> None:
    """Replaces what the watchdog of this host has concluded."""
    rows = [
        (worker_id, host, is_gateway, json.dumps(status))
        for is_gateway, found in ((False, workers), (True, gateways))
        for worker_id, status in sorted(found.items())
    ]
    with db.atomic(), db.cursor() as cursor:
        cursor.execute(
            "DELETE FROM recovery_statuses WHERE host = %s AND worker_id <> ALL(%s)", (host, [row[0] for row in rows])
        )
        if rows:
            execute_values(
                cursor,
                "INSERT INTO recovery_statuses (worker_id, host, is_gateway, status) VALUES %s"
                " ON CONFLICT (worker_id) DO UPDATE SET host = EXCLUDED.host, is_gateway = EXCLUDED.is_gateway,"
                " status = EXCLUDED.status, write_time = clock_timestamp()",
                rows,
            )


def read(db: peewee.PostgresqlDatabase) -> list[Status]:
    """What all watchdogs have concluded."""
    rows = db.execute_sql(
        "SELECT worker_id, host, is_gateway, status, extract(epoch FROM clock_timestamp() - write_time)::float8"
        " FROM recovery_statuses ORDER BY worker_id"
    )
    return [Status(*row) for row in rows.fetchall()]


def order(db: peewee.PostgresqlDatabase, worker_id: str, kind: Kind, reason: str, lasts_s: float) -> bool:
    """Leaves an order for the watchdog of one worker or gateway. False: no watchdog has told of it."""
    return bool(
        db.execute_sql(
            "INSERT INTO recovery_orders (worker_id, kind, reason, lasts_s)"
            " SELECT worker_id, %s, %s, %s FROM recovery_statuses WHERE worker_id = %s",
            (kind, reason, lasts_s, worker_id),
        ).rowcount
    )


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
