"""The heartbeat of workers, aged by the database's clock alone."""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any
from uuid import UUID

import peewee

from service.db.models import Heartbeat

AGE = peewee.SQL("extract(epoch FROM clock_timestamp() - last_seen)::float8")
LIFE = peewee.SQL("extract(epoch FROM clock_timestamp() - start_time)::float8")


class Phase(StrEnum):
    """What a worker says it is doing."""

    STARTING = "starting"
    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    STALLED = "stalled"
    ENGINE_DEAD = "engine_dead"
    STOPPING = "stopping"


@dataclass(frozen=True)
class Beat:
    """What a worker says of itself."""

    worker_id: str
    incarnation: UUID
    address: str
    phase: str
    pid: int
    models: tuple[str, ...] = ()
    queued: int = 0
    detail: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SeenBeat:
    """A worker's last beat, how old it was when it was read, and how long that life had begun before, in seconds."""

    beat: Beat
    age_s: float
    life_s: float = 0.0


def write(db: peewee.PostgresqlDatabase, beat: Beat) -> None:
    """Stores the beat as seen now. A beat of another incarnation than the row's starts a new life."""
    now = peewee.SQL("clock_timestamp()")
    row = {
        Heartbeat.incarnation: beat.incarnation,
        Heartbeat.address: beat.address,
        Heartbeat.phase: beat.phase,
        Heartbeat.pid: beat.pid,
        Heartbeat.models: list(beat.models),
        Heartbeat.queued: beat.queued,
        Heartbeat.detail: beat.detail,
        Heartbeat.last_seen: now,
    }
    born = peewee.SQL(
        "CASE WHEN heartbeats.incarnation = EXCLUDED.incarnation"
        " THEN heartbeats.start_time ELSE EXCLUDED.start_time END"
    )
    Heartbeat.insert(row | {Heartbeat.worker_id: beat.worker_id, Heartbeat.start_time: now}).on_conflict(
        conflict_target=[Heartbeat.worker_id],
        preserve=[field for field in row if field is not Heartbeat.start_time],
        update={Heartbeat.start_time: born},
    ).execute(db)


def read(db: peewee.PostgresqlDatabase, worker_id: str | None = None) -> list[SeenBeat]:
    """The last beat of each worker, or of one, with its age."""
    query = Heartbeat.select(Heartbeat, AGE.alias("age_s"), LIFE.alias("life_s")).order_by(Heartbeat.worker_id)
    if worker_id is not None:
        query = query.where(Heartbeat.worker_id == worker_id)
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
        detail=row["detail"],
    )
    return SeenBeat(beat, row["age_s"], row["life_s"])
