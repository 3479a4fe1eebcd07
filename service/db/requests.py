"""One request of a batch, as it was submitted."""

from dataclasses import dataclass

import peewee

from service.db.batches import IN_SCOPE


@dataclass(frozen=True)
class StoredRequest:
    """`body` is JSON text, cut at the number of characters asked for; `body_chars` is how many it has."""

    index: int
    custom_id: str
    url: str
    body: str
    body_chars: int


def read_one(
    db: peewee.PostgresqlDatabase, batch_id: int, custom_id: str, most_chars: int, tenant: str | None = None
) -> StoredRequest | None:
    """The request of that name; None when there is none, or no such batch, or not of the tenant."""
    row = db.execute_sql(
        f"""
        SELECT index, custom_id, url, left(body, %(most)s), length(body) FROM requests
        WHERE batch_id = %(batch)s AND custom_id = %(name)s
          AND EXISTS (SELECT FROM batches WHERE id = %(batch)s AND {IN_SCOPE})
        """,
        {"batch": batch_id, "name": custom_id, "most": most_chars, "tenant": tenant},
    ).fetchone()
    return StoredRequest(*row) if row else None
