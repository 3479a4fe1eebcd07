"""Output and error files of batches that have ended: measured once, and read from any byte on.

Their lines are not stored: Postgres makes them of the results, as for StreamResults. What is stored is where in the
file which of them are.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import peewee
from psycopg2.extensions import BYTES, register_type
from psycopg2.extras import execute_values

from service.db import batches
from service.db.batches import Batch
from service.db.chunks import IS_UNANSWERED
from service.db.results import (
    AFTER_BODY,
    BEFORE_BODY,
    BODY_BYTES,
    CUSTOM_ID,
    HEAD,
    LARGE_BYTES,
    LINE,
    STRETCH,
    line_names,
)
from service.db.standby import acknowledged

Kind = Literal["output", "error"]
KINDS: tuple[Kind, ...] = ("output", "error")
# What the lines of a file are made of: answers with a 2xx status; other results; requests of a cancelled batch that
# have no result.
Source = Literal["completed", "failed", "unanswered"]
SOURCES: dict[Kind, tuple[Source, ...]] = {"output": ("completed",), "error": ("failed", "unanswered")}

IS_COMPLETED = "(r.status_code BETWEEN 200 AND 299) IS TRUE"
# What the lines of all answers have alike, which Postgres computes once.
FIXED = f"{HEAD} || {BEFORE_BODY} || {AFTER_BODY}"
for _part in (f"to_json({CUSTOM_ID})", "status_code", "index"):
    FIXED = FIXED.replace(f"|| {_part}", "|| ''")
# Of the body the size alone is looked at.
SIZE = f"""
CASE WHEN status_code IS NULL THEN octet_length({LINE})
     ELSE octet_length({FIXED}) + 2 * length(index::text) + length(status_code::text)
          + octet_length(to_json({CUSTOM_ID})::text) + {BODY_BYTES}
END
"""
CANCELLED = """
%(head)s || index || '", "custom_id": ' || to_json(custom_id) || E', "response": null, "error": {"code": "batch_cancelled", "message": "The batch was cancelled before this request was answered."}}\\n'
"""  # noqa: E501
# A line with a large body is a page by itself: `part` counts up before and behind it.
MEASURE = f"""
SELECT source, min(index), max(index), sum(size)::bigint, count(*), coalesce(max(large), 0) FROM (
    SELECT index, source, size, large, (sum(size) OVER place - size) / {LARGE_BYTES} AS page,
           2 * count(large) OVER place - CASE WHEN large IS NULL THEN 0 ELSE 1 END AS part
    FROM ({{rows}}) s WINDOW place AS (PARTITION BY source ORDER BY index ROWS UNBOUNDED PRECEDING)) s
GROUP BY source, part, page ORDER BY min(index)
"""
RESULTS = f"""
SELECT index, CASE WHEN {IS_COMPLETED} THEN 'completed' ELSE 'failed' END AS source,
       {SIZE} AS size,
       CASE WHEN {BODY_BYTES} > {LARGE_BYTES} THEN {BODY_BYTES} END AS large
FROM results r WHERE batch_id = %(batch)s AND index BETWEEN %(first)s AND %(last)s
"""
UNANSWERED_WHERE = f"""
FROM requests q WHERE batch_id = %(batch)s AND index BETWEEN %(first)s AND %(last)s
  AND {IS_UNANSWERED}
"""
UNANSWERED = (
    f"SELECT index, 'unanswered' AS source, octet_length({CANCELLED}) AS size, NULL::integer AS large"
    + UNANSWERED_WHERE
)
READ = {
    "completed": f"SELECT {LINE} FROM results r WHERE batch_id = %(batch)s AND index BETWEEN %(first)s AND %(last)s"
    f" AND {IS_COMPLETED} ORDER BY index",
    "failed": f"SELECT {LINE} FROM results r WHERE batch_id = %(batch)s AND index BETWEEN %(first)s AND %(last)s"
    f" AND NOT {IS_COMPLETED} ORDER BY index",
    "unanswered": f"SELECT {CANCELLED} {UNANSWERED_WHERE} ORDER BY index",
}
READ_PIECE = f"""
SELECT {HEAD} || {BEFORE_BODY}, {AFTER_BODY},
       coalesce(substring(large_body FROM %(offset)s + 1 FOR %(size)s),
                substring(convert_to(body, 'UTF8') FROM %(offset)s + 1 FOR %(size)s))
FROM results r WHERE batch_id = %(batch)s AND index = %(first)s
"""


class Page(NamedTuple):
    """The lines of the requests from `first_index` to `last_index` that come from `source`: `bytes` from `first` on.

    `large`: the bytes of the body of the one line there; 0 for lines without a large body.
    """

    first: int
    bytes: int
    source: Source
    first_index: int
    last_index: int
    large: int


@dataclass
class _Measured:
    """Pages of one file so far."""

    pages: list[Page]
    bytes: int = 0
    lines: int = 0

    def add(self, source: Source, first_index: int, last_index: int, size: int, lines: int, large: int) -> None:
        self.pages.append(Page(self.bytes, size, source, first_index, last_index, large))
        self.bytes += size
        self.lines += lines


def stretches(batch: Batch) -> Iterator[tuple[Source | None, int]]:
    """What to measure of a batch that has ended, in this order: sources with the first index; None: all results."""
    for first in range(0, batch.total, STRETCH):
        yield None, first
    if batch.state == "cancelled" and batch.completed + batch.failed < batch.total:
        for first in range(0, batch.total, STRETCH):
            yield "unanswered", first


class Measuring:
    """Measures the files of one batch, a stretch at a time, so that no statement takes long."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self._files: dict[Kind, _Measured] = {kind: _Measured([]) for kind in KINDS}

    def measure(self, db: peewee.PostgresqlDatabase, source: Source | None, first: int) -> None:
        """One stretch."""
        rows = UNANSWERED if source == "unanswered" else RESULTS
        names = {"first": first, "last": first + STRETCH - 1, **line_names(self.batch.id)}
        for found, *page in db.execute_sql(MEASURE.replace("{rows}", rows), names).fetchall():
            self._files["output" if found == "completed" else "error"].add(found, *page)

    def store(self, db: peewee.PostgresqlDatabase) -> None:
        """Stores what was measured, unless somebody else did so first, or the batch is gone."""
        with db.atomic():
            batch = batches.get(db, self.batch.id)
            if batch is None:
                return
            db.execute_sql("UPDATE file_batches SET is_measured = true WHERE batch_id = %s", (batch.id,))
            for kind, file in self._files.items():
                made = db.execute_sql(
                    """
                    INSERT INTO output_files (batch_id, kind, bytes, lines, create_time, expire_time)
                    SELECT b.id, %(kind)s, %(bytes)s, %(lines)s, b.end_time,
                           b.end_time + make_interval(secs => f.output_lifetime_s)
                    FROM batches b LEFT JOIN file_batches f ON f.batch_id = b.id WHERE b.id = %(id)s
                    ON CONFLICT DO NOTHING
                    """,
                    {"id": batch.id, "kind": kind, "bytes": file.bytes, "lines": file.lines},
                )
                if made.rowcount and file.pages:
                    with db.cursor() as cursor:
                        execute_values(
                            cursor,
                            "INSERT INTO output_pages"
                            " (batch_id, kind, first, bytes, source, first_index, last_index, large) VALUES %s",
                            [(batch.id, kind, *page) for page in file.pages],
                            page_size=1000,
                        )


def is_measured(db: peewee.PostgresqlDatabase, batch_id: int) -> bool:
    """True once `store` has run."""
    row = db.execute_sql("SELECT count(*) FROM output_files WHERE batch_id = %s", (batch_id,)).fetchone()
    return bool(row[0] == len(KINDS))


def unmeasured(db: peewee.PostgresqlDatabase, limit: int, tenant: str | None = None) -> list[Batch]:
    """Batches made from files that have ended and whose files are not measured yet; of all tenants, or of one."""
    names = ", ".join(f"b.{name.strip()}" for name in batches.COLUMNS.split(","))
    rows = db.execute_sql(
        f"""
        SELECT {names} FROM batches b JOIN file_batches f ON f.batch_id = b.id
        WHERE b.end_time IS NOT NULL AND NOT f.is_measured AND {batches.IN_SCOPE} ORDER BY f.batch_id LIMIT %(limit)s
        """,
        {"limit": limit, "tenant": tenant},
    )
    return [batches.from_row(row) for row in rows.fetchall()]


def pages(db: peewee.PostgresqlDatabase, batch_id: int, kind: Kind, at: int, limit: int) -> list[Page]:
    """Some pages of a file, from the one on in which the byte `at` is."""
    rows = db.execute_sql(
        "SELECT first, bytes, source, first_index, last_index, large FROM output_pages"
        " WHERE batch_id = %(id)s AND kind = %(kind)s AND first >= ("
        "   SELECT max(first) FROM output_pages WHERE batch_id = %(id)s AND kind = %(kind)s AND first <= %(at)s)"
        " ORDER BY first LIMIT %(limit)s",
        {"id": batch_id, "kind": kind, "at": at, "limit": limit},
    )
    return [Page(*row) for row in rows.fetchall()]


def read(db: peewee.PostgresqlDatabase, batch_id: int, page: Page) -> bytes:
    """The lines of a page without a large body."""
    with db.cursor() as cursor:
        # As they come.
        register_type(BYTES, cursor)
        names = {"first": page.first_index, "last": page.last_index, **line_names(batch_id)}
        cursor.execute(READ[page.source], names)
        return b"".join([line for (line,) in cursor.fetchall()])


def read_large(db: peewee.PostgresqlDatabase, batch_id: int, page: Page, offset: int) -> tuple[bytes, bytes, bytes]:
    """Of the line of a large body: what is before the body, LARGE_BYTES of it from `offset` on, and what is behind."""
    names = {"first": page.first_index, "offset": offset, "size": LARGE_BYTES, **line_names(batch_id)}
    row: Sequence[bytes | str] | None = db.execute_sql(READ_PIECE, names).fetchone()
    if row is None:
        return b"", b"", b""
    head, tail, body = row
    return str(head).encode(), bytes(body), str(tail).encode()  # type: ignore[arg-type]


@acknowledged
def delete(db: peewee.PostgresqlDatabase, batch_id: int, kind: Kind) -> bool:
    """Deletes an output or error file; its results go with their batch. False: there is no such file."""
    cursor = db.execute_sql(
        "UPDATE output_files SET is_deleted = true WHERE batch_id = %s AND kind = %s AND NOT is_deleted AND lines > 0",
        (batch_id, kind),
    )
    return bool(cursor.rowcount)
