"""Batches as stored: locking, reading and listing them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import peewee

from service.db.run_order import RunOrder

# The columns that `from_row` expects.
COLUMNS = (
    "id, state, request_id, metadata, priority, models, total, completed, failed, prompt_tokens, completion_tokens,"
    " cached_tokens, reasoning_tokens, create_time, start_time, end_time, expire_time, tenant, run_order, digest"
)

# A number that is never given twice, not even by a standby that took over without the last batches, or a restored
# backup, whose sequence begins again at numbers that clients know: the milliseconds since 2025 come first, then 20 bits
# of the sequence.
_BEGIN = "timestamptz '2025-01-01 00:00+00'"
NEW_ID = f"""
(((extract(epoch FROM clock_timestamp() - {_BEGIN}) * 1000)::bigint << 20)
 | (nextval(pg_get_serial_sequence('batches', 'id')) & ((1 << 20) - 1)))
"""
# When such an id was made, to the millisecond.
TIME_OF_ID = f"({_BEGIN} + ({{id}}::bigint >> 20) * interval '1 millisecond')"

TERMINAL = frozenset({"completed", "failed", "expired", "cancelled"})


@dataclass(frozen=True)
class Batch:
    """One batch as stored."""

    id: int
    state: str
    request_id: str | None
    metadata: Mapping[str, str]
    priority: int
    models: Sequence[str]
    total: int
    completed: int
    failed: int
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    reasoning_tokens: int
    create_time: datetime
    start_time: datetime | None
    end_time: datetime | None
    expire_time: datetime | None
    tenant: str
    run_order: RunOrder
    digest: bytes

    @property
    def is_terminal(self) -> bool:
        """True if the state is final."""
        return self.state in TERMINAL


# For calls on behalf of one tenant, to whom others' batches do not exist.
IN_SCOPE = "(%(tenant)s::text IS NULL OR tenant = %(tenant)s)"


class StateError(Exception):
    """The state of the batch does not allow this."""

    def __init__(self, batch: Batch, why: str) -> None:
        super().__init__(why)
        self.batch = batch


def lock(db: peewee.PostgresqlDatabase, batch_id: int, tenant: str | None = None) -> Batch | None:
    """Locks one batch until this transaction ends, and returns it; None if it does not exist.

    With a tenant, batches of others do not exist, here and below.
    """
    return _one(db, batch_id, tenant, "FOR UPDATE")


def get(db: peewee.PostgresqlDatabase, batch_id: int, tenant: str | None = None) -> Batch | None:
    """One batch, or None."""
    return _one(db, batch_id, tenant)


def _one(db: peewee.PostgresqlDatabase, batch_id: int, tenant: str | None, how: str = "") -> Batch | None:
    sql = f"SELECT {COLUMNS} FROM batches WHERE id = %(id)s AND {IN_SCOPE} {how}"
    row = db.execute_sql(sql, {"id": batch_id, "tenant": tenant}).fetchone()
    return from_row(row) if row else None


def of_request_id(db: peewee.PostgresqlDatabase, tenant: str, request_id: str) -> Batch | None:
    """The batch that a tenant created with this request_id, or None."""
    row = db.execute_sql(
        f"SELECT {COLUMNS} FROM batches WHERE tenant = %s AND request_id = %s", (tenant, request_id)
    ).fetchone()
    return from_row(row) if row else None


def get_many(db: peewee.PostgresqlDatabase, ids: Sequence[int]) -> dict[int, Batch]:
    """Those of the batches that exist, by id."""
    rows = db.execute_sql(f"SELECT {COLUMNS} FROM batches WHERE id = ANY(%s)", (list(ids),))
    return {row[0]: from_row(row) for row in rows.fetchall()}


def list_page(
    db: peewee.PostgresqlDatabase, states: Sequence[str], before: int | None, limit: int, tenant: str | None = None
) -> list[Batch]:
    """Up to `limit` batches, newest first, in one of `states` (empty: any) and older than the batch `before`."""
    where, params = [], {"limit": limit, "states": list(states), "before": before, "tenant": tenant}
    if tenant is not None:
        where.append("tenant = %(tenant)s")
    if states:
        where.append("state = ANY(%(states)s)")
    if before is not None:
        where.append("id < %(before)s")
    condition = f"WHERE {' AND '.join(where)}" if where else ""
    rows = db.execute_sql(f"SELECT {COLUMNS} FROM batches {condition} ORDER BY id DESC LIMIT %(limit)s", params)
    return [from_row(row) for row in rows.fetchall()]


def from_row(row: Sequence[Any]) -> Batch:
    """The batch in a row of COLUMNS."""
    values = list(row)
    values[-1] = bytes(values[-1])
    return Batch(*values)
