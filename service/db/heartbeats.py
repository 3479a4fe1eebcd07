"""The heartbeats of workers, which are also leases on their names. All by the database's clock alone."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any
from uuid import UUID

import peewee

from service.db import schema
from service.db.models import Heartbeat
from service.machine import Place

AGE = peewee.SQL("extract(epoch FROM clock_timestamp() - last_seen)::float8")
LIFE = peewee.SQL("extract(epoch FROM clock_timestamp() - start_time)::float8")

# Of the watchdog of the worker's host, and whether that host is ordered to drain.
WATCHDOG_AGE = peewee.SQL(
    "(SELECT extract(epoch FROM clock_timestamp() - dog.last_seen)::float8"
    " FROM watchdogs dog WHERE dog.watchdog_id = host_of(worker_id))"
)
IS_DRAINED = peewee.SQL("EXISTS (SELECT FROM hosts WHERE name = host_of(worker_id) AND drain_time IS NOT NULL)")

# When a worker's lease on its name ends. A version that knew no leases wrote none, and gave none back.
_LEASE = "coalesce(lease_until, CASE phase WHEN 'stopping' THEN last_seen ELSE last_seen + interval '60 s' END)"
# What is left of it. Like the leases of chunks, it does not run out while Postgres is away.
LEASE_LEFT = peewee.SQL(
    f"extract(epoch FROM greatest({_LEASE}, pg_postmaster_start_time() + ({_LEASE} - last_seen))"
    " - clock_timestamp())::float8"
)


class Phase(StrEnum):
    """What a worker reports that it is doing."""

    STARTING = "starting"
    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    STALLED = "stalled"
    ENGINE_DEAD = "engine_dead"
    STOPPING = "stopping"


@dataclass(frozen=True)
class Beat:
    """A worker's report about itself.

    `settings` is the fingerprint of its settings. `place`, `pid` and `start_ticks` identify its process. `detail` has
    `cause`, `advice` and `cause_key` if its engine failed, and `last_cause` and `last_advice` if only the engine of its
    last life did.
    """

    worker_id: str
    incarnation: UUID
    address: str
    phase: str
    pid: int
    models: tuple[str, ...] = ()
    queued: int = 0
    settings: str = ""
    place: Place = field(default_factory=Place)
    start_ticks: int = 0
    detail: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SeenBeat:
    """A worker's last heartbeat, and the age of the heartbeat and of that life when it was read, in seconds.

    `has_served`: the worker has been ready with these settings, in this life or an earlier one. `lease_left_s` is what
    is left of the lease on its name, not positive once that is over. Only `read_recent` tells the age of the heartbeat
    of the watchdog of its host, None if there was none, and whether an operator ordered that host to drain.
    """

    beat: Beat
    age_s: float
    life_s: float = 0.0
    has_served: bool = False
    lease_left_s: float = 0.0
    last_seen: datetime | None = None
    watchdog_age_s: float | None = None
    is_drained: bool = False


def failure(beat: Beat) -> dict[str, str]:
    """`cause` and `advice` of an engine failure in this life or, until ready, in the last; both may be empty."""
    return failure_in(beat.detail)


def failure_in(detail: Mapping[str, Any]) -> dict[str, str]:
    """The same, from the detail of a heartbeat."""
    prefix = "" if detail.get("cause") else "last_"
    return {name: str(detail.get(f"{prefix}{name}") or "") for name in ("cause", "advice")}


def begin(db: peewee.PostgresqlDatabase, beat: Beat, lease_s: float, before: SeenBeat | None) -> bool:
    """Begins a life with its first heartbeat, which leases the name for `lease_s`.

    `before` is the heartbeat that it follows. False: there has been another since.
    """
    if before is None:
        return _write(db, beat, lease_s, peewee.SQL("false"))
    is_last = (Heartbeat.incarnation == before.beat.incarnation) & (Heartbeat.last_seen == before.last_seen)
    return _write(db, beat, lease_s, is_last)


def write(db: peewee.PostgresqlDatabase, beat: Beat, lease_s: float = 60.0) -> bool:
    """Stores the heartbeat with the current time, and renews the lease on the name; 0 gives the name back.

    False: another life has the name, and nothing was written.
    """
    return _write(db, beat, lease_s, peewee.SQL("heartbeats.incarnation = EXCLUDED.incarnation"))


def _write(db: peewee.PostgresqlDatabase, beat: Beat, lease_s: float, may_replace: Any) -> bool:
    # One moment for all, so that the lease is exactly as long as it was given.
    now = peewee.SQL("statement_timestamp()")
    row = {
        Heartbeat.incarnation: beat.incarnation,
        Heartbeat.address: beat.address,
        Heartbeat.phase: beat.phase,
        Heartbeat.pid: beat.pid,
        Heartbeat.models: list(beat.models),
        Heartbeat.queued: beat.queued,
        Heartbeat.detail: beat.detail,
        Heartbeat.settings: beat.settings,
        Heartbeat.start_ticks: beat.start_ticks,
        Heartbeat.version: schema.VERSION,
        Heartbeat.schema_version: schema.known(),
        Heartbeat.last_seen: now,
        Heartbeat.lease_until: peewee.SQL("statement_timestamp() + make_interval(secs => %s)", [lease_s]),
    } | {getattr(Heartbeat, name): value for name, value in asdict(beat.place).items()}
    born = peewee.SQL(
        "CASE WHEN heartbeats.incarnation = EXCLUDED.incarnation"
        " THEN heartbeats.start_time ELSE EXCLUDED.start_time END"
    )
    is_ready = beat.phase == Phase.READY
    first = {
        Heartbeat.worker_id: beat.worker_id,
        Heartbeat.start_time: now,
        Heartbeat.served_settings: beat.settings if is_ready else "",
    }
    # Keeps the settings it was last ready with until it is ready with others.
    served = [Heartbeat.served_settings] if is_ready else []
    query = Heartbeat.insert(row | first).on_conflict(
        conflict_target=[Heartbeat.worker_id],
        preserve=[*row, *served],
        update={Heartbeat.start_time: born},
        where=may_replace,
    )
    return bool(query.as_rowcount().execute(db))


AS_SEEN = (Heartbeat, AGE.alias("age_s"), LIFE.alias("life_s"), LEASE_LEFT.alias("lease_left_s"))
OF_HOST = (WATCHDOG_AGE.alias("watchdog_age_s"), IS_DRAINED.alias("is_drained"))


def read(db: peewee.PostgresqlDatabase, worker_id: str | None = None) -> list[SeenBeat]:
    """The last heartbeat of each worker, or of one, with its age."""
    query = Heartbeat.select(*AS_SEEN).order_by(Heartbeat.worker_id)
    if worker_id is not None:
        query = query.where(Heartbeat.worker_id == worker_id)
    return [_seen(row) for row in query.bind(db).dicts()]


def read_recent(db: peewee.PostgresqlDatabase, timeout_s: float, most_gone: int) -> list[SeenBeat]:
    """The last heartbeats of workers seen within `timeout_s`, and those of the `most_gone` seen last in any case.

    With what is known of their hosts. What it costs does not grow with workers that are gone.
    """
    last = Heartbeat.select(Heartbeat.worker_id).order_by(Heartbeat.last_seen.desc()).limit(most_gone)
    query = (
        Heartbeat.select(*AS_SEEN, *OF_HOST)
        .where((timeout_s >= AGE) | Heartbeat.worker_id.in_(last))
        .order_by(Heartbeat.worker_id)
    )
    return [_seen(row) for row in query.bind(db).dicts()]


def _seen(row: Any) -> SeenBeat:
    beat = Beat(
        worker_id=row["worker_id"],
        incarnation=row["incarnation"],
        address=row["address"],
        phase=row["phase"],
        pid=row["pid"],
        models=tuple(row["models"]),
        queued=row["queued"],
        settings=row["settings"],
        place=Place(row["machine"], row["pid_space"], row["network"]),
        start_ticks=row["start_ticks"],
        detail=row["detail"],
    )
    has_served = bool(beat.settings) and beat.settings == row["served_settings"]
    return SeenBeat(
        beat,
        row["age_s"],
        row["life_s"],
        has_served,
        row["lease_left_s"],
        row["last_seen"],
        row.get("watchdog_age_s"),
        row.get("is_drained", False),
    )
