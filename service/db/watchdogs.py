"""The heartbeats of watchdogs, aged by the database's clock, and what they report of the processes they guard."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import peewee

from service.db import lives
from service.db.models import Watchdog

# A watchdog that was last seen before this time has left its name to others.
GONE = peewee.SQL("clock_timestamp() - interval '60 s'")


@dataclass(frozen=True)
class SeenWatchdog:
    """The watchdog of a host, and the age of its heartbeat when it was read.

    `guards`: what it concluded about each worker and gateway, as a `WorkerStatus` in JSON with `is_gateway`.
    """

    watchdog_id: str
    age_s: float
    guards: Sequence[Mapping[str, Any]]


def write(
    db: peewee.PostgresqlDatabase,
    watchdog_id: str,
    pid: int,
    machine: str = "",
    detail: Mapping[str, Any] | None = None,
) -> None:
    """Records that the watchdog was seen now, and what it knows about its host. Another pid starts a new life.

    Does nothing while the watchdog of another machine with this name is seen.
    """
    is_free = (Watchdog.machine.in_((machine, ""))) | (Watchdog.last_seen < GONE)
    lives.beat(db, Watchdog, watchdog_id, pid, {Watchdog.machine: machine, Watchdog.detail: detail or {}}, is_free)


def end(db: peewee.PostgresqlDatabase, watchdog_id: str, pid: int) -> None:
    """Records that this life of the watchdog was stopped: nobody has to look for it."""
    lives.end(db, Watchdog, watchdog_id, pid)


def read(db: peewee.PostgresqlDatabase) -> list[SeenWatchdog]:
    """All that there are."""
    rows = db.execute_sql(
        "SELECT watchdog_id, extract(epoch FROM clock_timestamp() - last_seen)::float8,"
        " coalesce(detail->'guards', '[]') FROM watchdogs ORDER BY watchdog_id"
    )
    return [SeenWatchdog(*row) for row in rows.fetchall()]
