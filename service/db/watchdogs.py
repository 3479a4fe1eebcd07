"""The heartbeat of watchdogs, aged by the database's clock: who watches what watches the workers."""

from dataclasses import dataclass
from typing import Any

import peewee

from service.db.models import Watchdog

NOW = peewee.SQL("clock_timestamp()")
AGE = peewee.SQL("extract(epoch FROM clock_timestamp() - last_seen)::float8")
# Then its host is not missed any more: it was taken out of service.
FORGET_AFTER_S = 7 * 86_400


@dataclass(frozen=True)
class SeenWatchdog:
    """The watchdog of a host, and how long ago it was seen when this was read."""

    watchdog_id: str
    age_s: float


def write(db: peewee.PostgresqlDatabase, watchdog_id: str, pid: int) -> None:
    """Stores that the watchdog is seen now. Another pid is a new life."""
    row = {Watchdog.watchdog_id: watchdog_id, Watchdog.pid: pid, Watchdog.start_time: NOW, Watchdog.last_seen: NOW}
    born = peewee.SQL("CASE WHEN watchdogs.pid = EXCLUDED.pid THEN watchdogs.start_time ELSE EXCLUDED.start_time END")
    Watchdog.insert(row).on_conflict(
        conflict_target=[Watchdog.watchdog_id],
        preserve=[Watchdog.pid, Watchdog.last_seen],
        update={Watchdog.start_time: born},
    ).execute(db)


def read(db: peewee.PostgresqlDatabase) -> list[SeenWatchdog]:
    """The watchdogs of all hosts, without those that nobody has seen for days."""
    query = Watchdog.select(Watchdog.watchdog_id, AGE.alias("age_s")).order_by(Watchdog.watchdog_id)
    found = [_seen(row) for row in query.bind(db).dicts()]
    return [watchdog for watchdog in found if watchdog.age_s < FORGET_AFTER_S]


def _seen(row: Any) -> SeenWatchdog:
    return SeenWatchdog(**row)
