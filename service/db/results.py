"""Results: written once, only under a lease that is held; read in order or as finished."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple
from uuid import UUID

import msgspec
import peewee
from psycopg2.extras import execute_values

from service import failpoints


@dataclass(frozen=True)
class Result:
    """The outcome of one request: a response (`status_code` and `body`) or an error (`error_code`, `error_message`).

    `body` is one line of JSON text. The token counts are those of its `usage`, for the batch's sum.
    """

    chunk_id: int
    batch_id: int
    index: int
    status_code: int | None = None
    body: str | None = None
    error_code: str | None = None
    error_message: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    # Kept with the result for who reads it. None: looked up then.
    custom_id: str | None = None

    @property
    def is_completed(self) -> bool:
        """True for an answer with a 2xx status."""
        return self.status_code is not None and 200 <= self.status_code < 300


class StoredResult(msgspec.Struct, frozen=True):
    """A result as it is read back. `finish_us` is its time, in microseconds since 1970."""

    index: int
    sequence: int
    custom_id: str
    status_code: int | None
    body: str | None
    error_code: str | None
    error_message: str | None
    finish_us: int


# What a position in a stream of results is: of the request in its batch, or of the result among those stored.
Order = Literal["index", "sequence"]


class Span(NamedTuple):
    """Which results to read: from position `start`, up to `limit` of them, of about so many bytes of bodies.

    `may_skip` False: only up to the first position that has no result yet.
    """

    start: int
    limit: int
    bytes: int
    may_skip: bool = True


class Page(NamedTuple):
    """Some consecutive results, at least one if there is any. `is_full`: there may be more behind them."""

    results: list[StoredResult]
    is_full: bool


class Lines(NamedTuple):
    """The same as text, a line each, in UTF-8; `last` is the position of the last, None when there is none."""

    jsonl: bytes
    last: int | None
    length: int
    is_full: bool


# One statement, thus one transaction: the results, the batch's counts and end, and the chunk's, or nothing.
#
# `held` fences: a chunk that was released or claimed by another incarnation does not join, and the row lock keeps it
# from being released meanwhile. `batch` locks the batch's row before sequence numbers are taken from its counts, so
# that they are without gaps and in the order of commits: a reader who has seen number N has seen all before it.
WRITE = """
WITH given (
    chunk_id, batch_id, index, status_code, body, error_code, error_message, is_completed, prompt, completion, custom_id
) AS (VALUES %s
), held AS MATERIALIZED (
    SELECT id, batch_id FROM chunks
    WHERE id IN (SELECT chunk_id FROM given) AND state = 'leased' AND incarnation = '{incarnation}'::uuid
    ORDER BY id FOR UPDATE
), batch AS MATERIALIZED (
    SELECT id, completed + failed AS finished FROM batches
    WHERE id IN (SELECT batch_id FROM held) AND state IN ('in_progress', 'cancelling') ORDER BY id FOR UPDATE
), written AS (
    INSERT INTO results
        (batch_id, index, sequence, status_code, body, error_code, error_message, incarnation, custom_id)
    SELECT g.batch_id, g.index,
           batch.finished + row_number() OVER (PARTITION BY g.batch_id ORDER BY g.index),
           g.status_code, g.body, g.error_code, g.error_message, '{incarnation}'::uuid, g.custom_id
    FROM given g JOIN held ON held.id = g.chunk_id JOIN batch ON batch.id = g.batch_id
    WHERE NOT EXISTS (SELECT FROM results r WHERE r.batch_id = g.batch_id AND r.index = g.index)
    ON CONFLICT DO NOTHING
    RETURNING batch_id, index
), sums AS (
    SELECT g.batch_id, g.chunk_id, count(*) AS results, count(*) FILTER (WHERE g.is_completed) AS completed,
           sum(g.prompt) AS prompt, sum(g.completion) AS completion
    FROM given g JOIN written w USING (batch_id, index) GROUP BY g.batch_id, g.chunk_id
), counted AS (
    UPDATE batches b SET
        completed = b.completed + s.completed,
        failed = b.failed + s.results - s.completed,
        prompt_tokens = b.prompt_tokens + s.prompt,
        completion_tokens = b.completion_tokens + s.completion,
        state = CASE WHEN b.completed + b.failed + s.results = b.total AND b.state = 'in_progress'
                     THEN 'completed' ELSE b.state END,
        end_time = CASE WHEN b.completed + b.failed + s.results = b.total AND b.state = 'in_progress'
                        THEN clock_timestamp() ELSE b.end_time END
    FROM (SELECT batch_id, sum(results) AS results, sum(completed) AS completed, sum(prompt) AS prompt,
                 sum(completion) AS completion FROM sums GROUP BY batch_id) s
    WHERE b.id = s.batch_id
), finished AS (
    UPDATE chunks c SET
        unfinished = c.unfinished - s.results,
        state = CASE WHEN c.unfinished = s.results THEN 'done' ELSE c.state END,
        worker_id = CASE WHEN c.unfinished = s.results THEN NULL ELSE c.worker_id END,
        incarnation = CASE WHEN c.unfinished = s.results THEN NULL ELSE c.incarnation END,
        lease_until = CASE WHEN c.unfinished = s.results THEN NULL ELSE c.lease_until END
    FROM sums s WHERE c.id = s.chunk_id
)
SELECT batch_id, index FROM written
"""
TEMPLATE = "(%s::bigint, %s::bigint, %s::integer, %s::integer, %s, %s, %s, %s::boolean, %s::bigint, %s::bigint, %s)"


def write(db: peewee.PostgresqlDatabase, results: Sequence[Result], incarnation: UUID) -> int:
    """Stores results under the leases of `incarnation`; a batch with its last result is completed with it.

    Results whose lease is not held any more, or whose request has a result, are left out: writing a group again
    after a broken connection is safe. Returns how many were stored.
    """
    rows = [
        (
            result.chunk_id,
            result.batch_id,
            result.index,
            result.status_code,
            result.body,
            result.error_code,
            result.error_message,
            result.is_completed,
            result.prompt_tokens,
            result.completion_tokens,
            result.custom_id,
        )
        for result in results
    ]
    if not rows:
        return 0
    failpoints.hit("write.before_commit")
    with db.cursor() as cursor:
        sql = WRITE.replace("{incarnation}", str(incarnation))
        written = execute_values(cursor, sql, rows, template=TEMPLATE, page_size=len(rows), fetch=True)
    failpoints.hit("write.after_commit")
    return len(written)


CUSTOM_ID = """
coalesce(r.custom_id, (SELECT q.custom_id FROM requests q WHERE q.batch_id = r.batch_id AND q.index = r.index))
"""
FIELDS = f"""
r.index, r.sequence, {CUSTOM_ID}, r.status_code, r.body, r.error_code, r.error_message,
(extract(epoch FROM r.finish_time) * 1000000)::bigint
"""
# A page ends with the result that takes it over the bytes, so that one of any size makes a page. Before the batch has
# ended it ends at a gap in the order of the requests too: one has no result yet.
PAGE = """
FROM (SELECT *, row_number() OVER place AS place,
             sum(octet_length(body)) OVER (place ROWS UNBOUNDED PRECEDING) AS bytes
      FROM (SELECT * FROM results WHERE batch_id = %(batch)s AND {column} >= %(start)s
            ORDER BY {column} LIMIT %(limit)s) s
      WINDOW place AS (ORDER BY {column})) r
WHERE coalesce(r.bytes, 0) - coalesce(octet_length(r.body), 0) < %(bytes)s
  AND (%(may_skip)s OR r.{column} = %(start)s + r.place - 1)
"""
READ_PAGE = "SELECT r.bytes, " + FIELDS + PAGE + "ORDER BY r.{column}"
# As client/vllm_batch/output.py writes it. A body is one line of JSON; custom_id and errors are any text. Each || makes
# a new text: few of them, and the long body late.
LINE = (
    """
%(head)s || index || '", "custom_id": ' || to_json("""
    + CUSTOM_ID
    + """) ||
CASE WHEN status_code IS NULL
     THEN ', "response": null, "error": {"code": ' || to_json(coalesce(error_code, '')) ||
          ', "message": ' || to_json(coalesce(error_message, '')) || E'}}\\n'
     ELSE ', "response": {"status_code": ' || status_code || %(middle)s || index || '", "body": ' || body ||
          E'}, "error": null}\\n'
END
"""
)
READ_LINES = f"SELECT string_agg({LINE}, '' ORDER BY r.{{column}}), max(r.{{column}}), count(*), max(r.bytes)" + PAGE
READ_ONE = f"""
SELECT {FIELDS} FROM results r
WHERE batch_id = %(batch)s AND index = (SELECT index FROM requests WHERE batch_id = %(batch)s AND custom_id = %(name)s)
"""


def read_page(db: peewee.PostgresqlDatabase, order: Order, batch_id: int, span: Span) -> Page:
    """Some results, in an order."""
    sql = READ_PAGE.replace("{column}", order)
    rows = db.execute_sql(sql, {"batch": batch_id, **span._asdict()}).fetchall()
    is_full = len(rows) == span.limit or (bool(rows) and (rows[-1][0] or 0) >= span.bytes)
    return Page([StoredResult(*row[1:]) for row in rows], is_full)


def read_lines(db: peewee.PostgresqlDatabase, order: Order, batch_id: int, span: Span) -> Lines:
    """Some results as lines of OpenAI's batch output, in an order."""
    names = {"head": f'{{"id": "batch_req_{batch_id}_', "middle": f', "request_id": "batch_req_{batch_id}_'}
    sql = READ_LINES.replace("{column}", order)
    text, last, count, size = db.execute_sql(sql, {"batch": batch_id, **span._asdict(), **names}).fetchone()
    return Lines((text or "").encode(), last, count, count == span.limit or (size or 0) >= span.bytes)


def read_one(db: peewee.PostgresqlDatabase, batch_id: int, custom_id: str) -> StoredResult | None:
    """The result of the request of that name; None when there is no such request, or no result yet."""
    row = db.execute_sql(READ_ONE, {"batch": batch_id, "name": custom_id}).fetchone()
    return StoredResult(*row) if row else None
