"""How batches are created: atomically, in one piece or from staged rows, or from another batch's failed requests."""

import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import peewee
import psycopg2.errors
from psycopg2.extras import Json

from service import failpoints
from service.db import batches, sharing, turns
from service.db.batches import COLUMNS, Batch, StateError
from service.db.connection import allow
from service.db.cutting import TOKENS, store_chunks
from service.db.limits import Limits, New, check, check_finally
from service.db.run_order import BY_PREFIX, Plan, RunOrder
from service.db.standby import acknowledged
from service.tenants import DEFAULT_TENANT

# The index that keeps custom_ids unique in a batch.
CUSTOM_IDS = "requests_by_custom_id"


@dataclass(frozen=True)
class Options:
    """A client's options for a batch. `completion_window_s` None: never expires.

    `traceparent` is the trace in which its requests run.
    """

    request_id: str | None = None
    metadata: Mapping[str, str] | None = None
    priority: int = 0
    completion_window_s: float | None = None
    traceparent: str | None = None
    tenant: str = DEFAULT_TENANT
    run_order: RunOrder = "prefix"
    # Where its event goes; None: where its tenant's go.
    webhook_url: str | None = None
    # Refuse it if it names a model that no worker serves now.
    require_live: bool = False


DEFAULT_OPTIONS = Options()


@dataclass(frozen=True)
class Content:
    """Summary of a new batch: the number of its requests, the models they name, a hash of content and options.

    `estimated_tokens` of all its requests, prompts and answers. `plan`: in which order they run.
    """

    total: int
    models: Sequence[str]
    digest: bytes
    estimated_tokens: int = 0
    plan: Plan = BY_PREFIX


class StagedTooLongError(Exception):
    """The rows staged for a batch are due to be removed, or have been."""


class DuplicateError(Exception):
    """The request_id is taken by `batch`."""

    def __init__(self, batch: Batch) -> None:
        super().__init__(f"request_id {batch.request_id!r} is batch {batch.id}")
        self.batch = batch


def reserve(db: peewee.PostgresqlDatabase, limits: Limits | None = None, options: Options = DEFAULT_OPTIONS) -> int:
    """Reserves the id of a batch to be created. Raises FullError if it could not be created now.

    What was created before, under the same request_id, is no matter of limits: that is found out at the end.

    Ids ascend with the time, and none is ever given twice.
    """
    if limits is not None and not _is_known(db, options):
        check(db, limits, New(0, options.tenant, 1, 1))
    return int(db.execute_sql(f"SELECT {batches.NEW_ID}").fetchone()[0])


def stage(db: peewee.PostgresqlDatabase, batch_id: int, rows: bytes, lease_s: float, is_repeated: bool = False) -> None:
    """Stores some requests of a batch that does not exist yet: rows in COPY's text format, which nobody sees yet.

    A large upload is stored in such pieces, so that no transaction or connection is held for as long as its client
    takes. `endings.purge` removes the rows unless `create` makes a batch of them within `lease_s` of `reserve`.
    `is_repeated`: they may be stored already. Raises psycopg2's UniqueViolation for a repeated custom_id.
    """
    with db.atomic():
        # By the time in the id: once earlier pieces have been removed, the rest must not count as all of it. An update,
        # because that locks the row: until these rows can be seen, a purge must not take its work for done.
        db.execute_sql(
            f"""
            INSERT INTO purges (batch_id, due_time)
            VALUES (%s, {batches.TIME_OF_ID.format(id="%s")} + make_interval(secs => %s))
            ON CONFLICT (batch_id) DO UPDATE SET due_time = least(purges.due_time, EXCLUDED.due_time)
            """,
            (batch_id, batch_id, lease_s),
        )
        # The lock was waited for, so an earlier call has ended.
        if not (is_repeated and _is_stored(db, batch_id, rows)):
            copy(db, rows)
    failpoints.hit("stage.after_commit")


def abandon(db: peewee.PostgresqlDatabase, batch_id: int) -> None:
    """Makes the rows staged for a batch due for removal."""
    db.execute_sql("UPDATE purges SET due_time = clock_timestamp() WHERE batch_id = %s", (batch_id,))


@acknowledged
def create(
    db: peewee.PostgresqlDatabase,
    batch_id: int,
    options: Options,
    content: Content,
    rows: bytes,
    is_staged: bool,
    timeout_s: float,
    limits: Limits | None = None,
    is_repeated: bool = False,
) -> Batch:
    """Creates a reserved batch in one transaction. `rows` are all its requests, or those that were not staged.

    `is_repeated`: it may be created already. Raises DuplicateError if the request_id is taken, FullError at a limit,
    StagedTooLongError, or psycopg2's UniqueViolation for a repeated custom_id; the call then stores nothing.
    """
    try:
        with db.atomic():
            allow(db, timeout_s)
            if rows:
                copy(db, rows)
            if is_staged:
                kept = db.execute_sql(
                    "DELETE FROM purges WHERE batch_id = %s AND due_time > clock_timestamp()", (batch_id,)
                )
                if not kept.rowcount:
                    raise StagedTooLongError(batch_id)
            batch = _insert(db, batch_id, options, content)
            if limits is not None:
                check_finally(db, limits, New(batch_id, options.tenant, content.total, content.estimated_tokens))
            cut(db, batch, content.plan)
            failpoints.hit("store.before_commit")
    except (StagedTooLongError, psycopg2.errors.UniqueViolation):
        # Raised too if the batch exists: its requests are there, and what was staged is no longer due for removal.
        made = batches.get(db, batch_id) if is_repeated else None
        if made is None:
            raise
        batch = made
    failpoints.hit("store.after_commit")
    sharing.tell_arrival(db)
    return batch


def copy(db: peewee.PostgresqlDatabase, rows: bytes) -> None:
    """Inserts requests in COPY's text format."""
    with db.cursor() as cursor:
        cursor.copy_expert(
            "COPY requests (batch_id, index, custom_id, url, body, prefix, estimated_tokens, model) FROM STDIN",
            io.BytesIO(rows),
            1 << 18,
        )


def _is_stored(db: peewee.PostgresqlDatabase, batch_id: int, rows: bytes) -> bool:
    """True if the first of these rows is stored; they are stored together."""
    index = int(rows.split(b"\t", 2)[1])
    where = "WHERE batch_id = %s AND index = %s"
    return db.execute_sql(f"SELECT FROM requests {where}", (batch_id, index)).fetchone() is not None


def _insert(db: peewee.PostgresqlDatabase, batch_id: int, options: Options, content: Content) -> Batch:
    """Inserts the batch, for requests that are already stored. Raises DuplicateError."""
    row = db.execute_sql(
        f"""
        INSERT INTO batches (id, state, tenant, request_id, digest, metadata, priority, models, total,
                             estimated_tokens, expire_time, traceparent, run_order, webhook_url)
        VALUES (%(id)s, 'in_progress', %(tenant)s, %(request_id)s, %(digest)s, %(metadata)s, %(priority)s, %(models)s,
                %(total)s, %(tokens)s, clock_timestamp() + make_interval(secs => %(window)s), %(traceparent)s,
                %(run_order)s, %(webhook_url)s)
        ON CONFLICT (tenant, request_id) DO NOTHING RETURNING {COLUMNS}
        """,
        {
            "id": batch_id,
            "tenant": options.tenant,
            "request_id": options.request_id,
            "digest": content.digest,
            "metadata": Json(dict(options.metadata or {})),
            "priority": options.priority,
            "models": list(content.models),
            "total": content.total,
            "tokens": content.estimated_tokens,
            "window": options.completion_window_s,
            "traceparent": options.traceparent,
            "run_order": options.run_order,
            "webhook_url": options.webhook_url,
        },
    ).fetchone()
    if row is None:
        assert options.request_id is not None
        first = batches.of_request_id(db, options.tenant, options.request_id)
        if first is not None:
            raise DuplicateError(first)
        # It was deleted in between, so the request_id is free.
        return _insert(db, batch_id, options, content)
    return batches.from_row(row)


def _is_known(db: peewee.PostgresqlDatabase, options: Options) -> bool:
    """True if the tenant has used the request_id before."""
    return options.request_id is not None and batches.of_request_id(db, options.tenant, options.request_id) is not None


def cut(db: peewee.PostgresqlDatabase, batch: Batch, plan: Plan) -> None:
    """Inserts the chunks of a batch and puts it into the queue."""
    store_chunks(db, batch.id, batch.priority, batch.models, batch.total, plan)
    turns.enqueue(db, batch.id)


@acknowledged
def retry(
    db: peewee.PostgresqlDatabase,
    batch_id: int,
    request_id: str | None,
    timeout_s: float,
    limits: Limits,
    traceparent: str | None = None,
    tenant: str | None = None,
) -> Batch | None:
    """Creates a batch of those requests of an ended batch that failed or have no result, for the same tenant.

    None: no such batch, or not of `tenant`.
    A repeated call with the same request_id returns the first retry. Raises StateError if the batch still runs or has
    nothing to retry, DuplicateError if another batch has the request_id, FullError at a limit.
    """
    digest = hashlib.sha256(f"retry of {batch_id}".encode()).digest()
    with db.atomic():
        allow(db, timeout_s)
        batch = batches.lock(db, batch_id, tenant)
        if batch is None:
            return None
        if not batch.is_terminal:
            raise StateError(batch, f"is {batch.state}")
        if request_id is not None:
            first = batches.of_request_id(db, batch.tenant, request_id)
            if first is not None:
                if first.digest != digest:
                    raise DuplicateError(first)
                return first
        new_id = reserve(db)
        check(db, limits, New(new_id, batch.tenant, batch.total - batch.completed, 1))
        total, tokens = db.execute_sql(
            f"""
            WITH made AS (
                INSERT INTO requests (batch_id, index, custom_id, url, body, prefix, estimated_tokens, model)
                SELECT %(new)s, row_number() OVER (ORDER BY q.index) - 1, q.custom_id, q.url, q.body, q.prefix,
                       q.estimated_tokens, q.model
                FROM requests q
                WHERE q.batch_id = %(old)s
                  -- Looked up for each: see NO_RESULT in chunks.py.
                  AND (SELECT r.status_code BETWEEN 200 AND 299 FROM results r
                       WHERE r.batch_id = q.batch_id AND r.index = q.index LIMIT 1) IS NOT TRUE
                RETURNING {TOKENS} AS tokens
            )
            SELECT count(*), coalesce(sum(tokens), 0)::bigint FROM made
            """,
            {"new": new_id, "old": batch_id},
        ).fetchone()
        if not total:
            raise StateError(batch, "has no failed request")
        [webhook_url] = db.execute_sql("SELECT webhook_url FROM batches WHERE id = %s", (batch_id,)).fetchone()
        options = Options(
            request_id,
            batch.metadata,
            batch.priority,
            traceparent=traceparent,
            tenant=batch.tenant,
            run_order=batch.run_order,
            webhook_url=webhook_url,
        )
        content = Content(total, batch.models, digest, tokens, Plan(batch.run_order))
        retried = _insert(db, new_id, options, content)
        check_finally(db, limits, New(new_id, batch.tenant, total, tokens))
        cut(db, retried, content.plan)
        failpoints.hit("retry.before_commit")
    failpoints.hit("retry.after_commit")
    sharing.tell_arrival(db)
    return retried
