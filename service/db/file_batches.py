"""Batches made from files: stored at once, unchecked; a worker checks the file later, and then the batch begins."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import peewee
from psycopg2.extras import Json

from service import failpoints
from service.db import batches, creation, limits, sharing
from service.db.batches import Batch
from service.db.chunks import Holder
from service.db.connection import allow
from service.db.creation import Content
from service.db.limits import Limits, New
from service.db.losses import IS_MISSING
from service.db.standby import acknowledged

# The same create within this time is a repetition whose answer was lost.
REPEAT_S = 900.0
# A file that has ended so many checks, each with its worker or an unknown error, is not checked again.
MAX_ATTEMPTS = 5
# A worker that was not seen for this long is not waited for, even if only that one served the models.
FORGOTTEN_S = 86_400.0
# Of a heartbeat `h`: its worker takes new work.
IS_LIVE = f"h.phase = 'ready' AND h.detail->>'drain' IS NULL AND NOT {IS_MISSING}"


@dataclass(frozen=True)
class Spec:
    """What a client asks for. `models` are those that the file is known to name before it is checked.

    The batch is the tenant's; the file may be any in `scope`, None: of all tenants.
    """

    tenant: str
    scope: str | None
    caller: str
    file_id: int
    endpoint: str
    completion_window: str
    window_s: float
    metadata: Mapping[str, str]
    output_lifetime_s: float | None
    models: Sequence[str]
    call_id: str
    traceparent: str | None
    # Where its event goes; None: where its tenant's go.
    webhook_url: str | None = None

    @property
    def digest(self) -> bytes:
        """The same for the same request of the same caller."""
        content = (
            self.tenant,
            self.caller,
            self.file_id,
            self.endpoint,
            self.completion_window,
            sorted(self.metadata.items()),
            self.output_lifetime_s,
        )
        # As before there were webhooks, for a create that is sent again after an upgrade.
        webhook = () if self.webhook_url is None else (self.webhook_url,)
        return hashlib.sha256(repr(content + webhook).encode()).digest()


@dataclass(frozen=True)
class FileBatch:
    """A batch with what OpenAI's door shows beside. `file_id` None: it was made through gRPC, of no file."""

    batch: Batch
    file_id: int | None
    endpoint: str
    completion_window: str
    errors: Sequence[Mapping[str, Any]] | None
    begin_time: datetime | None
    cancel_time: datetime | None
    output_lifetime_s: float | None


@dataclass(frozen=True)
class Claim:
    """A batch whose file this worker is to check."""

    batch_id: int
    file_id: int
    endpoint: str
    digest: bytes
    attempts: int
    call_id: str
    traceparent: str | None


class ClaimLostError(Exception):
    """The batch is being checked by another worker, or was cancelled."""


_BATCH = ", ".join(f"b.{name.strip()}" for name in batches.COLUMNS.split(","))
_SELECT = f"""
SELECT {_BATCH}, f.file_id,
       coalesce(f.endpoint, (SELECT url FROM requests q WHERE q.batch_id = b.id AND q.index = 0), ''),
       coalesce(f.completion_window, ''), f.errors, coalesce(f.begin_time, CASE WHEN f.file_id IS NULL
       THEN b.create_time END), b.cancel_time, f.output_lifetime_s
FROM batches b LEFT JOIN file_batches f ON f.batch_id = b.id
"""
_AFTER_BATCH = 7


@acknowledged
def create(
    db: peewee.PostgresqlDatabase, spec: Spec, allowed: Limits, is_repeated: bool
) -> tuple[FileBatch, bool] | None:
    """Stores a batch to be checked. Returns it, and False if it was there already. None: there is no such file.

    `is_repeated`: the client says that it sends this again. Otherwise a batch that has failed is not what it means; one
    that was cancelled never is. Raises FullError.
    """
    with db.atomic():
        db.execute_sql("SELECT pg_advisory_xact_lock(%s)", (int.from_bytes(spec.digest[:8], "big", signed=True),))
        over = ["cancelling", "cancelled", *([] if is_repeated else ["failed"])]
        row = db.execute_sql(
            _SELECT + " WHERE f.create_digest = %s AND b.state <> ALL(%s)"
            " AND b.create_time > clock_timestamp() - make_interval(secs => %s) ORDER BY b.id LIMIT 1",
            (spec.digest, over, REPEAT_S),
        ).fetchone()
        if row is not None:
            return _from_row(row), False
        file = db.execute_sql(
            f"SELECT FROM files WHERE id = %(id)s AND {batches.IN_SCOPE} AND state = 'kept'"
            " AND (expire_time IS NULL OR expire_time > clock_timestamp()) FOR SHARE",
            {"id": spec.file_id, "tenant": spec.scope},
        ).fetchone()
        if file is None:
            return None
        batch_id = creation.reserve(db)
        limits.check_finally(db, allowed, New(batch_id, spec.tenant, 0, 0))
        db.execute_sql(
            """
            INSERT INTO batches (id, state, tenant, digest, metadata, priority, models, total, expire_time, traceparent,
                                 webhook_url)
            VALUES (%(id)s, 'validating', %(tenant)s, %(digest)s, %(metadata)s, 0, %(models)s, 0,
                    clock_timestamp() + make_interval(secs => %(window)s), %(traceparent)s, %(webhook_url)s)
            """,
            {
                "id": batch_id,
                "tenant": spec.tenant,
                "digest": spec.digest,
                "metadata": Json(dict(spec.metadata)),
                "models": list(spec.models),
                "window": spec.window_s,
                "traceparent": spec.traceparent,
                "webhook_url": spec.webhook_url,
            },
        )
        db.execute_sql(
            """
            INSERT INTO file_batches (batch_id, file_id, endpoint, completion_window, create_digest, output_lifetime_s,
                                      call_id)
            VALUES (%s, %s, %s, %s, %s, %s, %s)
            """,
            (
                batch_id,
                spec.file_id,
                spec.endpoint,
                spec.completion_window,
                spec.digest,
                spec.output_lifetime_s,
                spec.call_id,
            ),
        )
        failpoints.hit("file_batch.before_commit")
    failpoints.hit("file_batch.after_commit")
    sharing.tell_unchecked(db)
    made = get(db, batch_id)
    assert made is not None
    return made, True


def get(db: peewee.PostgresqlDatabase, batch_id: int, tenant: str | None = None) -> FileBatch | None:
    """One batch, or None. With a tenant, batches of others do not exist, here and below."""
    names = {"id": batch_id, "tenant": tenant}
    row = db.execute_sql(f"{_SELECT} WHERE b.id = %(id)s AND {batches.IN_SCOPE}", names).fetchone()
    return _from_row(row) if row else None


def list_page(
    db: peewee.PostgresqlDatabase, before: int | None, limit: int, tenant: str | None = None
) -> list[FileBatch]:
    """Up to `limit` batches, newest first, older than the batch `before`."""
    where = [] if before is None else ["b.id < %(before)s"]
    if tenant is not None:
        where.append("b.tenant = %(tenant)s")
    condition = f"WHERE {' AND '.join(where)}" if where else ""
    names = {"before": before, "limit": limit, "tenant": tenant}
    rows = db.execute_sql(f"{_SELECT} {condition} ORDER BY b.id DESC LIMIT %(limit)s", names)
    return [_from_row(row) for row in rows.fetchall()]


def claim(db: peewee.PostgresqlDatabase, holder: Holder, models: Sequence[str]) -> Claim | None:
    """Takes the oldest batch that is to be checked, under a lease. None: there is none for this worker.

    A worker that serves what the first line names comes first, and any other if no such worker is there. A batch whose
    models were all found to be away waits for a worker that serves one, unless none may any more: then any worker says
    so. What an earlier life of this worker held is free.

    Call it only while this worker checks nothing: what it holds then is a claim or a release whose answer was lost, as
    in an outage of Postgres. That is free too, and was no attempt.
    """
    failpoints.hit("check.before_claim")
    row = db.execute_sql(
        f"""
        UPDATE file_batches f SET worker_id = %(worker_id)s, incarnation = %(incarnation)s::uuid,
               lease_until = clock_timestamp() + make_interval(secs => %(lease_s)s),
               attempts = attempts + CASE WHEN incarnation = %(incarnation)s::uuid THEN 0 ELSE 1 END
        FROM batches b WHERE b.id = f.batch_id AND f.batch_id = (
            SELECT v.id FROM batches v JOIN file_batches g ON g.batch_id = v.id
            WHERE v.state = 'validating'
              AND (g.lease_until IS NULL OR g.lease_until < clock_timestamp() OR g.worker_id = %(worker_id)s)
              AND CASE WHEN g.away IS NULL THEN v.models <@ %(models)s::text[] OR NOT EXISTS (
                       SELECT FROM heartbeats h WHERE v.models <@ h.models AND {IS_LIVE})
                  ELSE g.away && %(models)s::text[] OR NOT EXISTS (
                       SELECT FROM heartbeats h
                       WHERE h.last_seen > clock_timestamp() - make_interval(secs => %(forgotten)s)
                         AND (g.away && h.models OR h.models = '{{}}' AND h.phase IN ('starting', 'loading')))
                  END
            ORDER BY v.id LIMIT 1 FOR UPDATE OF g SKIP LOCKED)
        RETURNING f.batch_id, f.file_id, f.endpoint, f.create_digest, f.attempts, f.call_id, b.traceparent
        """,
        {
            "worker_id": holder.worker_id,
            "incarnation": str(holder.incarnation),
            "lease_s": holder.lease_s,
            "models": list(models),
            "forgotten": FORGOTTEN_S,
        },
    ).fetchone()
    failpoints.hit("check.after_claim")
    if row is None:
        return None
    batch_id, file_id, endpoint, digest, *rest = row
    return Claim(batch_id, file_id, endpoint, bytes(digest), *rest)


def renew(db: peewee.PostgresqlDatabase, holder: Holder, batch_id: int) -> bool:
    """Renews the lease. False: it is lost."""
    cursor = db.execute_sql(
        """
        UPDATE file_batches f SET lease_until = clock_timestamp() + make_interval(secs => %s)
        FROM batches b WHERE b.id = f.batch_id AND f.batch_id = %s AND f.incarnation = %s::uuid
          AND b.state = 'validating'
        """,
        (holder.lease_s, batch_id, str(holder.incarnation)),
    )
    return bool(cursor.rowcount)


def release(
    db: peewee.PostgresqlDatabase,
    holder: Holder,
    batch_id: int,
    wait_s: float,
    away: Sequence[str] | None = None,
    *,
    is_attempt: bool = False,
) -> None:
    """Gives the batch back, to be taken by anybody after `wait_s`. What was done counts only if it `is_attempt`.

    `away`: it waits for a worker that serves one of these models.
    """
    db.execute_sql(
        """
        UPDATE file_batches SET worker_id = NULL, incarnation = NULL, attempts = attempts - %s, away = %s::text[],
               lease_until = clock_timestamp() + make_interval(secs => %s)
        WHERE batch_id = %s AND incarnation = %s::uuid
        """,
        (int(not is_attempt), None if away is None else list(away), wait_s, batch_id, str(holder.incarnation)),
    )


def clear(db: peewee.PostgresqlDatabase, holder: Holder, batch_id: int, rows: int) -> bool:
    """Removes up to so many requests that an earlier attempt has stored. False: there are none.

    Raises ClaimLostError.
    """
    with db.atomic():
        _fence(db, holder, batch_id, "SHARE")
        removed = db.execute_sql(
            # As in `endings.purge`.
            "DELETE FROM requests WHERE ctid = ANY (ARRAY("
            " SELECT ctid FROM requests WHERE batch_id = %(id)s ORDER BY index LIMIT %(rows)s))",
            {"id": batch_id, "rows": rows},
        ).rowcount
        return bool(removed)


def stage(db: peewee.PostgresqlDatabase, holder: Holder, batch_id: int, rows: bytes) -> None:
    """Stores some of the requests. Raises ClaimLostError, or psycopg2's UniqueViolation for a repeated custom_id."""
    with db.atomic():
        _fence(db, holder, batch_id, "SHARE")
        creation.copy(db, rows)
    failpoints.hit("check.after_stage")


def begin(
    db: peewee.PostgresqlDatabase,
    holder: Holder,
    batch_id: int,
    content: Content,
    rows: bytes,
    timeout_s: float,
    allowed: Limits,
) -> Batch:
    """Stores the last requests and begins the batch. Raises what `stage` raises, or FullError."""
    with db.atomic():
        allow(db, timeout_s)
        _fence(db, holder, batch_id, "UPDATE")
        if rows:
            creation.copy(db, rows)
        row = db.execute_sql(
            "UPDATE batches SET state = 'in_progress', total = %s, models = %s, estimated_tokens = %s WHERE id = %s"
            f" RETURNING {batches.COLUMNS}",
            (content.total, list(content.models), content.estimated_tokens, batch_id),
        ).fetchone()
        batch = batches.from_row(row)
        limits.check_finally(db, allowed, New(batch_id, batch.tenant, content.total, content.estimated_tokens))
        creation.cut(db, batch, content.plan)
        _settle(db, batch_id, "begin_time = clock_timestamp()", {})
        failpoints.hit("check.before_commit")
    failpoints.hit("check.after_commit")
    sharing.tell_arrival(db)
    return batch


def fail(db: peewee.PostgresqlDatabase, holder: Holder, batch_id: int, errors: Sequence[Mapping[str, object]]) -> None:
    """Ends the batch as failed. Raises ClaimLostError."""
    with db.atomic():
        _fence(db, holder, batch_id, "UPDATE")
        db.execute_sql("UPDATE batches SET state = 'failed', end_time = clock_timestamp() WHERE id = %s", (batch_id,))
        _settle(db, batch_id, "errors = %(errors)s", {"errors": Json(list(errors))})
        # What was stored of it.
        db.execute_sql("INSERT INTO purges (batch_id) VALUES (%s) ON CONFLICT DO NOTHING", (batch_id,))
        failpoints.hit("check.before_fail")


def waiting(db: peewee.PostgresqlDatabase) -> tuple[int, float]:
    """How many batches wait to be checked, and the age of the oldest, in seconds; 0 without one."""
    row = db.execute_sql(
        "SELECT count(*), coalesce(extract(epoch FROM clock_timestamp() - min(create_time)), 0)::float8"
        " FROM batches WHERE state = 'validating'"
    ).fetchone()
    return row[0], row[1]


def _fence(db: peewee.PostgresqlDatabase, holder: Holder, batch_id: int, strength: str) -> None:
    """Locks the batch until this transaction ends; it cannot be cancelled or taken meanwhile. Raises ClaimLostError."""
    row = db.execute_sql(
        "SELECT 1 FROM batches b JOIN file_batches f ON f.batch_id = b.id"
        f" WHERE b.id = %s AND b.state = 'validating' AND f.incarnation = %s::uuid FOR {strength}",
        (batch_id, str(holder.incarnation)),
    ).fetchone()
    if row is None:
        raise ClaimLostError(batch_id)


def _settle(db: peewee.PostgresqlDatabase, batch_id: int, what: str, params: Mapping[str, object]) -> None:
    db.execute_sql(
        f"UPDATE file_batches SET {what}, worker_id = NULL, incarnation = NULL, lease_until = NULL"
        " WHERE batch_id = %(id)s",
        {**params, "id": batch_id},
    )


def _from_row(row: Sequence[Any]) -> FileBatch:
    return FileBatch(batches.from_row(row[:-_AFTER_BATCH]), *row[-_AFTER_BATCH:])
