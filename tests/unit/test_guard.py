"""The guard records before it acts, holds when it cannot record, and finishes what it has begun."""

import threading
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, cast
from unittest.mock import Mock
from uuid import UUID, uuid4

import pytest

from service.db.recoveries import Event
from service.processes import Leader
from watchdog.act.restart import Restarter, RestartError
from watchdog.alerts import Alerts
from watchdog.dry_run import Bystander
from watchdog.guard import Guard, Snapshot
from watchdog.host import Host
from watchdog.observe.observer import Observer
from watchdog.outages import TELL_AFTER_S, Outage
from watchdog.policy import (
    Action,
    Decision,
    Evidence,
    FailedStart,
    Heartbeat,
    Limits,
    ProbeAnswer,
    Process,
    State,
    Step,
    Verdict,
)
from watchdog.record.audit_log import AuditLog, UnrecordedError
from watchdog.record.history import History

OLD, NEW = uuid4(), uuid4()
TIME = datetime(2026, 1, 1, tzinfo=UTC)
LIMITS = Limits(max_restarts_per_hour=2, backoff_s=0.1)


def beating(incarnation: UUID, age_s: float = 1) -> Evidence:
    heartbeat = Heartbeat(age_s, "ready", is_current=True, incarnation=str(incarnation))
    return Evidence(0, Process(State.RUNNING, 7, 100), ProbeAnswer.SERVING, 9000, heartbeat)


def in_state(state: State) -> Evidence:
    heartbeat = Heartbeat(5, "ready", is_current=False, incarnation=str(OLD))
    return Evidence(0, Process(state), ProbeAnswer.NOT_PROBED, 9000, heartbeat)


class FakeClock:
    """Advances by one second with each piece of evidence."""

    time_s = 1000.0

    def monotonic(self) -> float:
        return self.time_s

    def now(self) -> datetime:
        return TIME


class FakeObserver:
    """Returns the evidence that the test sets."""

    leader: Leader | None = None

    def __init__(self, clock: FakeClock) -> None:
        self._clock = clock
        self.evidence = beating(OLD)

    def process(self) -> Process | None:
        return self.evidence.process

    def close(self) -> None:
        pass

    def observe(self) -> Evidence:
        self._clock.time_s += 1
        return replace(self.evidence, time_s=self._clock.time_s)


class FakeRecord:
    """Keeps everything in memory. `given` is the earlier history, or None while that is unknown."""

    def __init__(self) -> None:
        self.can_write = True
        self.is_more_known = False
        self.given: History | None = History()
        self.events: list[Event] = []
        self.kinds: list[str] = []
        # Reasons of the events that are not restarts, by kind.
        self.reasons: dict[str, list[str]] = defaultdict(list)

    def sync(self, is_reachable: bool) -> bool:
        is_more_known, self.is_more_known = self.is_more_known, False
        return is_reachable and is_more_known

    def history(self) -> History | None:
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
        self.reasons[kind].append(decision.reason)

    def _replace(self, intent: Event, **changes: Any) -> Event:
        place = [event.key for event in self.events].index(intent.key)
        self.events[place] = replace(self.events[place], **changes)
        return self.events[place]


class FakeLeftovers:
    """Leaves this machine's processes alone."""

    def look(self, leader: Leader | None) -> None:
        pass


class FakeRestarter:
    """Restarts at once, or fails; `between` is called after the stop and before the start."""

    def __init__(self) -> None:
        self.ending = threading.Event()
        self.leftovers = FakeLeftovers()
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
    """Records the kind, cause and level of each alert."""

    def __init__(self) -> None:
        self.told: list[tuple[str, str, str]] = []
        self.faults: list[str] = []

    def fault(self, where: str, error: Exception) -> None:
        self.faults.append(where)

    def tell(self, kind: str, cause: str, worker_id: str, level: str, message: str, told: dict[str, object]) -> None:
        self.told.append((kind, cause, level))


class Parts:
    """A guard and the fakes around it."""

    def __init__(self, limits: Limits = LIMITS) -> None:
        self.limits = limits
        self.clock, self.record, self.restarter = FakeClock(), FakeRecord(), FakeRestarter()
        self.observer, self.alerts = FakeObserver(self.clock), FakeAlerts()
        self.is_database_away = False
        # Restarts made so far, each time that evidence was kept.
        self.kept_before: list[int] = []
        self.guard = Guard(
            worker_id="w",
            observer=cast(Observer, self.observer),
            record=cast(AuditLog, self.record),
            restarter=cast(Restarter, self.restarter),
            limits=limits,
            clock=self.clock,
            woken=threading.Event(),
            on_change=lambda: None,
            keep_evidence=lambda _: self.kept_before.append(self.restarter.restarts),
            alerts=cast(Alerts, self.alerts),
            outages={Verdict.DATABASE_AWAY: Outage(), Verdict.SUPERVISOR_AWAY: Outage()},
            poll_s=0.5,
        )

    def see(self, evidence: Evidence) -> Snapshot:
        """Has the guard check this evidence."""
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


def test_nothing_that_fails_between_checks_ends_the_guard(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure to look at supervisord while the guard waits is logged and alerted, and it goes on checking."""
    fails, checked = iter([MemoryError()]), threading.Event()

    def process() -> Process | None:
        for error in fails:
            raise error
        checked.set()
        return parts.observer.evidence.process

    monkeypatch.setattr(parts.observer, "process", process)
    parts.guard.start()
    assert checked.wait(30)
    assert parts.alerts.faults == ["guard-w"]
    parts.guard.stop(30)


def test_a_guard_whose_checks_fail_rests_between_them(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    """However often it is woken, a guard does not check again and again what fails."""
    failed = threading.Semaphore(0)

    def observe() -> Evidence:
        failed.release()
        raise MemoryError

    monkeypatch.setattr("watchdog.guard.RETRY_S", 600)
    monkeypatch.setattr(parts.observer, "observe", observe)
    parts.guard.start()
    assert failed.acquire(timeout=30)
    parts.guard.wake()
    assert not failed.acquire(timeout=0.2)
    parts.guard.stop(30)


def test_a_guard_that_cannot_start_is_made_again() -> None:
    """A guard whose thread cannot be started is not taken for one that guards."""
    guards = [Mock(start=Mock(side_effect=RuntimeError("can't start new thread"))), Mock()]
    host = Host(Mock(), Mock(side_effect=guards), lambda _: {"here:worker": "worker"})
    with pytest.raises(RuntimeError):
        host.discover()
    host.discover()
    assert host.by_worker == {"here:worker": guards[1]}


def test_crash_while_postgres_is_away_is_seen_to(parts: Parts) -> None:
    """A crash while Postgres is away still leads to a restart, which counts against the budget."""
    parts.is_database_away = True
    made = parts.see(in_state(State.EXITED))
    assert (made.decision.action, parts.restarter.restarts, made.budget_left) == (Action.RESTART, 1, 1)
    served = parts.see(beating(NEW))
    assert (served.decision.verdict, served.intent) == (Verdict.DATABASE_AWAY, None)
    assert [event.outcome for event in parts.record.events] == ["recovered"]


def test_a_restart_is_not_over_before_its_worker_is_seen_to_serve(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever reads in the audit log that a restart has recovered, and asks for its status, finds a healthy worker."""
    parts.see(in_state(State.EXITED))
    seen: list[tuple[Verdict, ProbeAnswer]] = []
    close = parts.record.close

    def look(*given: Any) -> None:
        assert parts.guard.snapshot is not None
        seen.append((parts.guard.snapshot.decision.verdict, parts.guard.snapshot.evidence.health))
        close(*given)

    monkeypatch.setattr(parts.record, "close", look)
    parts.see(beating(NEW))
    assert seen == [(Verdict.HEALTHY, ProbeAnswer.SERVING)]


def test_nothing_is_done_that_cannot_be_written_down(parts: Parts) -> None:
    """With neither Postgres nor a journal a crash is held at no cost; once recording works, it is restarted once."""
    parts.record.can_write = False
    for _ in range(3):
        held = parts.see(in_state(State.EXITED))
        assert (held.decision.verdict, held.decision.action) == (Verdict.CRASHED, Action.HOLD)
    assert (parts.restarter.restarts, held.budget_left) == (0, 2)
    parts.record.can_write = True
    made = parts.see(in_state(State.EXITED))
    assert (made.decision.action, parts.restarter.restarts, made.budget_left) == (Action.RESTART, 1, 1)


def test_nothing_is_done_before_the_past_is_known() -> None:
    """A watchdog that does not know its predecessor's restarts neither restarts nor gives up."""
    parts = Parts()
    parts.record.given = None
    assert parts.see(in_state(State.EXITED)).decision.action is Action.HOLD
    parts.record.given = History(restart_ages_s=(10.0, 20.0))
    given_up = parts.see(in_state(State.EXITED))
    assert (given_up.decision.action, given_up.gave_up, parts.restarter.restarts) == (Action.GIVE_UP, True, 0)
    assert parts.record.kinds == ["gave_up"]


def test_what_postgres_adds_to_the_journal_counts(parts: Parts) -> None:
    """Restarts that only Postgres knows about count against the budget once it can be reached."""
    parts.record.given, parts.record.is_more_known = History(restart_ages_s=(10.0,)), True
    assert parts.see(beating(OLD)).budget_left == 1


def test_giving_up_is_written_down_once() -> None:
    """Giving up is recorded once, not at every check."""
    parts = Parts()
    parts.record.given = History(restart_ages_s=(10.0, 20.0))
    for _ in range(3):
        assert parts.see(in_state(State.EXITED)).gave_up
    assert parts.record.kinds == ["gave_up"]


def test_restart_that_fails_is_taken_up_again(parts: Parts) -> None:
    """When a restart fails after the stop, the next check finishes the open intent."""
    parts.restarter.failure = RestartError("supervisord refuses")
    parts.see(in_state(State.EXITED))
    parts.restarter.failure = None
    again = parts.see(in_state(State.STOPPED))
    assert (again.decision.verdict, again.decision.continues) == (Verdict.INTERRUPTED, True)
    assert [event.step for event in parts.record.events] == ["loading"]
    parts.see(beating(NEW))
    assert [(event.outcome, event.new_incarnation) for event in parts.record.events] == [("recovered", NEW)]


def test_restart_whose_worker_dies_again_has_failed(parts: Parts) -> None:
    """Each restart attempt has its own event with its own outcome."""
    parts.see(in_state(State.EXITED))
    parts.see(in_state(State.EXITED))
    parts.see(beating(NEW))
    assert [event.outcome for event in parts.record.events] == ["failed", "recovered"]


def test_intent_of_a_worker_that_never_stopped_is_superseded() -> None:
    """An open intent whose worker was never stopped and is healthy is closed as superseded, without a restart."""
    parts = Parts()
    event = parts.record.begin(in_state(State.RUNNING), Decision(Verdict.FROZEN, Action.RESTART, "", 0), {})
    parts.record.given = History(restart_ages_s=(1.0,), intent=event)
    assert parts.see(beating(OLD)).intent is None
    assert [event.outcome for event in parts.record.events] == ["superseded"]
    assert parts.restarter.restarts == 0


def test_budget_comes_back_with_the_reset(parts: Parts) -> None:
    """A budget reset takes effect at the next check."""
    for _ in range(3):
        last = parts.see(in_state(State.EXITED))
    assert (last.gave_up, last.budget_left) == (True, 0)
    parts.record.given = History(last_reset=uuid4())
    assert parts.see(in_state(State.EXITED)).decision.action is Action.RESTART
    assert parts.see(beating(NEW)).budget_left == 1


def test_pause_holds_also_while_postgres_is_away(parts: Parts) -> None:
    """A pause holds even while Postgres is away."""
    parts.record.given = History(pause_left_s=3.5, pause_end_time=TIME, pause_reason="new driver")
    assert parts.see(beating(OLD)).decision.verdict is Verdict.PAUSED
    parts.is_database_away = True
    assert parts.see(in_state(State.EXITED)).decision.verdict is Verdict.PAUSED
    parts.record.given = History()
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
    """Changes that interest an operator are recorded, and a restart gets no second entry."""
    parts = Parts()
    parts.see(first)
    parts.see(then)
    assert parts.record.kinds == kinds


def test_waiting_for_postgres_is_told_once(parts: Parts) -> None:
    """A worker that cannot start because Postgres is away is left alone for as long as it takes; one alert tells it."""
    parts.is_database_away = True
    for age_s in range(0, 3 * int(LIMITS.load_timeout_s), 100):
        waiting = replace(beating(NEW), process=Process(State.RUNNING, 9, age_s), health=ProbeAnswer.NOT_SERVING)
        parts.clock.time_s += 100
        assert parts.see(waiting).decision.action is Action.HOLD
    assert parts.alerts.told == [("dependency_away", "DATABASE_AWAY", "warning")]


def test_a_person_is_told_once(parts: Parts) -> None:
    """A recovery, a failed one, an outage of Postgres or supervisord, and giving up each raise one alert."""
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
    """Evidence is kept once per restart, before the worker is stopped."""
    parts.see(in_state(State.EXITED))
    parts.see(beating(NEW))
    assert parts.kept_before == [0]


def test_stop_that_hangs_is_told(parts: Parts) -> None:
    """A stop that supervisord does not finish is left alone, as it may be an operator's, and raises one alert."""
    for _ in range(5):
        seen = parts.see(in_state(State.STOPPING))
        assert seen.decision.action is Action.HOLD
        parts.clock.time_s += 50
    assert parts.alerts.told == [("transition_overdue", "TRANSITION", "error")]


def open_restart(step: Step) -> Event:
    return Event(0, uuid4(), "w", "restart", "FROZEN", "", {}, str(step), "open", {}, TIME, None, OLD, None)


HISTORIES = [
    History(),
    History(restart_ages_s=(10.0,)),
    History(restart_ages_s=(200.0, 0.5)),
    History(restart_ages_s=(2000.0, 1000.0), has_given_up=True),
    History(last_reset=uuid4()),
    History(restart_ages_s=(5.0,), pause_left_s=60.0, pause_end_time=TIME, pause_reason="new driver"),
    *(History(restart_ages_s=(5.0,), intent=open_restart(step)) for step in Step),
]
EVIDENCE = [
    beating(OLD),
    beating(OLD, age_s=200),
    replace(beating(OLD), health=ProbeAnswer.UNAVAILABLE),
    replace(beating(OLD), health=ProbeAnswer.UNAVAILABLE, database_up_s=None, heartbeat=None),
    replace(beating(OLD), process=None),
    *(in_state(state) for state in State),
]


@pytest.mark.parametrize("history", HISTORIES)
@pytest.mark.parametrize("evidence", EVIDENCE)
def test_dry_run_says_what_the_guard_does(evidence: Evidence, history: History) -> None:
    """Given the same evidence and history, the dry run decides as the guard does at every check until it restarts."""
    parts, bystander = Parts(), Bystander(LIMITS)
    parts.record.given = history
    if history.intent is not None:
        parts.record.events.append(history.intent)
    for _ in range(100):
        made = parts.see(evidence)
        assert bystander.decide(replace(evidence, time_s=parts.clock.time_s), history) == made.decision
        if made.decision.action is Action.RESTART or made.intent != history.intent:
            break


def test_dry_run_follows_the_guard_beside_it() -> None:
    """Through crashes, giving up and a reset, the dry run decides as the guard whose restarts it reads about."""
    parts = Parts(Limits(max_restarts_per_hour=3, backoff_s=1))
    bystander = Bystander(parts.limits)
    restarts: list[float] = []
    reset: UUID | None = None
    actions = []
    crashes = [in_state(State.EXITED)] * 12
    for evidence in [beating(OLD), *crashes, "reset", *crashes, beating(NEW), in_state(State.STOPPED)]:
        if isinstance(evidence, str):
            restarts, reset = [], uuid4()
            parts.record.kinds.clear()
            continue
        intent = next((event for event in parts.record.events if event.outcome == "open"), None)
        ages_s = tuple(parts.clock.time_s + 1 - time_s for time_s in restarts)
        history = History(ages_s, "gave_up" in parts.record.kinds, intent, last_reset=reset)
        parts.record.given = history
        made = parts.see(evidence).decision
        assert bystander.decide(replace(evidence, time_s=parts.clock.time_s), history) == made
        if made.action is Action.RESTART:
            restarts.append(parts.clock.time_s)
        actions.append(made.action)
    assert [actions.count(action) for action in (Action.RESTART, Action.BACK_OFF, Action.GIVE_UP)] == [6, 2, 16]


def test_dry_run_alone_counts_nothing() -> None:
    """Restarts that the dry run only proposes cost no budget and cause no back-off."""
    bystander = Bystander(LIMITS)
    crash, history = in_state(State.EXITED), History(restart_ages_s=(100.0,))
    actions = {bystander.decide(replace(crash, time_s=1000.0 + second), history).action for second in range(10)}
    assert actions == {Action.RESTART}


def dead_at_start(number: int, settings: str = "s") -> Evidence:
    """A life that ended before it ever served."""
    life = FailedStart(f"life-{number}", "s", "no such model", "Check it.", "k")
    return replace(in_state(State.EXITED), failed_start=life, settings=settings)


def test_starts_that_keep_failing_are_told_once_with_the_cause() -> None:
    """At the third failed start the watchdog gives up with one alert and one audit entry that names the cause."""
    parts = Parts(replace(LIMITS, max_restarts_per_hour=10))
    for number in range(3):
        parts.clock.time_s += 60
        parts.see(dead_at_start(number))
    parts.see(dead_at_start(2))
    assert parts.restarter.restarts == 2
    assert [told for told in parts.alerts.told if told[2] == "fatal"] == [("start_failed", "START_FAILED", "fatal")]
    [reason] = parts.record.reasons["gave_up"]
    assert "no such model. Check it." in reason


def test_changed_settings_end_a_give_up_in_the_audit_log() -> None:
    """The audit log says that changed settings ended a give-up and led to a restart."""
    parts = Parts(replace(LIMITS, max_restarts_per_hour=10))
    for number in range(3):
        parts.clock.time_s += 60
        snapshot = parts.see(dead_at_start(number))
    assert snapshot.gave_up
    # Once, however often it is decided while the restart cannot be recorded.
    parts.record.can_write = False
    for _ in range(3):
        assert parts.see(dead_at_start(2, settings="changed")).decision.action is Action.HOLD
    parts.record.can_write = True
    snapshot = parts.see(dead_at_start(2, settings="changed"))
    assert (snapshot.gave_up, parts.restarter.restarts) == (False, 3)
    assert parts.record.reasons["give_up_ended"] == ["the settings changed"]
