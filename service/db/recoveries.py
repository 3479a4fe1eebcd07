"""The audit log of recovery. Its times come from the clock of the watchdog's host."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

import peewee

from service.db.models import RecoveryEvent

OPEN = "open"
# The phases of a restart, in order.
PHASES = ("detect", "decide", "evidence", "stop", "sweep", "gpu", "start", "load")


@dataclass(frozen=True)
class Event:
    """One entry of the audit log. `timings` are seconds by phase; `id` 0: not in Postgres yet.

    `machine`: that of the watchdog that wrote it; empty if it did not know.
    """

    id: int
    # Identifies it before it has an id.
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
    machine: str = ""


@dataclass(frozen=True)
class Pause:
    """A pause of recovery that has not ended, as an operator ordered it. It ends by Postgres' clock."""

    reason: str
    end_time: datetime


def put(db: peewee.PostgresqlDatabase, event: Event) -> int:
    """Inserts an event, or updates it unless it has ended in Postgres. Returns its id."""
    row = {getattr(RecoveryEvent, name): value for name, value in vars(event).items() if name != "id"}
    with db.atomic():
        if event.outcome == OPEN:
            # One is open at a time. Another can only be from a watchdog that lost its journal.
            RecoveryEvent.update(outcome="superseded", end_time=event.start_time).where(
                RecoveryEvent.worker_id == event.worker_id,
                RecoveryEvent.machine.in_((event.machine, "")),
                RecoveryEvent.outcome == OPEN,
                RecoveryEvent.key != event.key,
            ).execute(db)
        is_it = RecoveryEvent.key == event.key
        # Not an upsert: that takes an id from the sequence even if it updates.
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


def of_note(
    db: peewee.PostgresqlDatabase, worker_id: str, machine: str, since: datetime, keys: Sequence[UUID] = ()
) -> list[Event]:
    """The events that decisions about a worker of this machine are based on, oldest first.

    These are its restarts after `since`, the open one and those with `keys` however old, and the last event of each
    other kind.
    """
    mine = (
        (RecoveryEvent.worker_id == worker_id)
        & (RecoveryEvent.machine.in_((machine, "")))
        & (RecoveryEvent.kind != "verdict")
    )
    is_recent = (RecoveryEvent.start_time > since) | (RecoveryEvent.outcome == OPEN) | RecoveryEvent.key.in_(list(keys))
    is_restart = RecoveryEvent.kind == "restart"
    last = RecoveryEvent.select(peewee.fn.max(RecoveryEvent.id)).where(mine, ~is_restart).group_by(RecoveryEvent.kind)
    query = (
        RecoveryEvent.select()
        .where(mine, (is_restart & is_recent) | RecoveryEvent.id.in_(last))
        .order_by(RecoveryEvent.id)
    )
    return [_event(row) for row in query.bind(db).dicts()]


# Per worker asked for, by its index, so that neither the audit log nor workers that are gone make it slower.
# Of two machines with one name only the one whose worker beats counts.
OF_THE_ONE_THAT_BEATS = """
(machine = '' OR NOT EXISTS (
    SELECT FROM heartbeats h WHERE h.worker_id = e.worker_id AND h.machine NOT IN (e.machine, '')))
"""


def _last_ones(*kinds: str) -> str:
    """SQL: the last event of each of the kinds."""
    return " UNION ALL ".join(
        f"""
        (SELECT id, kind, reason, end_time FROM recovery_events e
         WHERE e.worker_id = asked.worker_id AND kind = '{kind}' AND {OF_THE_ONE_THAT_BEATS} ORDER BY id DESC LIMIT 1)
        """
        for kind in kinds
    )


GIVEN_UP = f"""
SELECT worker_id FROM unnest(%s::text[]) AS asked (worker_id) CROSS JOIN LATERAL (
    SELECT max(id) FILTER (WHERE kind = 'gave_up') AS gave_up, max(id) FILTER (WHERE kind <> 'gave_up') AS ended
    FROM ({_last_ones("gave_up", "budget_reset", "give_up_ended")}) AS last_ones
) AS last
WHERE last.gave_up > coalesce(last.ended, 0)
"""
# The times are those of the watchdog's clock, which need not agree with ours: its heartbeat tells the difference.
PAUSED = f"""
SELECT worker_id, last.reason, last.end_time + ahead.by
FROM unnest(%s::text[]) AS asked (worker_id) CROSS JOIN LATERAL (
    SELECT * FROM ({_last_ones("paused", "resumed")}) AS last_ones ORDER BY id DESC LIMIT 1
) AS last CROSS JOIN LATERAL (
    SELECT coalesce(max(last_seen - (detail->>'time')::timestamptz), '0') AS by
    FROM watchdogs WHERE watchdog_id = host_of(worker_id)
) AS ahead
WHERE last.kind = 'paused' AND last.end_time + ahead.by > clock_timestamp()
"""
LAST_TIMINGS = """
SELECT worker_id, last.timings FROM unnest(%s::text[]) AS asked (worker_id) CROSS JOIN LATERAL (
    SELECT timings FROM recovery_events e
    WHERE e.worker_id = asked.worker_id AND kind = 'restart' AND outcome = 'recovered' ORDER BY id DESC LIMIT 1
) AS last
"""


def given_up(db: peewee.PostgresqlDatabase, worker_ids: Sequence[str]) -> set[str]:
    """Those of the workers that are no longer restarted: the budget is exhausted, or their start kept failing."""
    return {worker_id for (worker_id,) in db.execute_sql(GIVEN_UP, (list(worker_ids),)).fetchall()}


def paused(db: peewee.PostgresqlDatabase, worker_ids: Sequence[str]) -> dict[str, Pause]:
    """Those of the workers that are not restarted for now, because an operator paused their recovery."""
    rows = db.execute_sql(PAUSED, (list(worker_ids),)).fetchall()
    return {worker_id: Pause(reason, end_time) for worker_id, reason, end_time in rows}


def last_timings(db: peewee.PostgresqlDatabase, worker_ids: Sequence[str]) -> dict[str, Mapping[str, float]]:
    """Seconds by phase of the last successful restart of each of the workers."""
    return dict(db.execute_sql(LAST_TIMINGS, (list(worker_ids),)).fetchall())


def uptime_s(db: peewee.PostgresqlDatabase) -> float:
    """Seconds that Postgres has been up."""
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
    # jsonb does not keep the order of keys.
    timings = {phase: row["timings"][phase] for phase in PHASES if phase in row["timings"]}
    return Event(**(row | {"timings": timings}))
