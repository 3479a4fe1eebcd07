"""The audit log of recovery, with the restarts that are not finished, the budget and the pauses that follow from it."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

import peewee

from service.db.models import RecoveryEvent

NOW = peewee.SQL("clock_timestamp()")
OPEN = "open"
# What a restart spends its time on, in this order.
PHASES = ("detect", "decide", "stop", "sweep", "start", "load")


@dataclass(frozen=True)
class Event:
    """One entry of the audit log. `timings` in seconds by phase."""

    id: int
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


@dataclass(frozen=True)
class Standing:
    """What persons have ordered for a worker. `last_reset`: id of the last `budget_reset`, 0 without one."""

    pause_left_s: float
    pause_end_time: datetime | None
    pause_reason: str
    last_reset: int


def begin(
    db: peewee.PostgresqlDatabase,
    worker_id: str,
    verdict: str,
    reason: str,
    evidence: Mapping[str, Any],
    timings: Mapping[str, float],
    old_incarnation: UUID | None,
) -> Event:
    """Writes the intent to restart a worker. If there is an open one, of whatever watchdog, returns that instead."""
    row = {
        RecoveryEvent.worker_id: worker_id,
        RecoveryEvent.kind: "restart",
        RecoveryEvent.verdict: verdict,
        RecoveryEvent.reason: reason,
        RecoveryEvent.evidence: evidence,
        RecoveryEvent.step: "stopping",
        RecoveryEvent.outcome: OPEN,
        RecoveryEvent.timings: timings,
        RecoveryEvent.start_time: NOW,
        RecoveryEvent.old_incarnation: old_incarnation,
    }
    with db.atomic():
        RecoveryEvent.insert(row).on_conflict_ignore().execute(db)
        event = open_intent(db, worker_id)
    if event is None:
        raise peewee.OperationalError("the intent is gone already: another watchdog is at work")
    return event


def open_intent(db: peewee.PostgresqlDatabase, worker_id: str) -> Event | None:
    """The restart of a worker that is not finished, or None."""
    query = RecoveryEvent.select().where(RecoveryEvent.worker_id == worker_id, RecoveryEvent.outcome == OPEN)
    return next((_event(row) for row in query.bind(db).dicts()), None)


def advance(db: peewee.PostgresqlDatabase, event_id: int, step: str, timings: Mapping[str, float]) -> None:
    """Writes how far a restart has come. An intent that is closed stays as it is."""
    RecoveryEvent.update(step=step, timings=timings).where(
        RecoveryEvent.id == event_id, RecoveryEvent.outcome == OPEN
    ).execute(db)


def close(
    db: peewee.PostgresqlDatabase,
    event_id: int,
    outcome: str,
    timings: Mapping[str, float],
    new_incarnation: UUID | None,
) -> None:
    """Ends a restart as `recovered`, `failed` or `superseded`. One that has ended stays as it is."""
    RecoveryEvent.update(outcome=outcome, timings=timings, new_incarnation=new_incarnation, end_time=NOW).where(
        RecoveryEvent.id == event_id, RecoveryEvent.outcome == OPEN
    ).execute(db)


def add(
    db: peewee.PostgresqlDatabase,
    worker_id: str,
    kind: str,
    verdict: str,
    reason: str,
    evidence: Mapping[str, Any],
    lasts_s: float = 0,
) -> datetime:
    """Writes an event that is no restart. Returns when it ends: for a pause after `lasts_s`, else now."""
    row = {
        RecoveryEvent.worker_id: worker_id,
        RecoveryEvent.kind: kind,
        RecoveryEvent.verdict: verdict,
        RecoveryEvent.reason: reason,
        RecoveryEvent.evidence: evidence,
        RecoveryEvent.step: "",
        RecoveryEvent.outcome: "",
        RecoveryEvent.timings: {},
        RecoveryEvent.start_time: NOW,
        RecoveryEvent.end_time: peewee.SQL("clock_timestamp() + make_interval(secs => %s)", (lasts_s,)),
    }
    written = RecoveryEvent.insert(row).returning(RecoveryEvent.end_time).execute(db)
    end_time: datetime = next(iter(written)).end_time
    return end_time


def standing(db: peewee.PostgresqlDatabase, worker_id: str) -> Standing:
    """What persons have ordered for a worker, by the database's clock."""
    row = db.execute_sql(
        """
        SELECT extract(epoch FROM p.end_time - clock_timestamp())::float8, p.end_time, p.reason, r.id
        FROM (SELECT max(id) AS id FROM recovery_events WHERE worker_id = %(worker)s AND kind = 'budget_reset') r
        LEFT JOIN (
            SELECT kind, end_time, reason FROM recovery_events
            WHERE worker_id = %(worker)s AND kind IN ('paused', 'resumed') ORDER BY id DESC LIMIT 1
        ) p ON p.kind = 'paused' AND p.end_time > clock_timestamp()
        """,
        {"worker": worker_id},
    ).fetchone()
    left_s, end_time, reason, last_reset = row
    return Standing(left_s or 0.0, end_time, reason or "", last_reset or 0)


def restart_ages(db: peewee.PostgresqlDatabase, worker_id: str, within_s: float) -> list[float]:
    """How long ago each restart of the last `within_s` began, oldest first, without those before a budget reset."""
    rows = db.execute_sql(
        """
        SELECT extract(epoch FROM clock_timestamp() - start_time)::float8 AS age_s FROM recovery_events
        WHERE worker_id = %(worker)s AND kind = 'restart'
          AND start_time > clock_timestamp() - make_interval(secs => %(within_s)s)
          AND id > (SELECT coalesce(max(id), 0) FROM recovery_events
                    WHERE worker_id = %(worker)s AND kind = 'budget_reset')
        ORDER BY id
        """,
        {"worker": worker_id, "within_s": within_s},
    )
    return [row[0] for row in rows.fetchall()]


def has_given_up(db: peewee.PostgresqlDatabase, worker_id: str) -> bool:
    """True when the budget of a worker was spent and nobody has given it back."""
    row = db.execute_sql(
        "SELECT kind FROM recovery_events WHERE worker_id = %s AND kind IN ('gave_up', 'budget_reset')"
        " ORDER BY id DESC LIMIT 1",
        (worker_id,),
    ).fetchone()
    return row is not None and row[0] == "gave_up"


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
