"""The sessions of those who have signed in on the page. Neither their cookie nor their token is stored."""

import peewee


def begin(db: peewee.PostgresqlDatabase, digest: bytes, token_digest: bytes, lasts_s: float) -> None:
    """Begins a session, also repeatedly, and removes those that have expired."""
    with db.atomic():
        db.execute_sql("DELETE FROM page_sessions WHERE expire_time < clock_timestamp()")
        db.execute_sql(
            "INSERT INTO page_sessions (digest, token_digest, expire_time)"
            " VALUES (%s, %s, clock_timestamp() + make_interval(secs => %s)) ON CONFLICT DO NOTHING",
            (digest, token_digest, lasts_s),
        )


def token_of(db: peewee.PostgresqlDatabase, digest: bytes) -> bytes | None:
    """The digest of the token that a session was begun with; None: it has ended."""
    row = db.execute_sql(
        "SELECT token_digest FROM page_sessions WHERE digest = %s AND expire_time > clock_timestamp()", (digest,)
    ).fetchone()
    return bytes(row[0]) if row else None


def end(db: peewee.PostgresqlDatabase, digest: bytes) -> None:
    """Ends a session."""
    db.execute_sql("DELETE FROM page_sessions WHERE digest = %s", (digest,))
