"""The guard's order of things: written down before done, held when it cannot be, finished once begun."""

import threading
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast
from uuid import UUID, uuid4

import pytest

from service.db.recoveries import Event
from service.processes import Leader, Mark
from watchdog.act import Restarter, RestartError
from watchdog.alerts import Alerts
from watchdog.guard import Guard, Snapshot
from watchdog.observe import Observer
from watchdog.outages import TELL_AFTER_S, Outage
from watchdog.past import Past
from watchdog.policy import Action, Decision, Evidence, Health, Heartbeat, Limits, Process, State, Step, Verdict
from watchdog.record import Record, UnrecordedError
from watchdog.remains import Remains

OLD, NEW = uuid4(), uuid4()
TIME = datetime(2026, 1, 1, tzinfo=UTC)


def beating(incarnation: UUID, age_s: float = 1) -> Evidence:
    heartbeat = Heartbeat(age_s, "ready", is_current=True, incarnation=str(incarnation))
    return Evidence(0, Process(State.RUNNING, 7, 100), Health.SERVING, 9000, heartbeat)


def in_state(state: State) -> Evidence:
    heartbeat = Heartbeat(5, "ready", is_current=False, incarnation=str(OLD))
    return Evidence(0, Process(state), Health.NOT_PROBED, 9000, heartbeat)


class FakeClock:
    """Goes forward by a second with each evidence."""

    time_s = 1000.0

    def monotonic(self) -> float:
        return self.time_s

    def now(self) -> datetime:
        return TIME


class FakeObserver:
    """Sees what it is told."""

    leader: Leader | None = None

    def __init__(self, clock: FakeClock) -> None:
        self._clock = clock
        self.evidence = beating(OLD)

    def observe(self) -> Evidence:
        self._clock.time_s += 1
        return replace(self.evidence, time_s=self._clock.time_s)


class FakeRecord:
    """Keeps everything in memory. `given` is what was before, None as long as that is not known."""

    def __init__(self) -> None:
        self.can_write = True
        self.is_more_known = False
        self.given: Past | None = Past()
        self.events: list[Event] = []
        self.kinds: list[str] = []

    def sync(self, is_reachable: bool) -> bool:
        is_more_known, self.is_more_known = self.is_more_known, False
        return is_reachable and is_more_known

    def past(self) -> Past | None:
        return self.given

    def begin(self, evidence: Evidence, decision: Decision, timings: dict[str, float]) -> Event:
        if not self.can_write or self.given is None:
            raise UnrecordedError("no route")
        old = UUID(evidence.heartbeat.incarnation) if evidence.heartbeat else None
        verdict = str(decision.verdict)
        self.events.append(
            Event(0, uuid4(), "w", "restart", verdict, "", {}, "stopping", "open", timings, TIME, None, old, None)
        )
        return self.events[-1]

    def advance(self, intent: Event, step: Step, timings: dict[str, float]) -> Event:
        return self._replace(intent, step=str(step), timings=timings)

    def close(self, intent: Event, outcome: str, timings: dict[str, float], incarnation: UUID | None) -> None:
        self._replace(intent, outcome=outcome, new_incarnation=incarnation)

    def add(self, kind: str, decision: Decision, evidence: Evidence) -> None:
        self.kinds.append(kind)

    def _replace(self, intent: Event, **changes: Any) -> Event:
        place = [event.key for event in self.events].index(intent.key)
        self.events[place] = replace(self.events[place], **changes)
        return self.events[place]


class FakeRestarter:
    """Restarts at once, or fails; `between` is called after the stop and before the start."""

    ending = threading.Event()

    def __init__(self) -> None:
        self.remains = Remains(Mark(Path("/nowhere")))
        self.restarts = 0
        self.failure: Exception | None = None
        self.between: Callable[[], None] = lambda: None

    def restart(
        self, verdict: Verdict, leader: Leader | None, on_step: Callable[[Step, dict[str, float]], None]
    ) -> int:
        self.restarts += 1
        if self.failure is not None:
            raise self.failure
        self.between()
        on_step(Step.STARTING, {"stop": 1.0, "sweep": 1.0})
        on_step(Step.LOADING, {"stop": 1.0, "sweep": 1.0, "start": 1.0})
        return 8


class FakeAlerts:
    """Keeps what was told: kind, cause and level."""

    def __init__(self) -> None:
        self.told: list[tuple[str, str, str]] = []

    def tell(self, kind: str, cause: str, worker_id: str, level: str, message: str, told: dict[str, object]) -> None:
        self.told.append((kind, cause, level))


class Parts:
    """A guard and the fakes around it."""

    def __init__(self) -> None:
        self.clock, self.record, self.restarter = FakeClock(), FakeRecord(), FakeRestarter()
        self.observer, self.alerts = FakeObserver(self.clock), FakeAlerts()
        self.is_database_away = False
        # How many restarts had been made when evidence was kept, for each time.
        self.kept_before: list[int] = []
        self.guard = Guard(
            worker_id="w",
            observer=cast(Observer, self.observer),
            record=cast(Record, self.record),
            restarter=cast(Restarter, self.restarter),
            limits=Limits(max_restarts_per_hour=2, backoff_s=0.1),
            clock=self.clock,
            woken=threading.Event(),
            on_change=lambda: None,
            keep_evidence=lambda _: self.kept_before.append(self.restarter.restarts),
            alerts=cast(Alerts, self.alerts),
            outages={Verdict.DATABASE_AWAY: Outage(), Verdict.SUPERVISOR_AWAY: Outage()},
        )

    def see(self, evidence: Evidence) -> Snapshot:
        """Has the guard check on this evidence."""
        self.observer.evidence = evidence
        if self.is_database_away:
            self.observer.evidence = replace(evidence, database_up_s=None, heartbeat=None)
        self.guard.check()
        assert self.guard.snapshot is not None
        return self.guard.snapshot


@pytest.fixture
def parts() -> Parts:
    """A guard that has seen its worker healthy."""
    parts = Parts()
    parts.see(beating(OLD))
    return parts


def test_crash_while_postgres_is_away_is_seen_to(parts: Parts) -> None:
    """With Postgres away a crash is a crash: the restart is made, and costs its unit."""
    parts.is_database_away = True
    made = parts.see(in_state(State.EXITED))
    assert (made.decision.action, parts.restarter.restarts, made.budget_left) == (Action.RESTART, 1, 1)
    served = parts.see(beating(NEW))
    assert (served.decision.verdict, served.intent) == (Verdict.DATABASE_AWAY, None)
    assert [event.outcome for event in parts.record.events] == ["recovered"]


def test_nothing_is_done_that_cannot_be_written_down(parts: Parts) -> None:
    """With neither Postgres nor a journal a crash is held and costs nothing; later the restart is made, once."""
    parts.record.can_write = False
    for _ in range(3):
        held = parts.see(in_state(State.EXITED))
        assert (held.decision.verdict, held.decision.action) == (Verdict.CRASHED, Action.HOLD)
    assert (parts.restarter.restarts, held.budget_left) == (0, 2)
    parts.record.can_write = True
    made = parts.see(in_state(State.EXITED))
    assert (made.decision.action, parts.restarter.restarts, made.budget_left) == (Action.RESTART, 1, 1)


def test_nothing_is_done_before_the_past_is_known() -> None:
    """A watchdog that does not know what its predecessor spent holds, and does not give up either."""
    parts = Parts()
    parts.record.given = None
    assert parts.see(in_state(State.EXITED)).decision.action is Action.HOLD
    parts.record.given = Past(restart_ages_s=(10.0, 20.0))
    given_up = parts.see(in_state(State.EXITED))
    assert (given_up.decision.action, given_up.gave_up, parts.restarter.restarts) == (Action.GIVE_UP, True, 0)
    assert parts.record.kinds == ["gave_up"]


def test_what_postgres_adds_to_the_journal_counts(parts: Parts) -> None:
    """Restarts that only Postgres knows of are taken from the budget when it is reached."""
    parts.record.given, parts.record.is_more_known = Past(restart_ages_s=(10.0,)), True
    assert parts.see(beating(OLD)).budget_left == 1


def test_giving_up_is_written_down_once() -> None:
    """It is not repeated at every check."""
    parts = Parts()
    parts.record.given = Past(restart_ages_s=(10.0, 20.0))
    for _ in range(3):
        assert parts.see(in_state(State.EXITED)).gave_up
    assert parts.record.kinds == ["gave_up"]


def test_restart_that_fails_is_taken_up_again(parts: Parts) -> None:
    """When the stop worked and the start did not, the open intent is finished at the next check."""
    parts.restarter.failure = RestartError("supervisord refuses")
    parts.see(in_state(State.EXITED))
    parts.restarter.failure = None
    again = parts.see(in_state(State.STOPPED))
    assert (again.decision.verdict, again.decision.continues) == (Verdict.INTERRUPTED, True)
    assert [event.step for event in parts.record.events] == ["loading"]
    parts.see(beating(NEW))
    assert [(event.outcome, event.new_incarnation) for event in parts.record.events] == [("recovered", NEW)]


def test_restart_whose_worker_dies_again_has_failed(parts: Parts) -> None:
    """Each attempt has an event of its own, with how it ended."""
    parts.see(in_state(State.EXITED))
    parts.see(in_state(State.EXITED))
    parts.see(beating(NEW))
    assert [event.outcome for event in parts.record.events] == ["failed", "recovered"]


def test_intent_of_a_worker_that_never_stopped_is_superseded() -> None:
    """A watchdog that died before it could stop the worker leaves an intent that has no object once it is healthy."""
    parts = Parts()
    event = parts.record.begin(in_state(State.RUNNING), Decision(Verdict.FROZEN, Action.RESTART, "", 0), {})
    parts.record.given = Past(restart_ages_s=(1.0,), intent=event)
    assert parts.see(beating(OLD)).intent is None
    assert [event.outcome for event in parts.record.events] == ["superseded"]
    assert parts.restarter.restarts == 0


def test_budget_comes_back_with_the_reset(parts: Parts) -> None:
    """A reset that somebody wrote is seen at the next check."""
    for _ in range(3):
        last = parts.see(in_state(State.EXITED))
    assert (last.gave_up, last.budget_left) == (True, 0)
    parts.record.given = Past(last_reset=uuid4())
    assert parts.see(in_state(State.EXITED)).decision.action is Action.RESTART
    assert parts.see(beating(NEW)).budget_left == 1


def test_pause_holds_also_while_postgres_is_away(parts: Parts) -> None:
    """What a person has ordered is known without Postgres."""
    parts.record.given = Past(pause_left_s=3.5, pause_end_time=TIME, pause_reason="new driver")
    assert parts.see(beating(OLD)).decision.verdict is Verdict.PAUSED
    parts.is_database_away = True
    assert parts.see(in_state(State.EXITED)).decision.verdict is Verdict.PAUSED
    parts.record.given = Past()
    assert parts.see(beating(OLD)).decision.verdict is Verdict.DATABASE_AWAY


@pytest.mark.parametrize(
    ("first", "then", "kinds"),
    [
        (beating(OLD), in_state(State.STOPPED), ["verdict"]),
        (in_state(State.STOPPED), beating(OLD), ["verdict"]),
        (beating(OLD), beating(OLD), []),
        (beating(OLD), in_state(State.EXITED), []),
        (in_state(State.STOPPING), in_state(State.STOPPED), ["verdict"]),
        (in_state(State.STARTING), in_state(State.STOPPING), []),
    ],
)
def test_verdicts_of_note_are_recorded(first: Evidence, then: Evidence, kinds: list[str]) -> None:
    """The audit log has what a person would ask for, and no second entry for a restart."""
    parts = Parts()
    parts.see(first)
    parts.see(then)
    assert parts.record.kinds == kinds


def test_a_person_is_told_once(parts: Parts) -> None:
    """Of a recovery with its cause, of Postgres and supervisord away, of giving up: one alert for each."""
    parts.see(in_state(State.EXITED))
    for _ in range(3):
        parts.see(beating(NEW))
    for _ in range(2):
        parts.see(replace(beating(NEW), process=None))
        parts.clock.time_s += TELL_AFTER_S
    for _ in range(3):
        parts.is_database_away = True
        parts.see(beating(NEW))
        parts.clock.time_s += TELL_AFTER_S
        parts.see(beating(NEW))
        parts.is_database_away = False
        parts.see(beating(NEW))
    parts.see(in_state(State.EXITED))
    for _ in range(3):
        parts.clock.time_s += 10
        parts.see(in_state(State.EXITED))
    assert parts.alerts.told == [
        ("worker_recovered", "CRASHED", "warning"),
        ("dependency_away", "SUPERVISOR_AWAY", "warning"),
        ("dependency_away", "DATABASE_AWAY", "warning"),
        ("recovery_failed", "CRASHED", "error"),
        ("budget_spent", "CRASHED", "fatal"),
    ]


def test_evidence_is_kept_before_the_restart(parts: Parts) -> None:
    """What is to be seen of a life is kept while it is still there, once for each restart."""
    parts.see(in_state(State.EXITED))
    parts.see(beating(NEW))
    assert parts.kept_before == [0]


def test_stop_that_hangs_is_told(parts: Parts) -> None:
    """A stop that supervisord does not finish is not touched, as it may be an operator's; a person is told once."""
    for _ in range(5):
        seen = parts.see(in_state(State.STOPPING))
        assert seen.decision.action is Action.HOLD
        parts.clock.time_s += 50
    assert parts.alerts.told == [("transition_overdue", "TRANSITION", "error")]
