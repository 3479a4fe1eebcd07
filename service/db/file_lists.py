"""Lists files: those that were uploaded, and the output and error files of batches that have ended."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

import peewee

from service.db.batches import IN_SCOPE

Kind = Literal["input", "output", "error"]
Order = Literal["asc", "desc"]


@dataclass(frozen=True)
class Entry:
    """A file that can be read. `number` is its own of an input, and that of its batch of an output or error file."""

    kind: Kind
    number: int
    filename: str
    bytes: int
    create_time: datetime
    expire_time: datetime | None


FOUND = f"""
SELECT 'input' AS kind, id AS number, filename, bytes, create_time, expire_time FROM files
WHERE {IN_SCOPE} AND state = 'kept' AND (expire_time IS NULL OR expire_time > clock_timestamp())
UNION ALL
SELECT o.kind, o.batch_id, 'batch_' || o.batch_id || '_' || o.kind || '.jsonl', o.bytes, o.create_time, o.expire_time
FROM output_files o JOIN batches b ON b.id = o.batch_id
WHERE {IN_SCOPE} AND NOT o.is_deleted AND o.lines > 0 AND (o.expire_time IS NULL OR o.expire_time > clock_timestamp())
"""


def page(
    db: peewee.PostgresqlDatabase,
    tenant: str | None,
    kinds: Sequence[Kind],
    after: tuple[Kind, int] | None,
    limit: int,
    order: Order,
) -> list[Entry] | None:
    """Up to `limit` files of these kinds behind the one named `after`, by age. None: there is no such file.

    `tenant` None, here and below: those of all tenants.
    """
    names: dict[str, object] = {"tenant": tenant, "kinds": list(kinds), "limit": limit}
    place = ""
    if after is not None:
        found = one(db, tenant, *after)
        if found is None:
            return None
        names |= {"time": found.create_time, "kind": found.kind, "number": found.number}
        sign = "<" if order == "desc" else ">"
        place = f"AND (create_time, kind, number) {sign} (%(time)s, %(kind)s, %(number)s)"
    direction = "DESC" if order == "desc" else "ASC"
    rows = db.execute_sql(
        f"SELECT * FROM ({FOUND}) f WHERE kind = ANY(%(kinds)s) {place}"
        f" ORDER BY create_time {direction}, kind {direction}, number {direction} LIMIT %(limit)s",
        names,
    )
    return [Entry(*row) for row in rows.fetchall()]


def one(db: peewee.PostgresqlDatabase, tenant: str | None, kind: Kind, number: int) -> Entry | None:
    """One file that can be read, or None."""
    row = db.execute_sql(
        f"SELECT * FROM ({FOUND}) f WHERE kind = %(kind)s AND number = %(number)s",
        {"tenant": tenant, "kind": kind, "number": number},
    ).fetchone()
    return Entry(*row) if row else None
