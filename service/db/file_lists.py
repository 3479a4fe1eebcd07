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
# When a file was made, also of one that was deleted since, as those are that a client deletes while it lists them.
MADE = f"""
SELECT create_time FROM files WHERE 'input' = %(kind)s AND id = %(number)s AND {IN_SCOPE}
UNION ALL
SELECT o.create_time FROM output_files o JOIN batches b ON b.id = o.batch_id
WHERE o.kind = %(kind)s AND o.batch_id = %(number)s AND {IN_SCOPE}
UNION ALL
SELECT create_time FROM gone_files WHERE kind = %(kind)s AND number = %(number)s AND {IN_SCOPE}
"""
# How long clients may list on after a file of which nothing is left.
REMEMBERED_S = 86_400.0


def page(
    db: peewee.PostgresqlDatabase,
    tenant: str | None,
    kinds: Sequence[Kind],
    after: tuple[Kind, int] | None,
    limit: int,
    order: Order,
) -> list[Entry] | None:
    """Up to `limit` files of these kinds behind the one named `after`, by age. None: there was no such file lately.

    `tenant` None, here and below: those of all tenants.
    """
    names: dict[str, object] = {"tenant": tenant, "kinds": list(kinds), "limit": limit}
    place = ""
    if after is not None:
        kind, number = after
        names |= {"kind": kind, "number": number}
        found = db.execute_sql(MADE, names).fetchone()
        if found is None:
            return None
        names["time"] = found[0]
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


def remember(db: peewee.PostgresqlDatabase, file_id: int) -> None:
    """Keeps the place in the list of an uploaded file whose row is about to be removed."""
    db.execute_sql(
        "INSERT INTO gone_files (kind, number, tenant, create_time)"
        " SELECT 'input', id, tenant, create_time FROM files WHERE id = %s ON CONFLICT DO NOTHING",
        (file_id,),
    )


def remember_output(db: peewee.PostgresqlDatabase, batch_ids: Sequence[int]) -> None:
    """Keeps the places in the list of the output and error files of batches that are about to be deleted."""
    db.execute_sql(
        "INSERT INTO gone_files (kind, number, tenant, create_time)"
        " SELECT o.kind, o.batch_id, b.tenant, o.create_time FROM output_files o JOIN batches b ON b.id = o.batch_id"
        " WHERE b.id = ANY(%s) AND o.lines > 0 ON CONFLICT DO NOTHING",
        (list(batch_ids),),
    )


def forget(db: peewee.PostgresqlDatabase) -> None:
    """Removes the places of files that were removed long ago."""
    db.execute_sql(
        "DELETE FROM gone_files WHERE gone_time < clock_timestamp() - make_interval(secs => %s)", (REMEMBERED_S,)
    )
