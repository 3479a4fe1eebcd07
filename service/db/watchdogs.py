"""The heartbeats of watchdogs, aged by the database's clock, so that their absence is noticed too."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import peewee

from service.db import lives
from service.db.models import Watchdog

AGE = peewee.SQL("extract(epoch FROM clock_timestamp() - last_seen)::float8")
# A watchdog that was last seen before this time has left its name to others.
GONE = peewee.SQL("clock_timestamp() - interval '60 s'")


@dataclass(frozen=True)
class SeenWatchdog:
    """The watchdog of a host, and the age of its heartbeat when it was read."""

    watchdog_id: str
    age_s: float


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


def read(db: peewee.PostgresqlDatabase, watchdog_ids: Collection[str]) -> list[SeenWatchdog]:
    """Those of the watchdogs that there are."""
    query = Watchdog.select(Watchdog.watchdog_id, AGE.alias("age_s")).order_by(Watchdog.watchdog_id)
    return [_seen(row) for row in query.where(Watchdog.watchdog_id.in_(list(watchdog_ids))).bind(db).dicts()]


def _seen(row: Any) -> SeenWatchdog:
    return SeenWatchdog(**row)
