"""The heartbeats of watchdogs, aged by the database's clock, and what they report of the processes they guard."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import peewee

from service.db import lives
from service.db.models import Watchdog

# A watchdog that was not seen for this long has left its name to others.
GONE_S = 60.0


@dataclass(frozen=True)
class SeenWatchdog:
    """The watchdog of a host, and the age of its heartbeat when it was read.

    `guards`: what it concluded about each worker and gateway, as a `WorkerStatus` in JSON with `is_gateway`.
    """

    watchdog_id: str
    age_s: float
    guards: Sequence[Mapping[str, Any]]
    is_ended: bool = False
    # Where it runs, and what its host announces; "": it did not say.
    machine: str = ""
    network: str = ""
    address: str = ""

    @property
    def is_alive(self) -> bool:
        """True if it was seen a short time ago and was not stopped."""
        return self.age_s < GONE_S and not self.is_ended


def write(
    db: peewee.PostgresqlDatabase,
    watchdog_id: str,
    pid: int,
    machine: str = "",
    detail: Mapping[str, Any] | None = None,
) -> bool:
    """Records that the watchdog was seen now, and what it knows about its host. Another pid starts a new life.

    Does nothing, and returns False, while the watchdog of another machine with this name is seen.
    """
    is_gone = Watchdog.last_seen < peewee.SQL("clock_timestamp() - make_interval(secs => %s)", [GONE_S])
    is_free = (Watchdog.machine.in_((machine, ""))) | is_gone
    return lives.beat(
        db, Watchdog, watchdog_id, pid, {Watchdog.machine: machine, Watchdog.detail: detail or {}}, is_free
    )


def end(db: peewee.PostgresqlDatabase, watchdog_id: str, pid: int, machine: str = "") -> None:
    """Records that this life of the watchdog was stopped: nobody has to look for it."""
    # In containers that of another machine of this name has the same pid.
    lives.end(db, Watchdog, watchdog_id, pid, Watchdog.machine == machine)


def read(db: peewee.PostgresqlDatabase) -> list[SeenWatchdog]:
    """All that there are."""
    rows = db.execute_sql(
        "SELECT watchdog_id, extract(epoch FROM clock_timestamp() - last_seen)::float8,"
        " coalesce(detail->'guards', '[]'), is_ended, machine, coalesce(detail->>'network', ''),"
        " coalesce(detail->>'address', '') FROM watchdogs ORDER BY watchdog_id"
    )
    return [SeenWatchdog(*row) for row in rows.fetchall()]
