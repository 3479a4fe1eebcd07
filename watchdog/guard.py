"""Guards one worker: observe, decide, record, act, over and over, in a thread of its own."""

import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from uuid import UUID

from service import logs
from service.clock import Clock
from service.db.recoveries import Event, Standing
from watchdog import counts
from watchdog.act import AbandonedError, Restarter, RestartError
from watchdog.alerts import Alerts
from watchdog.observe import Observer
from watchdog.policy import (
    Action,
    Decision,
    Evidence,
    Intent,
    Limits,
    Memory,
    State,
    Step,
    Verdict,
    budget_left,
    decide,
)
from watchdog.record import DatabaseAwayError, Record
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
# What a person is told of though nothing is done: recovery cannot see, or not act.
AWAY = frozenset({Verdict.SUPERVISOR_AWAY, Verdict.DATABASE_AWAY})
NOTHING_ORDERED = Standing(0.0, None, "", 0)

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
    standing: Standing


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
    ) -> None:
        """`woken` is set by who has seen a change, as the observer, to have it check now.

        `keep_evidence` is called with the intent, before the life that it ends is touched.
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
        self._memory = Memory()
        self._intent: Event | None = None
        self._is_step_recorded = True
        self._has_recalled = False
        self._standing = NOTHING_ORDERED
        self._pause_until_s = 0.0
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

    def stop(self, timeout_s: float) -> None:
        """Ends guarding; a restart that is under way is left for the next watchdog to finish."""
        self._ending.set()
        self._woken.set()
        self._thread.join(timeout_s)

    def _guard(self) -> None:
        while not self._ending.is_set():
            try:
                check_in_s = self.check()
            except AbandonedError:
                log.warning("restart_abandoned", worker_id=self.worker_id)
                break
            except Exception as error:
                # A watchdog that dies of its own fault guards nothing.
                log.exception("check_failed", worker_id=self.worker_id)
                name = type(error).__name__
                self._alerts.tell("watchdog_error", name, self.worker_id, "error", f"a check failed: {error!r}", {})
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
        if evidence.database_up_s is not None:
            self._recall(evidence.time_s)
        intent = None if self._intent is None else Intent(self._intent.id, Step(self._intent.step))
        pause_left_s = max(0.0, self._pause_until_s - evidence.time_s)
        evidence = replace(evidence, intent=intent, pause_left_s=pause_left_s)
        decision, memory = decide(evidence, self._memory, self._limits)
        self._time_fault(evidence, decision)
        self._settle(evidence, decision)
        try:
            if decision.action is Action.RESTART:
                self._begin(evidence, decision)
            elif memory.gave_up and not self._memory.gave_up:
                self._give_up(evidence, decision)
            self._memory = memory
        except DatabaseAwayError as error:
            # Not done, not remembered: the next check decides it again.
            reason = f"{decision.reason}; held, it cannot be written down: {error}"
            decision = replace(decision, action=Action.HOLD, reason=reason, check_in_s=self._limits.restless_interval_s)
        self._tell(evidence, decision)
        self._publish(evidence, decision)
        if decision.action is Action.RESTART:
            self._restart(decision)
        return decision.check_in_s

    def _recall(self, now_s: float) -> None:
        """Learns what was done before our time, once, and what persons have ordered since."""
        try:
            if self._intent is not None and not self._is_step_recorded:
                self._record_step(self._intent)
            standing = self._record.standing()
            if not self._has_recalled:
                past = self._record.past()
                restarts = tuple(now_s - max(0.0, age_s) for age_s in past.restart_ages_s)
                streak = sum(age_s < self._limits.healthy_reset_s for age_s in past.restart_ages_s)
                self._memory = replace(self._memory, restarts=restarts, streak=streak, gave_up=past.has_given_up)
                self._intent = past.intent
            elif standing.last_reset != self._standing.last_reset:
                self._memory = self._memory.with_budget()
                log.info("budget_given_back", worker_id=self.worker_id)
        except DatabaseAwayError:
            return
        self._has_recalled = True
        self._standing = standing
        self._pause_until_s = now_s + standing.pause_left_s if standing.pause_left_s else 0.0

    def _time_fault(self, evidence: Evidence, decision: Decision) -> None:
        if decision.action is Action.HOLD:
            self._well_s, self._fault_s = evidence.time_s, None
        elif self._fault_s is None:
            self._fault_s = evidence.time_s

    def _tell(self, evidence: Evidence, decision: Decision) -> None:
        """Says a change of verdict in the log; also in the audit log when it is to or from health without a restart."""
        before = self.snapshot.decision if self.snapshot else None
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
        if decision.verdict in AWAY and (before is None or before.verdict is not decision.verdict):
            self._alert("dependency_away", decision.verdict, "warning", decision.reason, {})
        is_of_note = before is not None and before.verdict is not decision.verdict and decision.action is Action.HOLD
        if is_of_note and before and Verdict.HEALTHY in (before.verdict, decision.verdict) and evidence.intent is None:
            try:
                self._record.add("verdict", decision, evidence)
            except DatabaseAwayError:
                log.warning("event_not_recorded", worker_id=self.worker_id, verdict=decision.verdict)

    def _settle(self, evidence: Evidence, decision: Decision) -> None:
        """Brings the open intent to where the evidence shows it to be."""
        intent = self._intent
        if intent is None:
            return
        is_up = evidence.process is not None and evidence.process.state is State.RUNNING
        if intent.step == Step.STARTING and is_up:
            # The step is written when nothing of the old life is left: what runs is the new one.
            self._on_step(Step.LOADING, {})
        if decision.verdict is Verdict.HEALTHY and evidence.heartbeat and evidence.process:
            incarnation = UUID(evidence.heartbeat.incarnation)
            if incarnation == intent.old_incarnation:
                self._close("superseded", {}, None)
            else:
                self._close("recovered", {"load": round(evidence.process.age_s, 3)}, incarnation)
        elif decision.verdict is Verdict.OPERATOR_STOP:
            self._close("superseded", {}, None)
        elif decision.action not in (Action.HOLD, Action.CONFIRM) and not decision.continues:
            self._close("failed", {}, None)

    def _begin(self, evidence: Evidence, decision: Decision) -> None:
        """Writes the intent, or takes up the open one. Raises DatabaseAwayError: nothing may be done."""
        if decision.continues:
            return
        now_s = self._clock.monotonic()
        fault_s = now_s if self._fault_s is None else self._fault_s
        timings = {"decide": round(now_s - fault_s, 3)}
        if self._well_s is not None:
            timings = {"detect": round(fault_s - self._well_s, 3)} | timings
        if self._intent is not None or not self._has_recalled:
            raise DatabaseAwayError("the database is away")
        self._intent = self._record.begin(evidence, decision, timings)

    def _restart(self, decision: Decision) -> None:
        log.warning("restart_begun", worker_id=self.worker_id, verdict=decision.verdict, reason=decision.reason)
        if self._intent is not None and not decision.continues:
            self._keep_evidence(self._intent)
        try:
            pid = self._restarter.restart(decision.verdict, self._observer.leader, self._on_step)
        except (RestartError, SupervisorAwayError) as error:
            # The intent stays open: what is to be done next is decided by what is seen next.
            log.error("restart_failed", worker_id=self.worker_id, cause=str(error))
            return
        log.info("worker_started", worker_id=self.worker_id, pid=pid)

    def _on_step(self, step: Step, timings: dict[str, float]) -> None:
        if self._intent is None:
            return
        self._intent = replace(self._intent, step=str(step), timings={**self._intent.timings, **timings})
        if self.snapshot is not None:
            self.snapshot = replace(self.snapshot, intent=self._intent)
        try:
            self._record_step(self._intent)
        except DatabaseAwayError as error:
            # Between stop and start there is no way back: the worker must come up again. Written down when it can be.
            log.warning("step_not_recorded", worker_id=self.worker_id, step=step, cause=str(error))

    def _record_step(self, intent: Event) -> None:
        self._is_step_recorded = False
        self._record.advance(intent, Step(intent.step), dict(intent.timings))
        self._is_step_recorded = True

    def _close(self, outcome: str, timings: dict[str, float], incarnation: UUID | None) -> None:
        if self._intent is None:
            return
        timings = {**self._intent.timings, **timings}
        try:
            self._record.close(self._intent, outcome, timings, incarnation)
        except DatabaseAwayError:
            # Still open for us too: closed at a later check.
            return
        log.info("restart_ended", worker_id=self.worker_id, outcome=outcome, timings=timings)
        counts.restart_ended(self.worker_id, outcome, timings)
        if outcome in ALERTED:
            kind, level = ALERTED[outcome]
            told = {"event": self._intent.id, "timings": timings, "evidence": self._intent.evidence}
            self._alert(kind, Verdict(self._intent.verdict), level, self._intent.reason, told)
        self._intent = None

    def _give_up(self, evidence: Evidence, decision: Decision) -> None:
        """Writes that a person is needed. Raises DatabaseAwayError."""
        if not self._has_recalled:
            raise DatabaseAwayError("the database is away")
        self._record.add("gave_up", decision, evidence)
        log.error("gave_up", worker_id=self.worker_id, verdict=decision.verdict, reason=decision.reason)
        self._alert("budget_spent", decision.verdict, "fatal", decision.reason, {"evidence": asdict(evidence)})

    def _alert(self, kind: str, verdict: Verdict, level: str, reason: str, told: dict[str, object]) -> None:
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
            standing=self._standing,
        )
        if before is None or before.decision != decision or before.gave_up != self.snapshot.gave_up:
            self._on_change()
