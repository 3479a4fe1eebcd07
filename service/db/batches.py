"""Batches: stored whole or not at all, read, listed."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Protocol

import peewee
from psycopg2.extras import Json

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
class Options:
    """What a client says about a batch beside its requests. `completion_window_s` None: never expires."""

    request_id: str | None = None
    metadata: Mapping[str, str] | None = None
    priority: int = 0
    completion_window_s: float | None = None


class RowSource(Protocol):
    """The requests of a new batch, read by COPY as they arrive; what is known of them is known at the end."""

    def read(self, size: int) -> bytes:
        """At most about `size` bytes of rows in Postgres' text format; b"" at the end. May raise: nothing is stored."""

    @property
    def total(self) -> int:
        """How many requests there were."""

    @property
    def models(self) -> Iterable[str]:
        """The models they name."""

    @property
    def digest(self) -> bytes:
        """Hash of content and options."""


class DuplicateError(Exception):
    """The request_id is taken; `batch` is the one that has it."""

    def __init__(self, batch: Batch) -> None:
        super().__init__(f"request_id {batch.request_id!r} is batch {batch.id}")
        self.batch = batch


def store(db: peewee.PostgresqlDatabase, options: Options, make_rows: Any, timeout_s: float) -> Batch:
    """Stores a batch with its requests and chunks in one transaction.

    `make_rows(batch_id)` gives the `RowSource`; what its `read` raises travels up and nothing is stored.
    Raises DuplicateError when the request_id is taken, psycopg2's UniqueViolation for a repeated custom_id.
    """
    with db.atomic():
        db.execute_sql("SELECT set_config('statement_timeout', %s, true)", (str(round(timeout_s * 1000)),))
        batch_id = db.execute_sql("SELECT nextval(pg_get_serial_sequence('batches', 'id'))").fetchone()[0]
        rows: RowSource = make_rows(batch_id)
        with db.cursor() as cursor:
            cursor.copy_expert("COPY requests (batch_id, index, custom_id, url, body) FROM STDIN", rows, size=1 << 18)
        stored = db.execute_sql(
            f"""
            INSERT INTO batches (id, state, request_id, digest, metadata, priority, models, total, expire_time)
            VALUES (%(id)s, 'in_progress', %(request_id)s, %(digest)s, %(metadata)s, %(priority)s, %(models)s,
                    %(total)s, clock_timestamp() + make_interval(secs => %(window)s))
            ON CONFLICT (request_id) DO NOTHING RETURNING {COLUMNS}
            """,
            {
                "id": batch_id,
                "request_id": options.request_id,
                "digest": rows.digest,
                "metadata": Json(dict(options.metadata or {})),
                "priority": options.priority,
                "models": sorted(rows.models),
                "total": rows.total,
                "window": options.completion_window_s,
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
