"""What the watchdog writes down before and after it acts, and finds again when it starts."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Concatenate, ParamSpec, TypeVar
from uuid import UUID

import peewee

from service.db import recoveries
from service.db.connection import Database, Unreachable
from service.db.recoveries import Event, Standing
from watchdog.policy import HOUR_S, Decision, Evidence, Step

P = ParamSpec("P")
T = TypeVar("T")

# A schema that is not there yet is as good as no database.
AWAY = (*Unreachable, peewee.ProgrammingError)


class DatabaseAwayError(Exception):
    """Postgres does not answer: nothing can be written down."""


@dataclass(frozen=True)
class Past:
    """What was done for a worker before. `restart_ages_s`: the restarts that count against its budget."""

    restart_ages_s: list[float]
    has_given_up: bool
    intent: Event | None


class Record:
    """The audit log of one worker. All calls raise DatabaseAwayError."""

    def __init__(self, database: Database, worker_id: str) -> None:
        self._database = database
        self._worker_id = worker_id

    def past(self) -> Past:
        """What a watchdog that starts has to know."""
        return self._call(_past, self._worker_id)

    def standing(self) -> Standing:
        """What persons have ordered."""
        return self._call(recoveries.standing, self._worker_id)

    def begin(self, evidence: Evidence, decision: Decision, timings: dict[str, float]) -> Event:
        """Writes the intent to restart, before anything is done."""
        incarnation = UUID(evidence.heartbeat.incarnation) if evidence.heartbeat else None
        return self._call(
            recoveries.begin,
            self._worker_id,
            str(decision.verdict),
            decision.reason,
            asdict(evidence),
            timings,
            incarnation,
        )

    def advance(self, intent: Event, step: Step, timings: dict[str, float]) -> None:
        """Writes how far the restart has come."""
        self._call(recoveries.advance, intent.id, str(step), timings)

    def close(self, intent: Event, outcome: str, timings: dict[str, float], incarnation: UUID | None) -> None:
        """Writes how the restart ended, and which incarnation came of it."""
        self._call(recoveries.close, intent.id, outcome, timings, incarnation)

    def add(self, kind: str, decision: Decision, evidence: Evidence) -> None:
        """Writes an event that is no restart."""
        self._call(recoveries.add, self._worker_id, kind, str(decision.verdict), decision.reason, asdict(evidence))

    def _call(
        self, function: Callable[Concatenate[peewee.PostgresqlDatabase, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        try:
            return self._database.call(function, *args, **kwargs)
        except AWAY as error:
            raise DatabaseAwayError(str(error).strip()) from error


def _past(db: peewee.PostgresqlDatabase, worker_id: str) -> Past:
    return Past(
        restart_ages_s=recoveries.restart_ages(db, worker_id, HOUR_S),
        has_given_up=recoveries.has_given_up(db, worker_id),
        intent=recoveries.open_intent(db, worker_id),
    )
