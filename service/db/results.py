"""Results: written once, only under a lease that is held; read in order or as finished."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal, NamedTuple
from uuid import UUID

import msgspec
import peewee
import psycopg2.errors
from psycopg2.extensions import BYTES, register_type
from psycopg2.extras import execute_values

from service import failpoints
from service.db.batches import IN_SCOPE
from service.db.chunks import ENTRY
from service.db.connection import allow


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
    # Included in the above: tokens found in the prefix cache, and reasoning.
    cached_tokens: int = 0
    reasoning_tokens: int = 0
    # Stored with the result for its readers. None: looked up when read.
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
    # The size of a body that exceeded the requested maximum and was omitted.
    omitted_bytes: int = 0


# The largest body that is stored. A statement must be smaller than 1 GiB, and quotes and backslashes count twice in it.
MAX_BODY_BYTES = 480 << 20
# Each may wait for one that was sent before it, and there are seldom two.
ATTEMPTS = 3
# How many sequence numbers of a batch are taken. Earlier versions may have left gaps, which the last attempt looks for.
FINISHED = "completed + failed"
LAST_SEQUENCE = f"greatest({FINISHED}, (SELECT max(sequence) FROM results r WHERE r.batch_id = batches.id))"
# A larger body is stored in a column of its own, as uncompressed bytes, and is a page of its own; as a line it is read
# in pieces of this size.
LARGE_BYTES = 1 << 20
# For storing a group of results with large bodies.
LARGE_TIMEOUT_S = 600.0
# How many results are divided into pages at once.
STRETCH = 5_000
# Approximate size of a line without its body or error and its custom_id.
AROUND = 150

# What a position in a stream of results counts: requests in input order, or results in the order of storing.
Order = Literal["index", "sequence"]
# Which results a stream is of.
Which = Literal["all", "succeeded", "failed"]

# As in the index of failed results, which Postgres uses for nothing that is written differently.
FAILED = "(r.status_code BETWEEN 200 AND 299) IS NOT TRUE"
MATCHING: dict[Which, str] = {"all": "true", "succeeded": "r.status_code BETWEEN 200 AND 299", "failed": FAILED}


class Span(NamedTuple):
    """The results from position `first` to `last`. `large`: the size of a large body, which is then the only one."""

    first: int
    last: int
    large: int = 0


class Stretch(NamedTuple):
    """The pages among a few thousand results in a row, and the position after them; None: there are no more."""

    spans: Sequence[Span]
    next: int | None


# One statement, thus one transaction: the results, the batch's counts and end, the chunk's, and the change of the
# queue; or nothing.
#
# `held` fences: a chunk that was released or claimed by another incarnation does not join, and the row lock keeps it
# from being released meanwhile. `batch` locks the batch's row before sequence numbers are taken from its counts, so
# that they are without gaps and in the order of commits: a reader who has seen number N has seen all before it.
# Whoever else locks several of them does it in the same order, chunks before batches and each by id, or skips what is
# locked. The lease does not run while the chunk is locked, when nobody could renew it.
#
# It sees the results that there were when it began, and may then wait for the locks of an earlier attempt whose answer
# was lost, as when a commit waits for its standby. What that has stored meanwhile conflicts, and must: to skip it here
# would leave gaps, because it has had its share of the sequence numbers. The next attempt sees it.
WRITE = """
WITH given (
    chunk_id, batch_id, index, status_code, body, error_code, error_message, is_completed, prompt, completion,
    custom_id, cached, reasoning
) AS (VALUES %s
), held AS MATERIALIZED (
    SELECT id, batch_id, models, charged, unfinished, estimated_tokens::float8 / count AS estimate FROM chunks
    WHERE id IN (SELECT chunk_id FROM given) AND state = 'leased' AND incarnation = '{incarnation}'::uuid
    ORDER BY id FOR UPDATE
), batch AS MATERIALIZED (
    SELECT id, {finished} AS finished, prompt_tokens + completion_tokens AS tokens FROM batches
    WHERE id IN (SELECT batch_id FROM held) AND state IN ('in_progress', 'cancelling') ORDER BY id FOR UPDATE
), written AS (
    INSERT INTO results
        (batch_id, index, sequence, status_code, body, large_body, error_code, error_message, incarnation, custom_id,
         batch_tokens)
    SELECT g.batch_id, g.index, batch.finished + row_number() OVER so_far, g.status_code,
           CASE WHEN octet_length(g.body) <= {large} THEN g.body END,
           CASE WHEN octet_length(g.body) > {large} THEN convert_to(g.body, 'UTF8') END,
           g.error_code, g.error_message, '{incarnation}'::uuid, g.custom_id,
           batch.tokens + sum(g.prompt + g.completion) OVER so_far
    FROM given g JOIN held ON held.id = g.chunk_id JOIN batch ON batch.id = g.batch_id
    WHERE NOT EXISTS (SELECT FROM results r WHERE r.batch_id = g.batch_id AND r.index = g.index)
    WINDOW so_far AS (PARTITION BY g.batch_id ORDER BY g.index)
    RETURNING batch_id, index
), sums AS (
    SELECT g.batch_id, g.chunk_id, count(*) AS results, count(*) FILTER (WHERE g.is_completed) AS completed,
           sum(g.prompt) AS prompt, sum(g.completion) AS completion,
           sum(g.cached) AS cached, sum(g.reasoning) AS reasoning
    -- A group may have two results of a request: one of a chunk that was lost, one of the chunk that it then became.
    FROM given g JOIN held ON held.id = g.chunk_id JOIN written w ON (w.batch_id, w.index) = (g.batch_id, g.index)
    GROUP BY g.batch_id, g.chunk_id
), counted AS (
    UPDATE batches b SET
        completed = b.completed + s.completed,
        failed = b.failed + s.results - s.completed,
        prompt_tokens = b.prompt_tokens + s.prompt,
        completion_tokens = b.completion_tokens + s.completion,
        cached_tokens = b.cached_tokens + s.cached,
        reasoning_tokens = b.reasoning_tokens + s.reasoning,
        state = CASE WHEN b.completed + b.failed + s.results = b.total AND b.state = 'in_progress'
                     THEN 'completed' ELSE b.state END,
        end_time = CASE WHEN b.completed + b.failed + s.results = b.total AND b.state = 'in_progress'
                        THEN clock_timestamp() ELSE b.end_time END
    FROM (SELECT batch_id, sum(results) AS results, sum(completed) AS completed, sum(prompt) AS prompt,
                 sum(completion) AS completion, sum(cached) AS cached, sum(reasoning) AS reasoning
          FROM sums GROUP BY batch_id) s
    WHERE b.id = s.batch_id
), finished AS (
    UPDATE chunks c SET
        unfinished = c.unfinished - s.results,
        state = CASE WHEN c.unfinished = s.results THEN 'done' ELSE c.state END,
        worker_id = CASE WHEN c.unfinished = s.results THEN NULL ELSE c.worker_id END,
        incarnation = CASE WHEN c.unfinished = s.results THEN NULL ELSE c.incarnation END,
        lease_until = CASE WHEN c.unfinished > s.results
                           THEN c.lease_until + (clock_timestamp() - statement_timestamp()) END,
        charged = c.charged - c.charged * s.results / c.unfinished
    FROM sums s WHERE c.id = s.chunk_id
), queued AS (
    -- What was estimated for these requests makes way for what they used.
    INSERT INTO queue_changes (pool_id, batch_id, tenant, tokens, expected, in_flight)
    SELECT q.pool_id, q.batch_id, q.tenant, s.tokens, s.estimated + (s.results - s.with_estimate) * q.estimate,
           -s.charged
    FROM (SELECT sums.batch_id, held.models, sum(prompt + completion) AS tokens, sum(results) AS results,
                 sum(held.charged * results / held.unfinished) AS charged,
                 coalesce(sum(held.estimate * results), 0) AS estimated,
                 coalesce(sum(results) FILTER (WHERE held.estimate IS NOT NULL), 0) AS with_estimate
          FROM sums JOIN held ON held.id = sums.chunk_id GROUP BY sums.batch_id, held.models) s
    JOIN queue q ON {entry}
)
SELECT batch_id, index FROM written
"""
TEMPLATE = (
    "(%s::bigint, %s::bigint, %s::integer, %s::integer, %s, %s, %s, %s::boolean, %s::bigint, %s::bigint, %s,"
    " %s::bigint, %s::bigint)"
)


def write(db: peewee.PostgresqlDatabase, results: Sequence[Result], incarnation: UUID) -> int:
    """Stores results under the leases of `incarnation`; the last result of a batch completes it.

    Results whose lease is no longer held, or whose request already has a result, are skipped: writing a group again
    after a broken connection is safe. Returns how many were stored.
    """
    # A request that ran again under a lease that was lost and had again may have two.
    results = list({(result.chunk_id, result.index): result for result in results}.values())
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
            result.cached_tokens,
            result.reasoning_tokens,
        )
        for result in results
    ]
    if not rows:
        return 0
    failpoints.hit("write.before_commit")
    sql = WRITE.replace("{incarnation}", str(incarnation)).replace("{large}", str(LARGE_BYTES))
    sql = sql.replace("{entry}", ENTRY.format(chunk="s"))
    is_large = sum(len(result.body or "") for result in results) > LARGE_BYTES
    # In a transaction of the caller's, who holds the locks already, nothing can come in between.
    for attempt in range(1 if db.in_transaction() else ATTEMPTS, 0, -1):
        attempted = sql.replace("{finished}", FINISHED if attempt > 1 else LAST_SEQUENCE)
        try:
            with ExitStack() as stack:
                if is_large:
                    stack.enter_context(db.atomic())
                    allow(db, LARGE_TIMEOUT_S)
                cursor = stack.enter_context(db.cursor())
                written = execute_values(cursor, attempted, rows, template=TEMPLATE, page_size=len(rows), fetch=True)
            break
        except psycopg2.errors.UniqueViolation:
            if attempt == 1:
                raise
    failpoints.hit("write.after_commit")
    return len(written)


CUSTOM_ID = """
coalesce(r.custom_id, (SELECT q.custom_id FROM requests q WHERE q.batch_id = r.batch_id AND q.index = r.index))
"""
# Neither reads the body itself.
BODY_BYTES = "coalesce(octet_length(r.body), octet_length(r.large_body))"
BODY = "coalesce(r.body, convert_from(r.large_body, 'UTF8'))"
FIELDS = f"""
r.index, r.sequence, {CUSTOM_ID}, r.status_code, {{body}}, r.error_code, r.error_message,
(extract(epoch FROM r.finish_time) * 1000000)::bigint
"""
# All fields; a body larger than `most` bytes is omitted, and its size is the last field.
FIELDS_LIMITED = f"""
{FIELDS.replace("{body}", f"CASE WHEN {BODY_BYTES} <= %(most)s THEN {BODY} END")},
CASE WHEN {BODY_BYTES} > %(most)s THEN {BODY_BYTES} ELSE 0 END
"""
# The last position of each page; a page begins where the previous one ended. Reads only the results' sizes. A page ends
# with the result that makes it too large; a result with a large body is a page of its own. Results that do not match
# have no size: pages extend over them, and all results are counted.
DIVIDE = f"""
SELECT max(position) FILTER (WHERE matches), coalesce(max(large), 0), max(position), count(*) FROM (
    SELECT position, matches, large, (sum(size) OVER place - size) / %(bytes)s AS page,
           row_number() OVER place AS place,
           2 * count(large) OVER place - CASE WHEN large IS NULL THEN 0 ELSE 1 END AS part
    FROM (SELECT position, matches, CASE WHEN matches AND bytes > %(large)s THEN bytes END AS large,
                 CASE WHEN matches THEN %(around)s + coalesce(bytes, error_bytes, 0) + name_bytes ELSE 0 END AS size
          FROM (SELECT {{column}} AS position, {{matching}} AS matches, {BODY_BYTES} AS bytes,
                       octet_length(error_message) AS error_bytes, coalesce(octet_length(custom_id), 0) AS name_bytes
                FROM results r WHERE batch_id = %(batch)s AND {{column}} >= %(start)s AND {{only}}
                -- A batch that runs in another order than its file may have thousands behind a gap, which are not
                -- looked at.
                AND (%(may_skip)s OR EXISTS (SELECT FROM results WHERE batch_id = %(batch)s AND {{column}} = %(start)s))
                ORDER BY {{column}} LIMIT %(stretch)s) s) s
    WINDOW place AS (ORDER BY position ROWS UNBOUNDED PRECEDING)) s
WHERE %(may_skip)s OR position = %(start)s + place - 1
GROUP BY part, page ORDER BY part, page
"""
PAGE = """
FROM results r WHERE batch_id = %(batch)s AND {column} BETWEEN %(first)s AND %(last)s AND {matching} ORDER BY {column}
"""
READ_PAGE = "SELECT " + FIELDS.replace("{body}", BODY) + PAGE
READ_LARGE = "SELECT " + FIELDS_LIMITED + PAGE
# In the format of client/vllm_batch/output.py. A body is one line of JSON; custom_id and errors may be any text. Each
# || copies its operands, so there are few of them, and the long body comes late.
HEAD = f"""%(head)s || index || '", "custom_id": ' || to_json({CUSTOM_ID})"""
BEFORE_BODY = """', "response": {"status_code": ' || status_code || %(middle)s || index || '", "body": '"""
AFTER_BODY = """E'}, "error": null}\\n'"""
LINE = f"""
{HEAD} ||
CASE WHEN status_code IS NULL
     THEN ', "response": null, "error": {{"code": ' || to_json(coalesce(error_code, '')) ||
          ', "message": ' || to_json(coalesce(error_message, '')) || E'}}}}\\n'
     ELSE {BEFORE_BODY} || {BODY} || {AFTER_BODY}
END
"""
# One row per line: joining them into one long text would cost Postgres half as much again.
READ_LINES = f"SELECT {LINE}" + PAGE
READ_PIECE = f"""
SELECT {HEAD} || {BEFORE_BODY}, {AFTER_BODY},
       substring(coalesce(large_body, convert_to(body, 'UTF8')) FROM %(offset)s + 1 FOR %(size)s)
FROM results r WHERE batch_id = %(batch)s AND {{column}} = %(position)s
"""
READ_ONE = f"""
SELECT {FIELDS_LIMITED} FROM results r
WHERE batch_id = %(batch)s AND index = (SELECT index FROM requests WHERE batch_id = %(batch)s AND custom_id = %(name)s)
  AND EXISTS (SELECT FROM batches WHERE id = %(batch)s AND {IN_SCOPE})
"""


def divide(
    db: peewee.PostgresqlDatabase,
    order: Order,
    which: Which,
    batch_id: int,
    start: int,
    size: int,
    may_skip: bool,
) -> Stretch:
    """Divides the next few thousand results from position `start` on into pages of about `size` bytes.

    `may_skip` False: stops at the first position without a result.
    """
    names = {"batch": batch_id, "start": start, "bytes": size, "may_skip": may_skip}
    names |= {"around": AROUND, "stretch": STRETCH, "large": LARGE_BYTES}
    # Failures alone are found by their index; to see a gap, all results are needed.
    only = FAILED if which == "failed" and may_skip else "true"
    sql = DIVIDE.replace("{column}", order).replace("{matching}", MATCHING[which]).replace("{only}", only)
    spans: list[Span] = []
    counted, reached = 0, start - 1
    for last, large, reached, count in db.execute_sql(sql, names).fetchall():  # noqa: B007
        counted += count
        if last is not None:
            spans.append(Span(spans[-1].last + 1 if spans else start, last, large))
    return Stretch(spans, reached + 1 if counted == STRETCH else None)


def read_page(
    db: peewee.PostgresqlDatabase,
    order: Order,
    which: Which,
    batch_id: int,
    span: Span,
    most_bytes: int = MAX_BODY_BYTES,
) -> list[StoredResult]:
    """The results of a page, without bodies of more than `most_bytes`."""
    names = {"batch": batch_id, "first": span.first, "last": span.last, "most": most_bytes}
    sql = _of(READ_LARGE if span.large else READ_PAGE, order, which)
    return [StoredResult(*row) for row in db.execute_sql(sql, names).fetchall()]


def read_lines(db: peewee.PostgresqlDatabase, order: Order, which: Which, batch_id: int, span: Span) -> bytes:
    """The results of a page as lines of OpenAI's batch output, in UTF-8. For a large body, use `read_piece`."""
    with db.cursor() as cursor:
        # Undecoded.
        register_type(BYTES, cursor)
        names = {"first": span.first, "last": span.last, **line_names(batch_id)}
        cursor.execute(_of(READ_LINES, order, which), names)
        return b"".join([line for (line,) in cursor.fetchall()])


def _of(sql: str, order: Order, which: Which) -> str:
    return sql.replace("{column}", order).replace("{matching}", MATCHING[which])


def read_piece(db: peewee.PostgresqlDatabase, order: Order, batch_id: int, span: Span, offset: int) -> bytes:
    """A piece of the line of a large body: from `offset` in the body on, up to LARGE_BYTES of it.

    The first piece includes what precedes the body, the last what follows it. Empty: the result is gone.
    """
    names = {"position": span.last, "offset": offset, "size": LARGE_BYTES, **line_names(batch_id)}
    row = db.execute_sql(READ_PIECE.replace("{column}", order), names).fetchone()
    if row is None:
        return b""
    head, tail, body = row
    is_last = offset + LARGE_BYTES >= span.large
    return b"".join([b"" if offset else head.encode(), body, tail.encode() if is_last else b""])


def line_names(batch_id: int) -> dict[str, object]:
    """The parts that all lines of a batch share."""
    name = f"batch_req_{batch_id}_"
    return {"batch": batch_id, "head": f'{{"id": "{name}', "middle": f', "request_id": "{name}'}


def read_one(
    db: peewee.PostgresqlDatabase,
    batch_id: int,
    custom_id: str,
    most_bytes: int = MAX_BODY_BYTES,
    tenant: str | None = None,
) -> StoredResult | None:
    """The result of the request of that name; None when there is no such request, of the tenant, or no result yet.

    Without its body if that has more than `most_bytes`.
    """
    row = db.execute_sql(
        READ_ONE, {"batch": batch_id, "name": custom_id, "most": most_bytes, "tenant": tenant}
    ).fetchone()
    return StoredResult(*row) if row else None
