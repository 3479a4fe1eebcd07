"""How batches end: cancelled, expired, deleted or removed for their age; and how their rows are removed."""

import peewee

from service import failpoints
from service.db import batches, file_lists, usage
from service.db.batches import Batch, StateError
from service.db.chunks import IS_UNANSWERED
from service.db.connection import allow
from service.db.standby import acknowledged


@acknowledged
def cancel(db: peewee.PostgresqlDatabase, batch_id: int, tenant: str | None = None) -> Batch | None:
    """Cancels a batch that is in progress or not checked yet; one already cancelled stays so. None: no such batch, or
    not of the tenant.

    Removes its pending chunks. Workers drop the chunks they hold at their next heartbeat; then, or at once if none
    are held, the state becomes `cancelled`. Raises StateError if the batch ended otherwise.
    """
    with db.atomic():
        batch = batches.lock(db, batch_id, tenant)
        if batch is None:
            return None
        if batch.state == "in_progress":
            db.execute_sql(
                "UPDATE batches SET state = 'cancelling', cancel_time = clock_timestamp() WHERE id = %s", (batch_id,)
            )
            # Skips chunks that are being claimed: they count as held.
            db.execute_sql(
                "DELETE FROM chunks WHERE id IN (SELECT id FROM chunks WHERE batch_id = %s AND state = 'pending'"
                " FOR UPDATE SKIP LOCKED)",
                (batch_id,),
            )
            settle_cancelled(db)
            failpoints.hit("cancel.before_commit")
        elif batch.state == "validating":
            # Its check, if one is under way, cannot store anything any more.
            db.execute_sql(
                "UPDATE batches SET state = 'cancelled', cancel_time = clock_timestamp(), end_time = clock_timestamp()"
                " WHERE id = %s",
                (batch_id,),
            )
            _purge_later(db, batch_id)
        elif batch.state not in ("cancelling", "cancelled"):
            raise StateError(batch, f"is {batch.state}")
    failpoints.hit("cancel.after_commit")
    return batches.get(db, batch_id)


def _purge_later(db: peewee.PostgresqlDatabase, batch_id: int) -> None:
    db.execute_sql("INSERT INTO purges (batch_id) VALUES (%s) ON CONFLICT DO NOTHING", (batch_id,))


def settle_cancelled(db: peewee.PostgresqlDatabase) -> int:
    """Ends the batches being cancelled whose chunks no worker holds any more. Returns how many.

    Waits for nobody: a batch that is locked, or has a chunk that is, is left for the next time.
    """
    rows = db.execute_sql(
        """
        WITH due AS MATERIALIZED (
            SELECT id FROM batches b
            WHERE state = 'cancelling'
              AND NOT EXISTS (SELECT FROM chunks c
                              WHERE c.batch_id = b.id AND c.state = 'leased' AND c.lease_until > clock_timestamp())
            ORDER BY id FOR UPDATE SKIP LOCKED
        ), free AS MATERIALIZED (
            SELECT id FROM chunks
            WHERE batch_id IN (SELECT id FROM due) AND (state <> 'leased' OR lease_until <= clock_timestamp())
            ORDER BY id FOR UPDATE SKIP LOCKED
        ), settled AS (
            UPDATE batches b SET state = 'cancelled', end_time = clock_timestamp() FROM due
            WHERE b.id = due.id
              AND NOT EXISTS (SELECT FROM chunks c WHERE c.batch_id = b.id AND c.id NOT IN (SELECT id FROM free))
            RETURNING b.id
        ), dropped AS (
            DELETE FROM chunks WHERE id IN (SELECT id FROM free) AND batch_id IN (SELECT id FROM settled)
        )
        SELECT id FROM settled
        """
    ).fetchall()
    return len(rows)


def expire(db: peewee.PostgresqlDatabase, timeout_s: float) -> list[int]:
    """Ends batches whose completion window is over: requests without a result get `batch_expired`. Returns their ids.

    One that is running at a time, in a transaction of its own: no result of it can be stored until that has ended.

    Those that no worker has checked by then have no requests yet.

    The same transaction removes their chunks, so that a worker still working on one cannot store anything.
    """
    expired = []
    with db.atomic():
        allow(db, timeout_s)
        due = db.execute_sql(
            "SELECT id FROM batches WHERE state = 'in_progress' AND expire_time < clock_timestamp() ORDER BY id LIMIT 1"
        ).fetchall()
        # All chunks before all batches, as writing results does.
        ids = [batch_id for (batch_id,) in due]
        if ids:
            db.execute_sql("SELECT FROM chunks WHERE batch_id = ANY(%s) ORDER BY id FOR UPDATE", (ids,))
        for batch_id in ids:
            batch = batches.lock(db, batch_id)
            if batch is None or batch.state != "in_progress":
                continue
            db.execute_sql("DELETE FROM chunks WHERE batch_id = %s", (batch_id,))
            db.execute_sql(
                f"""
                WITH rest AS (
                    INSERT INTO results (batch_id, index, sequence, error_code, error_message, incarnation, custom_id)
                    SELECT q.batch_id, q.index, b.completed + b.failed + row_number() OVER (ORDER BY q.index),
                           'batch_expired',
                           'This request could not be executed before the completion window expired.',
                           '00000000-0000-0000-0000-000000000000', q.custom_id
                    FROM requests q JOIN batches b ON b.id = q.batch_id
                    WHERE q.batch_id = %(id)s
                      AND {IS_UNANSWERED}
                    RETURNING index
                )
                UPDATE batches SET state = 'expired', end_time = clock_timestamp(),
                       failed = failed + (SELECT count(*) FROM rest)
                WHERE id = %(id)s
                """,
                {"id": batch_id},
            )
            expired.append(batch_id)
        unchecked = db.execute_sql(
            """
            WITH over AS (
                SELECT id FROM batches WHERE state = 'validating' AND expire_time < clock_timestamp()
                ORDER BY id LIMIT 10 FOR UPDATE
            ), purged AS (INSERT INTO purges (batch_id) SELECT id FROM over ON CONFLICT DO NOTHING)
            UPDATE batches b SET state = 'expired', end_time = clock_timestamp() FROM over WHERE b.id = over.id
            RETURNING b.id
            """
        )
        expired += [row[0] for row in unchecked.fetchall()]
        if expired:
            failpoints.hit("expire.before_commit")
    if expired:
        failpoints.hit("expire.after_commit")
    return expired


@acknowledged
def delete(db: peewee.PostgresqlDatabase, batch_id: int, tenant: str | None = None) -> bool:
    """Deletes an ended batch; `purge` removes its rows. False: no such batch, or not of the tenant.

    Raises StateError if it has not ended.
    """
    with db.atomic():
        batch = batches.lock(db, batch_id, tenant)
        if batch is None:
            return False
        if not batch.is_terminal:
            raise StateError(batch, f"is {batch.state}")
        usage.count_ended(db, 1, batch_id)
        _purge_later(db, batch_id)
        file_lists.remember_output(db, [batch_id])
        db.execute_sql("DELETE FROM batches WHERE id = %s", (batch_id,))
        failpoints.hit("delete.before_commit")
    failpoints.hit("delete.after_commit")
    return True


def delete_old(db: peewee.PostgresqlDatabase, retention_s: float) -> list[int]:
    """Deletes up to 100 batches that ended more than `retention_s` ago and are counted. Returns their ids."""
    with db.atomic():
        old = db.execute_sql(
            "SELECT id FROM batches WHERE end_time < clock_timestamp() - make_interval(secs => %s) AND is_counted"
            " ORDER BY end_time LIMIT 100 FOR UPDATE SKIP LOCKED",
            (retention_s,),
        ).fetchall()
        ids = [batch_id for (batch_id,) in old]
        if ids:
            file_lists.remember_output(db, ids)
            db.execute_sql("INSERT INTO purges (batch_id) SELECT unnest(%s) ON CONFLICT DO NOTHING", (ids,))
            db.execute_sql("DELETE FROM batches WHERE id = ANY(%s)", (ids,))
    return ids


def purge(db: peewee.PostgresqlDatabase, slice_size: int) -> bool:
    """Removes up to `slice_size` rows per table of one batch that was deleted, or staged and never created.

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
        # By their places: whatever Postgres believes of the batch, it cannot compare each row with each other.
        for table, column in (("results", "index"), ("requests", "index"), ("chunks", "first_index")):
            removed += db.execute_sql(
                f"""
                DELETE FROM {table} WHERE ctid = ANY (ARRAY(
                    SELECT ctid FROM {table} WHERE batch_id = %(id)s ORDER BY {column} LIMIT %(size)s))
                """,
                {"id": row[0], "size": slice_size},
            ).rowcount
        if not removed:
            db.execute_sql("DELETE FROM purges WHERE batch_id = %s", row)
        failpoints.hit("purge.before_commit")
    failpoints.hit("purge.after_commit")
    return True
