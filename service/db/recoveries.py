"""The audit log of recovery. Its times are those of the watchdog's host."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

import peewee

from service.db.models import RecoveryEvent

OPEN = "open"
# What a restart spends its time on, in this order.
PHASES = ("detect", "decide", "evidence", "stop", "sweep", "gpu", "start", "load")


@dataclass(frozen=True)
class Event:
    """One entry of the audit log. `timings` in seconds by phase; `id` 0: Postgres does not have it yet."""

    id: int
    # What tells it from others before it has an id.
    key: UUID
    worker_id: str
    kind: str
    verdict: str
    reason: str
    evidence: Mapping[str, Any]
    step: str
    outcome: str
    timings: Mapping[str, float]
    start_time: datetime
    end_time: datetime | None
    old_incarnation: UUID | None
    new_incarnation: UUID | None


def put(db: peewee.PostgresqlDatabase, event: Event) -> int:
    """Writes an event as it is now, also if it is there already, unless it has ended there. Returns its id."""
    row = {getattr(RecoveryEvent, name): value for name, value in vars(event).items() if name != "id"}
    with db.atomic():
        if event.outcome == OPEN:
            # One is open at a time. Another can only be of a watchdog whose journal is lost.
            RecoveryEvent.update(outcome="superseded", end_time=event.start_time).where(
                RecoveryEvent.worker_id == event.worker_id,
                RecoveryEvent.outcome == OPEN,
                RecoveryEvent.key != event.key,
            ).execute(db)
        is_it = RecoveryEvent.key == event.key
        # Not as one statement: an insert that turns into an update takes a number all the same.
        RecoveryEvent.update(
            step=event.step,
            outcome=event.outcome,
            timings=event.timings,
            end_time=event.end_time,
            new_incarnation=event.new_incarnation,
        ).where(is_it, RecoveryEvent.outcome == OPEN).execute(db)
        find = RecoveryEvent.select(RecoveryEvent.id).where(is_it)
        if find.scalar(db) is None:
            RecoveryEvent.insert(row).on_conflict_ignore().execute(db)
        return int(find.scalar(db))


def of_note(db: peewee.PostgresqlDatabase, worker_id: str, since: datetime) -> list[Event]:
    """What decisions about a worker are made of, oldest first.

    That is its restarts since then, the open one however old, and the last event of each other kind.
    """
    mine = (RecoveryEvent.worker_id == worker_id) & (RecoveryEvent.kind != "verdict")
    is_recent = (RecoveryEvent.start_time > since) | (RecoveryEvent.outcome == OPEN)
    is_restart = RecoveryEvent.kind == "restart"
    last = RecoveryEvent.select(peewee.fn.max(RecoveryEvent.id)).where(mine, ~is_restart).group_by(RecoveryEvent.kind)
    query = (
        RecoveryEvent.select()
        .where(mine, (is_restart & is_recent) | RecoveryEvent.id.in_(last))
        .order_by(RecoveryEvent.id)
    )
    return [_event(row) for row in query.bind(db).dicts()]


def given_up(db: peewee.PostgresqlDatabase) -> set[str]:
    """The workers whose budget was spent and not given back."""
    rows = db.execute_sql(
        "SELECT DISTINCT ON (worker_id) worker_id, kind FROM recovery_events WHERE kind IN ('gave_up', 'budget_reset')"
        " ORDER BY worker_id, id DESC"
    ).fetchall()
    return {worker_id for worker_id, kind in rows if kind == "gave_up"}


def last_timings(db: peewee.PostgresqlDatabase) -> dict[str, Mapping[str, float]]:
    """How long the last restart that succeeded took, in seconds by phase, of each worker that had one."""
    rows = db.execute_sql(
        "SELECT DISTINCT ON (worker_id) worker_id, timings FROM recovery_events"
        " WHERE kind = 'restart' AND outcome = 'recovered' ORDER BY worker_id, id DESC"
    ).fetchall()
    return dict(rows)


def uptime_s(db: peewee.PostgresqlDatabase) -> float:
    """How long Postgres has been up."""
    row = db.execute_sql("SELECT extract(epoch FROM clock_timestamp() - pg_postmaster_start_time())::float8").fetchone()
    return float(row[0])


def list_page(db: peewee.PostgresqlDatabase, worker_id: str | None, before: int | None, limit: int) -> list[Event]:
    """Up to `limit` events, newest first, of one worker or of all, older than the event `before`."""
    query = RecoveryEvent.select().order_by(RecoveryEvent.id.desc()).limit(limit)
    if worker_id is not None:
        query = query.where(RecoveryEvent.worker_id == worker_id)
    if before is not None:
        query = query.where(RecoveryEvent.id < before)
    return [_event(row) for row in query.bind(db).dicts()]


def _event(row: Any) -> Event:
    # Postgres keeps the keys of jsonb in an order of its own.
    timings = {phase: row["timings"][phase] for phase in PHASES if phase in row["timings"]}
    return Event(**(row | {"timings": timings}))
