"""Guards one worker or gateway: observe, decide, record, act, in a loop in its own thread."""

import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from uuid import UUID

from service.clock import Clock
from service.db.recoveries import Event
from service.telemetry import logs
from watchdog import counters
from watchdog.act.restart import AbandonedError, Restarter, RestartError
from watchdog.alerts import Alerts
from watchdog.judge import is_given_back, judge, recall
from watchdog.observe.observer import Observer
from watchdog.outages import Outage
from watchdog.policy import (
    Action,
    Decision,
    Evidence,
    Limits,
    Memory,
    ProbeAnswer,
    State,
    Step,
    Verdict,
    budget_left,
)
from watchdog.record.audit_log import AuditLog, UnrecordedError
from watchdog.record.history import History
from watchdog.supervisor import SupervisorAwayError

# Delay after a check that raised an unexpected exception.
RETRY_S = 1.0

# Verdicts that are no cause for a warning in the log while the guard holds.
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
# Verdicts whose beginning and end go into the audit log although nothing is done.
OF_NOTE = frozenset({Verdict.HEALTHY, Verdict.OPERATOR_STOP, Verdict.NAME_TAKEN})

# Restart outcomes that raise an alert: its kind and level.
ALERTED = {"recovered": ("worker_recovered", "warning"), "failed": ("recovery_failed", "error")}

log = logs.get("guard")


@dataclass(frozen=True)
class Snapshot:
    """The guard's last observation and decision, for RecoveryService and metrics."""

    worker_id: str
    evidence: Evidence
    decision: Decision
    verdict_time: datetime
    observe_time: datetime
    budget_left: int
    gave_up: bool
    intent: Event | None
    history: History


class Guard:
    """Keeps one worker alive. `on_change` is called from its thread after each change of verdict or action."""

    def __init__(
        self,
        worker_id: str,
        observer: Observer,
        record: AuditLog,
        restarter: Restarter,
        limits: Limits,
        clock: Clock,
        woken: threading.Event,
        on_change: Callable[[], None],
        keep_evidence: Callable[[Event], None],
        alerts: Alerts,
        outages: Mapping[Verdict, Outage],
        poll_s: float,
    ) -> None:
        """Setting `woken` triggers a check; the observer does so when it sees a change.

        `keep_evidence` is called with the intent before the restart touches the worker. `outages` maps the verdicts
        DATABASE_AWAY and SUPERVISOR_AWAY to the outages of Postgres and supervisord. Between checks supervisord is
        polled every `poll_s`.
        """
        counters.begin(worker_id)
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
        self._poll_s = poll_s
        # Type of the exception that the last check raised; "" if it raised none.
        self._fault = ""
        self._memory = Memory()
        self._intent: Event | None = None
        # None: earlier events are not known yet.
        self._history: History | None = None
        # Last time without a fault, and first time with one: they give the time to detect and the time to decide.
        self._well_s: float | None = None
        self._fault_s: float | None = None
        self._woken = woken
        self._ending = restarter.ending
        self._thread = threading.Thread(target=self._guard, name=f"guard-{worker_id}", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def wake(self) -> None:
        """Triggers a check now."""
        self._woken.set()

    def order(self, kind: str, reason: str, lasts_s: float = 0) -> datetime:
        """Records an operator's order and applies it. Returns when it ends. Raises UnrecordedError."""
        verdict = str(self.snapshot.decision.verdict) if self.snapshot else ""
        end_time = self._record.order(kind, verdict, reason, lasts_s)
        log.info("ordered", worker_id=self.worker_id, kind=kind, reason=reason)
        self.wake()
        return end_time

    def stop(self, timeout_s: float) -> None:
        """Stops guarding and waits up to `timeout_s`; the next watchdog finishes a restart in progress."""
        self._ending.set()
        self._woken.set()
        self._thread.join(timeout_s)

    def _guard(self) -> None:
        while not self._ending.is_set():
            try:
                self._wait(self.check())
                self._fault = ""
            except AbandonedError:
                log.warning("restart_abandoned", worker_id=self.worker_id)
                break
            except Exception as error:
                # A bug, or what this machine refuses for a moment, must not end the guard: nobody would notice.
                log.exception("check_failed", worker_id=self.worker_id)
                if (name := type(error).__name__) != self._fault:
                    self._alerts.fault(f"guard-{self.worker_id}", error)
                self._fault = name
                # Not for `_woken`, which only `_wait` clears.
                self._ending.wait(RETRY_S)
        self._observer.close()

    def _wait(self, check_in_s: float) -> None:
        """Waits until the next check is due, `wake` is called, or supervisord reports another process or state."""
        until_s = self._clock.monotonic() + check_in_s
        while (left_s := until_s - self._clock.monotonic()) > 0:
            if self._woken.wait(min(self._poll_s, left_s)):
                self._woken.clear()
                return
            last = self.snapshot.evidence.process if self.snapshot else None
            now = self._observer.process()
            if (now and (now.state, now.pid)) != (last and (last.state, last.pid)):
                return
            if self._fault_s is None:
                self._well_s = self._clock.monotonic()

    def check(self) -> float:
        """Runs one round. Returns the seconds until the next one is due."""
        before, evidence = self.snapshot, self._observer.observe()
        if evidence.process is not None and evidence.process.pid:
            self._restarter.leftovers.look(self._observer.leader)
        self._recall(evidence)
        evidence, decision, memory = judge(evidence, self._history, self._intent, self._memory, self._limits)
        self._time_fault(evidence, decision)
        if decision.action is Action.HOLD:
            # Who reads in the audit log that a restart is over finds here what ended it.
            self._publish(before, evidence, decision)
        self._settle(evidence, decision)
        self._note_outages(evidence)
        try:
            if self._memory.gave_up and not memory.gave_up:
                self._end_give_up(evidence, decision)
            if decision.action is Action.RESTART:
                self._begin(evidence, decision)
            elif memory.gave_up and not self._memory.gave_up:
                self._give_up(evidence, decision)
            self._memory = memory
        except UnrecordedError as error:
            # Neither acted on nor remembered: the next check decides again.
            reason = f"{decision.reason}; on hold because it cannot be recorded: {error}"
            decision = replace(decision, action=Action.HOLD, reason=reason, check_in_s=self._limits.restless_interval_s)
        self._tell(before, evidence, decision)
        self._publish(before, evidence, decision)
        if decision.action is Action.RESTART:
            self._restart(decision)
        return decision.check_in_s

    def _recall(self, evidence: Evidence) -> None:
        """Loads earlier events once, then operators' orders as they come."""
        is_more_known = self._record.sync(evidence.database_up_s is not None)
        known, history = self._history, self._record.history()
        if history is None:
            return
        self._memory = recall(self._memory, known, history, evidence.time_s, self._limits, is_more_known=is_more_known)
        if known is None or is_more_known:
            self._intent = self._intent or history.intent
        if is_given_back(known, history):
            log.info("budget_given_back", worker_id=self.worker_id)
        self._history = history

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

    def _tell(self, last: Snapshot | None, evidence: Evidence, decision: Decision) -> None:
        """Logs a change of verdict or action; adds it to the audit log if it is of note and no restart follows."""
        before = last.decision if last else None
        if decision.is_overdue and not (before and before.is_overdue):
            self._alert("transition_overdue", decision.verdict, "error", decision.reason, {})
        if before is not None and (before.verdict, before.action) == (decision.verdict, decision.action):
            return
        if decision.verdict is Verdict.NAME_TAKEN:
            self._alert("name_taken", decision.verdict, "error", decision.reason, {})
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
        """Advances or closes the open intent as the evidence shows."""
        if self._intent is None:
            return
        is_up = evidence.process is not None and evidence.process.state is State.RUNNING
        if self._intent.step == Step.STARTING and is_up:
            # STARTING is recorded only once the old processes are gone, so this is the new one.
            self._on_step(Step.LOADING, {})
        intent = self._intent
        incarnation = _incarnation(evidence)
        if decision.verdict is Verdict.HEALTHY and incarnation and incarnation == intent.old_incarnation:
            self._close("superseded", {}, None)
        elif decision.verdict is Verdict.HEALTHY or (
            # Without Postgres its incarnation is unknown, but the process that we started serves.
            decision.verdict is Verdict.DATABASE_AWAY
            and evidence.health is ProbeAnswer.SERVING
            and intent.step == Step.LOADING
        ):
            load_s = evidence.process.age_s if evidence.process else 0.0
            self._close("recovered", {"load": round(load_s, 3)}, incarnation)
        elif decision.verdict is Verdict.OPERATOR_STOP:
            self._close("superseded", {}, None)
        elif decision.action not in (Action.HOLD, Action.CONFIRM) and not decision.continues:
            self._close("failed", {}, None)

    def _begin(self, evidence: Evidence, decision: Decision) -> None:
        """Records the intent, or continues the open one. Raises UnrecordedError: then do not act."""
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
            # Recorded with the next step.
            self._intent = replace(self._intent, timings={**self._intent.timings, "evidence": took_s})
        # The grace period depends on the original verdict, even if another watchdog began the restart.
        verdict = decision.verdict if self._intent is None else Verdict(self._intent.verdict)
        try:
            pid = self._restarter.restart(verdict, self._observer.leader, self._on_step)
        except (RestartError, SupervisorAwayError) as error:
            # Leave the intent open: the next check decides how to go on.
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
        counters.restart_ended(self.worker_id, outcome, timings)
        if outcome in ALERTED:
            kind, level = ALERTED[outcome]
            told = {"event": str(self._intent.key), "timings": timings, "evidence": self._intent.evidence}
            self._alert(kind, Verdict(self._intent.verdict), level, self._intent.reason, told)
        self._intent = None

    def _give_up(self, evidence: Evidence, decision: Decision) -> None:
        """Records and alerts that an operator is needed. Raises UnrecordedError while earlier events are unknown."""
        if self._history is None:
            raise UnrecordedError("earlier events are not known yet")
        self._record.add("gave_up", decision, evidence)
        log.error("gave_up", worker_id=self.worker_id, verdict=decision.verdict, reason=decision.reason)
        kind = "start_failed" if decision.verdict is Verdict.START_FAILED else "budget_spent"
        self._alert(kind, decision.verdict, "fatal", decision.reason, {"evidence": asdict(evidence)})

    def _end_give_up(self, evidence: Evidence, decision: Decision) -> None:
        """Records that starts may succeed again."""
        why = "it serves" if decision.verdict is Verdict.HEALTHY else "the settings changed"
        self._record.add("give_up_ended", replace(decision, reason=why), evidence)
        # Also if what follows cannot be recorded, and is decided again.
        self._memory = self._memory.with_fresh_starts()
        log.info("give_up_ended", worker_id=self.worker_id, reason=why)

    def _alert(self, kind: str, verdict: Verdict, level: str, reason: str, told: Mapping[str, object]) -> None:
        message = f"{self.worker_id}: {kind.replace('_', ' ')}, {verdict}: {reason}"
        self._alerts.tell(kind, str(verdict), self.worker_id, level, message, told)

    def _publish(self, before: Snapshot | None, evidence: Evidence, decision: Decision) -> None:
        now = self._clock.now()
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
            history=self._history or History(),
        )
        if before is None or before.decision != decision or before.gave_up != self.snapshot.gave_up:
            self._on_change()


def _incarnation(evidence: Evidence) -> UUID | None:
    """The running process's incarnation, if its heartbeat is there."""
    heartbeat = evidence.heartbeat
    return UUID(heartbeat.incarnation) if heartbeat is not None and heartbeat.is_current else None
