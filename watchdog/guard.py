"""Guards one worker: observe, decide, record, act, over and over, in a thread of its own."""

import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from uuid import UUID

from service import logs
from service.clock import Clock
from service.db.recoveries import Event
from watchdog import counts
from watchdog.act import AbandonedError, Restarter, RestartError
from watchdog.alerts import Alerts
from watchdog.observe import Observer
from watchdog.outages import Outage
from watchdog.past import Past
from watchdog.policy import (
    Action,
    Decision,
    Evidence,
    Health,
    Intent,
    Limits,
    Memory,
    State,
    Step,
    Verdict,
    budget_left,
    decide,
)
from watchdog.record import Record, UnrecordedError
from watchdog.supervisor import SupervisorAwayError

# How often supervisord is asked in between: that costs it nearly nothing.
POLL_S = 0.5
# After a check that failed by a fault of ours.
RETRY_S = 1.0

# Verdicts that nobody has to be told about.
QUIET = frozenset(
    {
        Verdict.HEALTHY,
        Verdict.STARTING,
        Verdict.DRAINING,
        Verdict.TRANSITION,
        Verdict.OPERATOR_STOP,
        Verdict.PAUSED,
    }
)
# What the audit log says the beginning and the end of, though nothing is done.
OF_NOTE = frozenset({Verdict.HEALTHY, Verdict.OPERATOR_STOP})

# Outcomes of a restart that a person is told of, and how loudly.
ALERTED = {"recovered": ("worker_recovered", "warning"), "failed": ("recovery_failed", "error")}

log = logs.get("guard")


@dataclass(frozen=True)
class Snapshot:
    """What the guard saw and decided last, for who asks."""

    worker_id: str
    evidence: Evidence
    decision: Decision
    verdict_time: datetime
    observe_time: datetime
    budget_left: int
    gave_up: bool
    intent: Event | None
    past: Past


class Guard:
    """Keeps one worker alive. `on_change` is called from its thread after each change of verdict or action."""

    def __init__(
        self,
        worker_id: str,
        observer: Observer,
        record: Record,
        restarter: Restarter,
        limits: Limits,
        clock: Clock,
        woken: threading.Event,
        on_change: Callable[[], None],
        keep_evidence: Callable[[Event], None],
        alerts: Alerts,
        outages: Mapping[Verdict, Outage],
    ) -> None:
        """`woken` is set by who has seen a change, as the observer, to have it check now.

        `keep_evidence` is called with the intent, before the life that it ends is touched. `outages` are those of
        Postgres and supervisord, by the verdict that they lead to.
        """
        counts.begin(worker_id)
        self.worker_id = worker_id
        # None until the first check.
        self.snapshot: Snapshot | None = None
        self._observer = observer
        self._record = record
        self._restarter = restarter
        self._limits = limits
        self._clock = clock
        self._on_change = on_change
        self._keep_evidence = keep_evidence
        self._alerts = alerts
        self._outages = outages
        # What the last check failed of, if it did.
        self._fault = ""
        self._memory = Memory()
        self._intent: Event | None = None
        # None: what was done before our time is not known yet.
        self._past: Past | None = None
        # When all was well last, and when it was not first: how long a fault was not noticed, and not acted on.
        self._well_s: float | None = None
        self._fault_s: float | None = None
        self._woken = woken
        self._ending = restarter.ending
        self._thread = threading.Thread(target=self._guard, name=f"guard-{worker_id}", daemon=True)

    def start(self) -> None:
        """Begins to guard."""
        self._thread.start()

    def wake(self) -> None:
        """Has it check now."""
        self._woken.set()

    def order(self, kind: str, reason: str, lasts_s: float = 0) -> datetime:
        """Writes down what a person orders, and heeds it. Returns when it ends. Raises UnrecordedError."""
        verdict = str(self.snapshot.decision.verdict) if self.snapshot else ""
        end_time = self._record.order(kind, verdict, reason, lasts_s)
        log.info("ordered", worker_id=self.worker_id, kind=kind, reason=reason)
        self.wake()
        return end_time

    def stop(self, timeout_s: float) -> None:
        """Ends guarding; a restart that is under way is left for the next watchdog to finish."""
        self._ending.set()
        self._woken.set()
        self._thread.join(timeout_s)

    def _guard(self) -> None:
        while not self._ending.is_set():
            try:
                check_in_s = self.check()
                self._fault = ""
            except AbandonedError:
                log.warning("restart_abandoned", worker_id=self.worker_id)
                break
            except Exception as error:
                # A watchdog that dies of its own fault guards nothing.
                log.exception("check_failed", worker_id=self.worker_id)
                if (name := type(error).__name__) != self._fault:
                    self._alerts.fault(f"guard-{self.worker_id}", error)
                self._fault = name
                check_in_s = RETRY_S
            self._wait(check_in_s)
        self._observer.close()

    def _wait(self, check_in_s: float) -> None:
        """Until it is time, or somebody wakes us, or supervisord shows another process or state."""
        until_s = self._clock.monotonic() + check_in_s
        while (left_s := until_s - self._clock.monotonic()) > 0:
            if self._woken.wait(min(POLL_S, left_s)):
                self._woken.clear()
                return
            last = self.snapshot.evidence.process if self.snapshot else None
            now = self._observer.process()
            if (now and (now.state, now.pid)) != (last and (last.state, last.pid)):
                return
            if self._fault_s is None:
                self._well_s = self._clock.monotonic()

    def check(self) -> float:
        """One round. Returns after how many seconds the next is due at the latest."""
        evidence = self._observer.observe()
        if evidence.process is not None and evidence.process.pid:
            self._restarter.remains.look(self._observer.leader)
        self._recall(evidence)
        intent = None if self._intent is None else Intent(str(self._intent.key), Step(self._intent.step))
        evidence = replace(evidence, intent=intent, pause_left_s=self._past.pause_left_s if self._past else 0.0)
        decision, memory = decide(evidence, self._memory, self._limits)
        self._time_fault(evidence, decision)
        self._settle(evidence, decision)
        self._note_outages(evidence)
        try:
            if decision.action is Action.RESTART:
                self._begin(evidence, decision)
            elif memory.gave_up and not self._memory.gave_up:
                self._give_up(evidence, decision)
            self._memory = memory
        except UnrecordedError as error:
            # Not done, not remembered: the next check decides it again.
            reason = f"{decision.reason}; held, it cannot be written down: {error}"
            decision = replace(decision, action=Action.HOLD, reason=reason, check_in_s=self._limits.restless_interval_s)
        self._tell(evidence, decision)
        self._publish(evidence, decision)
        if decision.action is Action.RESTART:
            self._restart(decision)
        return decision.check_in_s

    def _recall(self, evidence: Evidence) -> None:
        """Learns what was done before our time, once, and what persons have ordered since."""
        is_more_known = self._record.sync(evidence.database_up_s is not None)
        before, past = self._past, self._record.past()
        if past is None:
            return
        if before is None or is_more_known:
            self._memory = self._memory.with_past(past.restart_ages_s, past.has_given_up, evidence.time_s, self._limits)
            self._intent = self._intent or past.intent
        elif past.last_reset != before.last_reset:
            self._memory = self._memory.with_budget()
            log.info("budget_given_back", worker_id=self.worker_id)
        self._past = past

    def _time_fault(self, evidence: Evidence, decision: Decision) -> None:
        if decision.action is Action.HOLD:
            self._well_s, self._fault_s = evidence.time_s, None
        elif self._fault_s is None:
            self._fault_s = evidence.time_s

    def _note_outages(self, evidence: Evidence) -> None:
        for verdict, is_away, what in (
            (Verdict.DATABASE_AWAY, evidence.database_up_s is None, "Postgres does not answer"),
            (Verdict.SUPERVISOR_AWAY, evidence.process is None, "supervisord does not answer"),
        ):
            if self._outages[verdict].note(is_away, evidence.time_s):
                self._alert("dependency_away", verdict, "warning", what, {})

    def _tell(self, evidence: Evidence, decision: Decision) -> None:
        """Says a change of verdict in the log; also in the audit log when it is of note and no restart comes of it."""
        before = self.snapshot.decision if self.snapshot else None
        if decision.is_overdue and not (before and before.is_overdue):
            self._alert("transition_overdue", decision.verdict, "error", decision.reason, {})
        if before is not None and (before.verdict, before.action) == (decision.verdict, decision.action):
            return
        level = log.info if decision.verdict in QUIET and decision.action is Action.HOLD else log.warning
        level(
            "verdict_changed",
            worker_id=self.worker_id,
            verdict=decision.verdict,
            action=decision.action,
            reason=decision.reason,
            was=before and before.verdict,
        )
        is_of_note = before is not None and before.verdict is not decision.verdict and decision.action is Action.HOLD
        if is_of_note and before and evidence.intent is None and OF_NOTE & {before.verdict, decision.verdict}:
            self._record.add("verdict", decision, evidence)

    def _settle(self, evidence: Evidence, decision: Decision) -> None:
        """Brings the open intent to where the evidence shows it to be."""
        if self._intent is None:
            return
        is_up = evidence.process is not None and evidence.process.state is State.RUNNING
        if self._intent.step == Step.STARTING and is_up:
            # The step is written when nothing of the old life is left: what runs is the new one.
            self._on_step(Step.LOADING, {})
        intent = self._intent
        incarnation = _incarnation(evidence)
        if decision.verdict is Verdict.HEALTHY and incarnation == intent.old_incarnation:
            self._close("superseded", {}, None)
        elif decision.verdict is Verdict.HEALTHY or (
            # Without Postgres nobody can say who it is, but what we started serves.
            decision.verdict is Verdict.DATABASE_AWAY
            and evidence.health is Health.SERVING
            and intent.step == Step.LOADING
        ):
            load_s = evidence.process.age_s if evidence.process else 0.0
            self._close("recovered", {"load": round(load_s, 3)}, incarnation)
        elif decision.verdict is Verdict.OPERATOR_STOP:
            self._close("superseded", {}, None)
        elif decision.action not in (Action.HOLD, Action.CONFIRM) and not decision.continues:
            self._close("failed", {}, None)

    def _begin(self, evidence: Evidence, decision: Decision) -> None:
        """Writes the intent, or takes up the open one. Raises UnrecordedError: nothing may be done."""
        if decision.continues:
            return
        now_s = self._clock.monotonic()
        fault_s = now_s if self._fault_s is None else self._fault_s
        timings = {"decide": round(now_s - fault_s, 3)}
        if self._well_s is not None:
            timings = {"detect": round(fault_s - self._well_s, 3)} | timings
        self._intent = self._record.begin(evidence, decision, timings)

    def _restart(self, decision: Decision) -> None:
        log.warning("restart_begun", worker_id=self.worker_id, verdict=decision.verdict, reason=decision.reason)
        if self._intent is not None and not decision.continues:
            began_s = self._clock.monotonic()
            self._keep_evidence(self._intent)
            took_s = round(self._clock.monotonic() - began_s, 3)
            # Written down with the first step.
            self._intent = replace(self._intent, timings={**self._intent.timings, "evidence": took_s})
        # How long the old life may take to end is a matter of why it has to, also when another watchdog began it.
        verdict = decision.verdict if self._intent is None else Verdict(self._intent.verdict)
        try:
            pid = self._restarter.restart(verdict, self._observer.leader, self._on_step)
        except (RestartError, SupervisorAwayError) as error:
            # The intent stays open: what is to be done next is decided by what is seen next.
            log.error("restart_failed", worker_id=self.worker_id, cause=str(error))
            return
        log.info("worker_started", worker_id=self.worker_id, pid=pid)

    def _on_step(self, step: Step, timings: dict[str, float]) -> None:
        if self._intent is None:
            return
        self._intent = self._record.advance(self._intent, step, {**self._intent.timings, **timings})
        if self.snapshot is not None:
            self.snapshot = replace(self.snapshot, intent=self._intent)

    def _close(self, outcome: str, timings: dict[str, float], incarnation: UUID | None) -> None:
        if self._intent is None:
            return
        timings = {**self._intent.timings, **timings}
        self._record.close(self._intent, outcome, timings, incarnation)
        log.info("restart_ended", worker_id=self.worker_id, outcome=outcome, timings=timings)
        counts.restart_ended(self.worker_id, outcome, timings)
        if outcome in ALERTED:
            kind, level = ALERTED[outcome]
            told = {"event": str(self._intent.key), "timings": timings, "evidence": self._intent.evidence}
            self._alert(kind, Verdict(self._intent.verdict), level, self._intent.reason, told)
        self._intent = None

    def _give_up(self, evidence: Evidence, decision: Decision) -> None:
        """Writes that a person is needed. Raises UnrecordedError: nobody knows whether that is so."""
        if self._past is None:
            raise UnrecordedError("what was done before is not known")
        self._record.add("gave_up", decision, evidence)
        log.error("gave_up", worker_id=self.worker_id, verdict=decision.verdict, reason=decision.reason)
        self._alert("budget_spent", decision.verdict, "fatal", decision.reason, {"evidence": asdict(evidence)})

    def _alert(self, kind: str, verdict: Verdict, level: str, reason: str, told: Mapping[str, object]) -> None:
        message = f"{self.worker_id}: {kind.replace('_', ' ')}, {verdict}: {reason}"
        self._alerts.tell(kind, str(verdict), self.worker_id, level, message, told)

    def _publish(self, evidence: Evidence, decision: Decision) -> None:
        before, now = self.snapshot, self._clock.now()
        is_same = before is not None and before.decision.verdict is decision.verdict
        self.snapshot = Snapshot(
            worker_id=self.worker_id,
            evidence=evidence,
            decision=decision,
            verdict_time=before.verdict_time if before and is_same else now,
            observe_time=now,
            budget_left=budget_left(self._memory, evidence.time_s, self._limits),
            gave_up=self._memory.gave_up,
            intent=self._intent,
            past=self._past or Past(),
        )
        if before is None or before.decision != decision or before.gave_up != self.snapshot.gave_up:
            self._on_change()


def _incarnation(evidence: Evidence) -> UUID | None:
    """Who it is that runs, as far as it has said so."""
    heartbeat = evidence.heartbeat
    return UUID(heartbeat.incarnation) if heartbeat is not None and heartbeat.is_current else None
