"""Batches: stored whole or not at all, read, listed."""

import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import peewee
from psycopg2.extras import Json

from service import failpoints
from service.db.connection import allow

# Requests per chunk: small enough that a chunk is soon done and spreads over workers, large enough that claiming
# costs nothing beside running. A million requests are 10,000 chunks.
CHUNK_SIZE = 100

COLUMNS = (
    "id, state, request_id, metadata, priority, models, total, completed, failed, prompt_tokens, completion_tokens,"
    " create_time, start_time, end_time, expire_time, digest"
)


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
    create_time: datetime
    start_time: datetime | None
    end_time: datetime | None
    expire_time: datetime | None
    digest: bytes

    @property
    def is_terminal(self) -> bool:
        """True when nothing about it changes any more."""
        return self.state in TERMINAL


TERMINAL = frozenset({"completed", "failed", "expired", "cancelled"})


@dataclass(frozen=True)
class Limits:
    """How much may be open at once."""

    open_batches: int
    queued_requests: int


@dataclass(frozen=True)
class Options:
    """What a client says about a batch beside its requests. `completion_window_s` None: never expires.

    `traceparent`: the trace in which its requests run.
    """

    request_id: str | None = None
    metadata: Mapping[str, str] | None = None
    priority: int = 0
    completion_window_s: float | None = None
    traceparent: str | None = None


@dataclass(frozen=True)
class Content:
    """What the requests of a new batch come to: how many, the models they name, a hash of content and options."""

    total: int
    models: Sequence[str]
    digest: bytes


class FullError(Exception):
    """A limit on what may be open at once is reached."""

    def __init__(self, what: str, limit: int, value: int) -> None:
        super().__init__(f"{what}: {value}, at most {limit} are allowed")
        self.what, self.limit, self.value = what, limit, value


class StateError(Exception):
    """The batch is in a state in which this cannot be done."""

    def __init__(self, batch: "Batch", why: str) -> None:
        super().__init__(why)
        self.batch = batch


class StagedTooLongError(Exception):
    """What was staged for a batch is due to be removed, or has been."""


class DuplicateError(Exception):
    """The request_id is taken; `batch` is the one that has it."""

    def __init__(self, batch: Batch) -> None:
        super().__init__(f"request_id {batch.request_id!r} is batch {batch.id}")
        self.batch = batch


def reserve(db: peewee.PostgresqlDatabase, limits: Limits | None = None) -> int:
    """The number of a batch that is going to be created. Raises FullError when it could not be at this moment."""
    if limits is not None:
        _check_limits(db, limits, 0)
    return int(db.execute_sql("SELECT nextval(pg_get_serial_sequence('batches', 'id'))").fetchone()[0])


def stage(db: peewee.PostgresqlDatabase, batch_id: int, rows: bytes, lease_s: float) -> None:
    """Stores some requests of a batch that does not exist yet: rows in COPY's text format, seen by nobody.

    A large upload goes in by such pieces, so that neither a transaction nor a connection lasts as long as its client
    takes. What does not become a batch by `create` within `lease_s` is removed by `purge`. Raises psycopg2's
    UniqueViolation for a repeated custom_id.
    """
    with db.atomic():
        db.execute_sql(
            "INSERT INTO purges (batch_id, due_time) VALUES (%s, clock_timestamp() + make_interval(secs => %s))"
            " ON CONFLICT DO NOTHING",
            (batch_id, lease_s),
        )
        _copy(db, rows)
    failpoints.hit("stage.after_commit")


def abandon(db: peewee.PostgresqlDatabase, batch_id: int) -> None:
    """Has what was staged for a batch removed."""
    db.execute_sql("UPDATE purges SET due_time = clock_timestamp() WHERE batch_id = %s", (batch_id,))


def create(
    db: peewee.PostgresqlDatabase,
    batch_id: int,
    options: Options,
    content: Content,
    rows: bytes,
    is_staged: bool,
    timeout_s: float,
    limits: Limits | None = None,
) -> Batch:
    """Creates a reserved batch in one transaction: `rows`, which are all its requests or the rest after `stage`.

    Raises DuplicateError when the request_id is taken, FullError at a limit, StagedTooLongError, psycopg2's
    UniqueViolation for a repeated custom_id; then nothing of this call is stored.
    """
    with db.atomic():
        allow(db, timeout_s)
        if limits is not None:
            _check_limits(db, limits, content.total)
        if rows:
            _copy(db, rows)
        if is_staged:
            kept = db.execute_sql(
                "DELETE FROM purges WHERE batch_id = %s AND due_time > clock_timestamp()", (batch_id,)
            )
            if not kept.rowcount:
                raise StagedTooLongError(batch_id)
        batch = _insert(db, batch_id, options, content)
        failpoints.hit("store.before_commit")
    failpoints.hit("store.after_commit")
    return batch


def _copy(db: peewee.PostgresqlDatabase, rows: bytes) -> None:
    with db.cursor() as cursor:
        cursor.copy_expert(
            "COPY requests (batch_id, index, custom_id, url, body) FROM STDIN", io.BytesIO(rows), 1 << 18
        )


def _check_limits(db: peewee.PostgresqlDatabase, limits: Limits, more: int) -> None:
    """Raises FullError. Batches that are stored at the same moment are not seen: the limits may be passed by these."""
    open_batches, queued = db.execute_sql(
        "SELECT count(*), coalesce(sum(total - completed - failed), 0)::bigint FROM batches WHERE state = 'in_progress'"
    ).fetchone()
    if open_batches >= limits.open_batches:
        raise FullError("batches open", limits.open_batches, open_batches + 1)
    if queued + more > limits.queued_requests:
        raise FullError("requests queued", limits.queued_requests, queued + more)


def _insert(db: peewee.PostgresqlDatabase, batch_id: int, options: Options, content: Content) -> Batch:
    """The batch and its chunks, for requests that are stored already. Raises DuplicateError."""
    stored = db.execute_sql(
        f"""
        INSERT INTO batches (id, state, request_id, digest, metadata, priority, models, total, expire_time,
                             traceparent)
        VALUES (%(id)s, 'in_progress', %(request_id)s, %(digest)s, %(metadata)s, %(priority)s, %(models)s,
                %(total)s, clock_timestamp() + make_interval(secs => %(window)s), %(traceparent)s)
        ON CONFLICT (request_id) DO NOTHING RETURNING {COLUMNS}
        """,
        {
            "id": batch_id,
            "request_id": options.request_id,
            "digest": content.digest,
            "metadata": Json(dict(options.metadata or {})),
            "priority": options.priority,
            "models": list(content.models),
            "total": content.total,
            "window": options.completion_window_s,
            "traceparent": options.traceparent,
        },
    ).fetchone()
    if stored is None:
        raise DuplicateError(_by(db, "request_id", options.request_id))
    batch = _batch(stored)
    db.execute_sql(
        """
        INSERT INTO chunks (batch_id, first_index, count, unfinished, priority, models)
        SELECT %(id)s, first, least(%(size)s, %(total)s - first), least(%(size)s, %(total)s - first),
               %(priority)s, %(models)s::text[]
        FROM generate_series(0, %(total)s - 1, %(size)s) AS first
        """,
        {
            "id": batch.id,
            "size": CHUNK_SIZE,
            "total": batch.total,
            "priority": batch.priority,
            "models": list(batch.models),
        },
    )
    return batch


def cancel(db: peewee.PostgresqlDatabase, batch_id: int) -> Batch | None:
    """Cancels a batch that is in progress; one that is cancelled already stays so. None: there is none.

    What waits is removed here. What a worker holds it drops when it finds the batch cancelled at its next beat;
    then, or at once if nothing is held, the batch is cancelled for good. Raises StateError for one that ended
    otherwise.
    """
    with db.atomic():
        batch = _locked(db, batch_id)
        if batch is None:
            return None
        if batch.state == "in_progress":
            db.execute_sql("UPDATE batches SET state = 'cancelling' WHERE id = %s", (batch_id,))
            # What is being claimed at this moment is skipped: it counts as held.
            db.execute_sql(
                "DELETE FROM chunks WHERE id IN (SELECT id FROM chunks WHERE batch_id = %s AND state = 'pending'"
                " FOR UPDATE SKIP LOCKED)",
                (batch_id,),
            )
            settle_cancelled(db)
            failpoints.hit("cancel.before_commit")
        elif batch.state not in ("cancelling", "cancelled"):
            raise StateError(batch, f"is {batch.state}")
    failpoints.hit("cancel.after_commit")
    return get(db, batch_id)


def settle_cancelled(db: peewee.PostgresqlDatabase) -> int:
    """Ends the batches being cancelled of which no worker holds anything any more. Returns how many."""
    rows = db.execute_sql(
        """
        WITH settled AS (
            UPDATE batches b SET state = 'cancelled', end_time = clock_timestamp()
            WHERE state = 'cancelling'
              AND NOT EXISTS (SELECT FROM chunks c
                              WHERE c.batch_id = b.id AND c.state = 'leased' AND c.lease_until > clock_timestamp())
            RETURNING id
        ), dropped AS (DELETE FROM chunks WHERE batch_id IN (SELECT id FROM settled))
        SELECT id FROM settled
        """
    ).fetchall()
    return len(rows)


def expire(db: peewee.PostgresqlDatabase, timeout_s: float) -> list[int]:
    """Ends the batches whose completion window is over: what has no result gets `batch_expired`. Returns their ids.

    Their chunks are gone with the same transaction, so that whoever still works on one cannot store anything.
    """
    expired = []
    with db.atomic():
        allow(db, timeout_s)
        due = db.execute_sql(
            "SELECT id FROM batches WHERE state = 'in_progress' AND expire_time < clock_timestamp()"
            " ORDER BY id LIMIT 10"
        ).fetchall()
        for (batch_id,) in due:
            # Chunks before their batch, as who writes results does.
            db.execute_sql("SELECT FROM chunks WHERE batch_id = %s ORDER BY id FOR UPDATE", (batch_id,))
            batch = _locked(db, batch_id)
            if batch is None or batch.state != "in_progress":
                continue
            db.execute_sql("DELETE FROM chunks WHERE batch_id = %s", (batch_id,))
            db.execute_sql(
                """
                WITH rest AS (
                    INSERT INTO results (batch_id, index, sequence, error_code, error_message, incarnation, custom_id)
                    SELECT q.batch_id, q.index, b.completed + b.failed + row_number() OVER (ORDER BY q.index),
                           'batch_expired',
                           'This request could not be executed before the completion window expired.',
                           '00000000-0000-0000-0000-000000000000', q.custom_id
                    FROM requests q JOIN batches b ON b.id = q.batch_id
                    WHERE q.batch_id = %(id)s
                      AND NOT EXISTS (SELECT FROM results r WHERE r.batch_id = q.batch_id AND r.index = q.index)
                    RETURNING index
                )
                UPDATE batches SET state = 'expired', end_time = clock_timestamp(),
                       failed = failed + (SELECT count(*) FROM rest)
                WHERE id = %(id)s
                """,
                {"id": batch_id},
            )
            expired.append(batch_id)
        if expired:
            failpoints.hit("expire.before_commit")
    if expired:
        failpoints.hit("expire.after_commit")
    return expired


def delete(db: peewee.PostgresqlDatabase, batch_id: int) -> bool:
    """Deletes a batch that has ended. Its rows are removed by `purge`. False: there is none. Raises StateError."""
    with db.atomic():
        batch = _locked(db, batch_id)
        if batch is None:
            return False
        if not batch.is_terminal:
            raise StateError(batch, f"is {batch.state}")
        db.execute_sql("INSERT INTO purges (batch_id) VALUES (%s)", (batch_id,))
        db.execute_sql("DELETE FROM batches WHERE id = %s", (batch_id,))
        failpoints.hit("delete.before_commit")
    failpoints.hit("delete.after_commit")
    return True


def delete_old(db: peewee.PostgresqlDatabase, retention_s: float) -> list[int]:
    """Deletes the batches that ended longer ago than `retention_s`, some at a time. Returns their ids."""
    rows = db.execute_sql(
        """
        WITH old AS (
            SELECT id FROM batches WHERE end_time < clock_timestamp() - make_interval(secs => %s)
            ORDER BY end_time LIMIT 100 FOR UPDATE SKIP LOCKED
        ), gone AS (DELETE FROM batches WHERE id IN (SELECT id FROM old) RETURNING id)
        INSERT INTO purges (batch_id) SELECT id FROM gone RETURNING batch_id
        """,
        (retention_s,),
    ).fetchall()
    return [row[0] for row in rows]


def purge(db: peewee.PostgresqlDatabase, slice_size: int) -> bool:
    """Removes up to `slice_size` rows of each kind of a batch that was deleted, or staged and never created.

    False: there was nothing to do.
    """
    with db.atomic():
        row = db.execute_sql(
            "SELECT batch_id FROM purges WHERE due_time <= clock_timestamp() ORDER BY batch_id LIMIT 1"
            " FOR UPDATE SKIP LOCKED"
        ).fetchone()
        if row is None:
            return False
        removed = 0
        for table, column in (("results", "index"), ("requests", "index"), ("chunks", "first_index")):
            removed += db.execute_sql(
                f"""
                DELETE FROM {table} WHERE batch_id = %(id)s AND {column} IN (
                    SELECT {column} FROM {table} WHERE batch_id = %(id)s ORDER BY {column} LIMIT %(size)s)
                """,
                {"id": row[0], "size": slice_size},
            ).rowcount
        if not removed:
            db.execute_sql("DELETE FROM purges WHERE batch_id = %s", row)
        failpoints.hit("purge.before_commit")
    failpoints.hit("purge.after_commit")
    return True


def retry(
    db: peewee.PostgresqlDatabase,
    batch_id: int,
    request_id: str | None,
    timeout_s: float,
    limits: Limits,
    traceparent: str | None = None,
) -> Batch | None:
    """A new batch of the requests of an ended batch that failed or have no result. None: there is no such batch.

    The same again under the same request_id gives the first. Raises StateError while the batch runs or when there
    is nothing to run again, DuplicateError when the request_id is taken by another batch, FullError.
    """
    digest = hashlib.sha256(f"retry of {batch_id}".encode()).digest()
    with db.atomic():
        allow(db, timeout_s)
        batch = _locked(db, batch_id)
        if batch is None:
            return None
        if not batch.is_terminal:
            raise StateError(batch, f"is {batch.state}")
        if request_id is not None:
            taken = db.execute_sql(f"SELECT {COLUMNS} FROM batches WHERE request_id = %s", (request_id,)).fetchone()
            if taken is not None:
                first = _batch(taken)
                if first.digest != digest:
                    raise DuplicateError(first)
                return first
        _check_limits(db, limits, batch.total - batch.completed)
        new_id = reserve(db)
        total = db.execute_sql(
            """
            INSERT INTO requests (batch_id, index, custom_id, url, body)
            SELECT %(new)s, row_number() OVER (ORDER BY q.index) - 1, q.custom_id, q.url, q.body FROM requests q
            WHERE q.batch_id = %(old)s
              AND NOT EXISTS (SELECT FROM results r WHERE r.batch_id = q.batch_id AND r.index = q.index
                              AND r.status_code BETWEEN 200 AND 299)
            """,
            {"new": new_id, "old": batch_id},
        ).rowcount
        if not total:
            raise StateError(batch, "has no failed request")
        options = Options(request_id, batch.metadata, batch.priority, traceparent=traceparent)
        retried = _insert(db, new_id, options, Content(total, batch.models, digest))
        failpoints.hit("retry.before_commit")
    failpoints.hit("retry.after_commit")
    return retried


def _locked(db: peewee.PostgresqlDatabase, batch_id: int) -> Batch | None:
    row = db.execute_sql(f"SELECT {COLUMNS} FROM batches WHERE id = %s FOR UPDATE", (batch_id,)).fetchone()
    return _batch(row) if row else None


def get(db: peewee.PostgresqlDatabase, batch_id: int) -> Batch | None:
    """One batch, or None."""
    row = db.execute_sql(f"SELECT {COLUMNS} FROM batches WHERE id = %s", (batch_id,)).fetchone()
    return _batch(row) if row else None


def get_many(db: peewee.PostgresqlDatabase, ids: Sequence[int]) -> dict[int, Batch]:
    """Several batches by id, without those that do not exist."""
    rows = db.execute_sql(f"SELECT {COLUMNS} FROM batches WHERE id = ANY(%s)", (list(ids),))
    return {row[0]: _batch(row) for row in rows.fetchall()}


def list_page(db: peewee.PostgresqlDatabase, states: Sequence[str], before: int | None, limit: int) -> list[Batch]:
    """Up to `limit` batches, newest first, in one of `states` (none: all), older than the batch `before`."""
    where, params = [], {"limit": limit, "states": list(states), "before": before}
    if states:
        where.append("state = ANY(%(states)s)")
    if before is not None:
        where.append("id < %(before)s")
    condition = f"WHERE {' AND '.join(where)}" if where else ""
    rows = db.execute_sql(f"SELECT {COLUMNS} FROM batches {condition} ORDER BY id DESC LIMIT %(limit)s", params)
    return [_batch(row) for row in rows.fetchall()]


def _by(db: peewee.PostgresqlDatabase, column: str, value: object) -> Batch:
    row = db.execute_sql(f"SELECT {COLUMNS} FROM batches WHERE {column} = %s", (value,)).fetchone()
    return _batch(row)


def _batch(row: Sequence[Any]) -> Batch:
    values = list(row)
    values[-1] = bytes(values[-1])
    return Batch(*values)
