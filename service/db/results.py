"""Results: written once, only under a lease that is held; read in order or as finished."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple
from uuid import UUID

import msgspec
import peewee
from psycopg2.extensions import BYTES, register_type
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


# So many results are divided into pages at once.
STRETCH = 5_000
# What a line has besides its body or error and its name, about.
AROUND = 150

# What a position in a stream of results is: of the request in its batch, or of the result among those stored.
Order = Literal["index", "sequence"]


class Span(NamedTuple):
    """The results from position `first` to `last`."""

    first: int
    last: int


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
# The last position of each page, that begins where the one before has ended. Of the results the sizes alone are looked
# at. A page ends with the result that takes it over its bytes, so that one of any size makes a page.
DIVIDE = """
SELECT max(position) FROM (
    SELECT {column} AS position, (sum(size) OVER place - size) / %(bytes)s AS page, row_number() OVER place AS place
    FROM (SELECT {column}, %(around)s + coalesce(octet_length(body), octet_length(error_message), 0)
                           + coalesce(octet_length(custom_id), 0) AS size
          FROM results WHERE batch_id = %(batch)s AND {column} >= %(start)s ORDER BY {column} LIMIT %(stretch)s) s
    WINDOW place AS (ORDER BY {column} ROWS UNBOUNDED PRECEDING)) s
WHERE %(may_skip)s OR position = %(start)s + place - 1
GROUP BY page ORDER BY page
"""
PAGE = """
FROM results r WHERE batch_id = %(batch)s AND {column} BETWEEN %(first)s AND %(last)s ORDER BY {column}
"""
READ_PAGE = "SELECT " + FIELDS + PAGE
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
# A row each: put together by Postgres, as one long text, they cost it half as much again.
READ_LINES = f"SELECT {LINE}" + PAGE
READ_ONE = f"""
SELECT {FIELDS} FROM results r
WHERE batch_id = %(batch)s AND index = (SELECT index FROM requests WHERE batch_id = %(batch)s AND custom_id = %(name)s)
"""


def divide(
    db: peewee.PostgresqlDatabase, order: Order, batch_id: int, start: int, size: int, may_skip: bool
) -> list[Span]:
    """The pages of results from position `start` on, of about `size` bytes each: of the next few thousand; none when
    there are no results.

    `may_skip` False: only up to the first position that has no result yet.
    """
    names = {"batch": batch_id, "start": start, "bytes": size, "may_skip": may_skip}
    names |= {"around": AROUND, "stretch": STRETCH}
    lasts = [last for (last,) in db.execute_sql(DIVIDE.replace("{column}", order), names).fetchall()]
    return list(map(Span, [start, *(last + 1 for last in lasts)], lasts))


def read_page(db: peewee.PostgresqlDatabase, order: Order, batch_id: int, span: Span) -> list[StoredResult]:
    """The results of a page."""
    sql = READ_PAGE.replace("{column}", order)
    return [StoredResult(*row) for row in db.execute_sql(sql, {"batch": batch_id, **span._asdict()}).fetchall()]


def read_lines(db: peewee.PostgresqlDatabase, order: Order, batch_id: int, span: Span) -> bytes:
    """The same as lines of OpenAI's batch output, in UTF-8."""
    names = {"head": f'{{"id": "batch_req_{batch_id}_', "middle": f', "request_id": "batch_req_{batch_id}_'}
    with db.cursor() as cursor:
        # As they come.
        register_type(BYTES, cursor)
        cursor.execute(READ_LINES.replace("{column}", order), {"batch": batch_id, **span._asdict(), **names})
        return b"".join([line for (line,) in cursor.fetchall()])


def read_one(db: peewee.PostgresqlDatabase, batch_id: int, custom_id: str) -> StoredResult | None:
    """The result of the request of that name; None when there is no such request, or no result yet."""
    row = db.execute_sql(READ_ONE, {"batch": batch_id, "name": custom_id}).fetchone()
    return StoredResult(*row) if row else None
