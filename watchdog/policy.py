"""The decision table of recovery: from evidence to verdict and action. Pure: no I/O, no clock."""

from dataclasses import dataclass, replace
from enum import Enum, StrEnum, auto

HOUR_S = 3600.0
# How our programs end when they refuse their settings, which they do before they can report anything; how to see why.
EXIT_WRONG_SETTINGS = 2
CHECK = "`scripts/doctor.sh`"
# Instead of a fingerprint: any settings that can be read are others.
WRONG_SETTINGS = "wrong"

# Phases as written in workers' heartbeats.
LOADING_PHASES = frozenset({"starting", "loading"})
ENDING_PHASES = frozenset({"draining", "stopping"})


class State(StrEnum):
    """A process's state in supervisord."""

    STOPPED = "STOPPED"
    STARTING = "STARTING"
    RUNNING = "RUNNING"
    BACKOFF = "BACKOFF"
    STOPPING = "STOPPING"
    EXITED = "EXITED"
    FATAL = "FATAL"
    UNKNOWN = "UNKNOWN"


class ProbeAnswer(StrEnum):
    """The answer to a health probe, or how it failed."""

    SERVING = "SERVING"
    NOT_SERVING = "NOT_SERVING"
    UNKNOWN = "UNKNOWN"
    UNAVAILABLE = "UNAVAILABLE"
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
    NOT_PROBED = "NOT_PROBED"


class Step(StrEnum):
    """How far a restart by the watchdog has come."""

    STOPPING = "stopping"
    STARTING = "starting"
    LOADING = "loading"


class Verdict(StrEnum):
    """What the evidence means: the rows of the table, in order."""

    SUPERVISOR_AWAY = "SUPERVISOR_AWAY"
    PAUSED = "PAUSED"
    INTERRUPTED = "INTERRUPTED"
    OPERATOR_STOP = "OPERATOR_STOP"
    NAME_TAKEN = "NAME_TAKEN"
    START_FAILED = "START_FAILED"
    CRASHED = "CRASHED"
    STARTING = "STARTING"
    START_TIMEOUT = "START_TIMEOUT"
    HEALTHY = "HEALTHY"
    DATABASE_AWAY = "DATABASE_AWAY"
    HEARTBEAT_LOST = "HEARTBEAT_LOST"
    DRAINING = "DRAINING"
    ENGINE_STALLED = "ENGINE_STALLED"
    ENGINE_DEAD = "ENGINE_DEAD"
    RPC_WEDGED = "RPC_WEDGED"
    FROZEN = "FROZEN"
    NOT_READY = "NOT_READY"
    TRANSITION = "TRANSITION"


class Action(StrEnum):
    """What follows from a verdict."""

    HOLD = "HOLD"
    CONFIRM = "CONFIRM"
    BACK_OFF = "BACK_OFF"
    RESTART = "RESTART"
    GIVE_UP = "GIVE_UP"


@dataclass(frozen=True)
class Process:
    """A process as supervisord reports it. `pid` is 0 if there is none; `age_s` is the time since it started.

    `cause` says why supervisord could not start it, if it could not; `exit_status` how the last one ended, -1 by a
    signal.
    """

    state: State
    pid: int = 0
    age_s: float = 0.0
    cause: str = ""
    exit_status: int = 0


@dataclass(frozen=True)
class Heartbeat:
    """A worker's last heartbeat, aged by the database's clock. `is_current`: the running process wrote it.

    `cause` and `advice`: why the engine failed, or, until the worker is ready, the previous start; and what to do.
    """

    age_s: float
    phase: str
    is_current: bool
    incarnation: str = ""
    cause: str = ""
    advice: str = ""


@dataclass(frozen=True)
class FailedStart:
    """An incarnation that ended, or lost its engine, before its settings had ever served.

    `settings` is the fingerprint of its settings. `cause` and `advice` are for people; failures of the same kind have
    the same `key`. `recurs`: every start with these settings fails so.
    """

    incarnation: str
    settings: str
    cause: str
    advice: str
    key: str
    recurs: bool = False

    def is_like(self, other: "FailedStart") -> bool:
        """True when both failed the same way with the same settings."""
        return (self.settings, self.key) == (other.settings, other.key)


@dataclass(frozen=True)
class Intent:
    """A restart that the watchdog has recorded and not finished."""

    key: str
    step: Step


@dataclass(frozen=True)
class Evidence:
    """Everything known about a worker at one moment. None means unknown, which is never a reason to act."""

    # Monotonic.
    time_s: float
    # None: supervisord is unreachable or shutting down.
    process: Process | None
    health: ProbeAnswer = ProbeAnswer.NOT_PROBED
    # How long Postgres has been up and reachable. None: it is away.
    database_up_s: float | None = None
    # None: there is no row, or Postgres is away.
    heartbeat: Heartbeat | None = None
    intent: Intent | None = None
    pause_left_s: float = 0.0
    # False for a program without a heartbeat that supervisord itself restarts when it exits: the gateway and http.
    beats: bool = True
    # The last incarnation, if it failed to start.
    failed_start: FailedStart | None = None
    # The settings of the last incarnation have served, in its life or an earlier one.
    has_served: bool = False
    # Fingerprint of the settings that a worker started now would get; "" if they are wrong or cannot be read.
    settings: str = ""
    # When the watchdog itself, perhaps with the whole machine, was last held up.
    stalled_until_s: float = 0.0
    # The other machine that runs under this worker's name; "" if none does.
    name_taken_by: str = ""


@dataclass(frozen=True)
class Limits:
    """Timeouts and budgets. The last group is fixed; the others come from the settings."""

    max_restarts_per_hour: int = 10
    heartbeat_timeout_s: float = 60
    check_interval_s: float = 30
    load_timeout_s: float = 1800
    drain_timeout_s: float = 60
    # For STARTING, BACKOFF and UNKNOWN; longer than a stop may take.
    transition_timeout_s: float = 120
    # Longer than two beats: after the database's clock jumps, every heartbeat looks stale until the next one.
    heartbeat_confirm_s: float = 15

    # A new process gets the heartbeat timeout for its first heartbeat, but at least this.
    start_grace_s: float = 30
    # Before a process that still runs is restarted, this many consecutive probes, this far apart, must agree.
    confirm_probes: int = 3
    confirm_interval_s: float = 0.5
    # How long they must agree when the worker itself reports a fault, or nothing of it moves;
    confirm_s: float = 2
    # when it does not answer, and beats or nobody knows: it may be very busy;
    wedged_confirm_s: float = 20
    # and when all we know is that it does not serve.
    not_ready_confirm_s: float = 60
    # Time between checks while anything is unsettled.
    restless_interval_s: float = 1
    # Between the first and the second restart; doubled for each further one.
    backoff_s: float = 1
    backoff_max_s: float = 300
    # The backoff starts over once the worker has been healthy this long.
    healthy_reset_s: float = 300
    # After this many starts have failed the same way, a worker whose settings have never served is left stopped.
    max_alike_failures: int = 3


@dataclass(frozen=True)
class Suspicion:
    """A run of probes that found the process unhealthy. `since_s`: when the current verdict began."""

    pid: int
    verdict: Verdict
    sick_since_s: float
    since_s: float
    probes: int


@dataclass(frozen=True)
class Memory:
    """State carried from one decision to the next. Times are on the evidence's clock."""

    # Times of the restarts within the last hour.
    restarts: tuple[float, ...] = ()
    # Restarts since the worker was last healthy for `healthy_reset_s`.
    streak: int = 0
    healthy_since_s: float | None = None
    # The budget is exhausted, or starting is pointless. Stays set until an operator resets the budget.
    gave_up: bool = False
    # Set when starting is pointless: the settings at that time. Different settings end the give-up too.
    gave_up_settings: str = ""
    # The latest starts, as far back as they failed the same way; and the last failure before an operator's reset.
    failed_starts: tuple[FailedStart, ...] = ()
    forgiven: str = ""
    # The phase last reported by process `heard_pid`.
    heard_pid: int = 0
    heard_phase: str = ""
    # Since when that process could load: it waits for Postgres before it begins. None: not known to be possible yet.
    able_since_s: float | None = None
    ending_since_s: float | None = None
    transition_since_s: float | None = None
    suspicion: Suspicion | None = None
    # The intent that was continued without charging the budget again.
    continued_intent: str | None = None

    def with_budget(self) -> "Memory":
        """Returns the memory with a full budget, after an operator's reset."""
        return replace(self.with_fresh_starts(), restarts=(), streak=0)

    def with_fresh_starts(self) -> "Memory":
        """Returns the memory without failed starts; the last one will not be counted again."""
        forgiven = self.failed_starts[-1].incarnation if self.failed_starts else self.forgiven
        return replace(self, gave_up=False, gave_up_settings="", failed_starts=(), forgiven=forgiven)

    def with_past(
        self,
        restart_ages_s: tuple[float, ...],
        has_given_up: bool,
        time_s: float,
        limits: Limits,
        gave_up_settings: str = "",
        failed_starts: tuple[FailedStart, ...] = (),
    ) -> "Memory":
        """Returns the memory with the recorded restarts, failed starts and give-up taken over."""
        return replace(
            self,
            gave_up_settings=gave_up_settings,
            failed_starts=failed_starts if len(failed_starts) > len(self.failed_starts) else self.failed_starts,
            restarts=tuple(time_s - age_s for age_s in restart_ages_s),
            streak=max(self.streak, sum(age_s < limits.healthy_reset_s for age_s in restart_ages_s)),
            gave_up=has_given_up,
        )


@dataclass(frozen=True)
class Decision:
    """What to do.

    `continues`: continue the open intent instead of beginning another. `is_overdue`: hold, although the state should
    have changed by itself long ago.
    """

    verdict: Verdict
    action: Action
    reason: str
    check_in_s: float
    continues: bool = False
    is_overdue: bool = False


class _Beat(Enum):
    """What the heartbeat shows."""

    FRESH = auto()
    LOST = auto()
    # Postgres is away, or was until so recently that the worker could not write.
    UNKNOWN = auto()


@dataclass(frozen=True)
class _Finding:
    """A row of the table. `patience_s`: how long probes must agree before we act; None: not a fault."""

    verdict: Verdict
    reason: str
    patience_s: float | None = None
    check_in_s: float | None = None
    is_overdue: bool = False


def decide(evidence: Evidence, memory: Memory, limits: Limits) -> tuple[Decision, Memory]:
    """Applies the first row of the decision table that matches.

    The memory returned with a RESTART counts it: discard that memory if you do not restart.
    """
    memory = _remember(evidence, memory)
    finding = _judge(evidence, memory, limits)
    memory = _note_health(finding.verdict, evidence.time_s, memory, limits)
    if finding.verdict is Verdict.START_FAILED:
        last = memory.failed_starts[-1].settings if memory.failed_starts else WRONG_SETTINGS
        settings = memory.gave_up_settings or evidence.settings or last
        memory = replace(memory, gave_up=True, gave_up_settings=settings, suspicion=None)
        return Decision(finding.verdict, Action.GIVE_UP, finding.reason, limits.check_interval_s), memory
    if finding.patience_s is None:
        check_in_s = min(finding.check_in_s or limits.restless_interval_s, limits.check_interval_s)
        decision = Decision(finding.verdict, Action.HOLD, finding.reason, check_in_s, is_overdue=finding.is_overdue)
        return decision, replace(memory, suspicion=None)
    if finding.patience_s > 0:
        suspicion = _suspect(finding.verdict, evidence, memory.suspicion)
        memory = replace(memory, suspicion=suspicion)
        if not _is_sure(suspicion, finding.patience_s, evidence.time_s, limits):
            reason = f"{finding.reason} ({suspicion.probes} probes so far)"
            return Decision(finding.verdict, Action.CONFIRM, reason, limits.confirm_interval_s), memory
    return _restart(finding, evidence, memory, limits)


def _judge(evidence: Evidence, memory: Memory, limits: Limits) -> _Finding:
    process = evidence.process
    if process is None:
        return _Finding(Verdict.SUPERVISOR_AWAY, "supervisord does not answer or is shutting down")
    if evidence.pause_left_s > 0:
        return _Finding(Verdict.PAUSED, f"recovery is paused for {evidence.pause_left_s:.0f} s more")
    is_left_stopped = process.state is State.STOPPED and evidence.intent is None
    if evidence.name_taken_by and not is_left_stopped:
        # Nothing that is known of the other is a reason to touch what runs here, and what starts here is refused.
        return _Finding(Verdict.NAME_TAKEN, evidence.name_taken_by, check_in_s=limits.check_interval_s)
    if process.state is State.STOPPED:
        if evidence.intent is not None and evidence.intent.step is not Step.LOADING:
            return _Finding(Verdict.INTERRUPTED, "stopped in the middle of a restart by the watchdog", patience_s=0)
        return _Finding(Verdict.OPERATOR_STOP, "stopped by an operator", check_in_s=limits.check_interval_s)
    if process.state is State.FATAL or (process.state is State.EXITED and evidence.beats):
        if (pointless := _pointless_start(evidence, memory, limits)) is not None:
            return pointless
        if process.exit_status == EXIT_WRONG_SETTINGS and not evidence.settings:
            return _Finding(Verdict.START_FAILED, f"its settings are wrong: its log has what, and so does {CHECK}")
        reason = f"the process is gone: supervisord reports {_state(process)}"
        if evidence.failed_start is not None:
            reason = f"{reason}; the start failed: {evidence.failed_start.cause}"
        return _Finding(Verdict.CRASHED, reason, patience_s=0)
    if process.state is State.RUNNING and not evidence.beats:
        return _judge_answering(process, evidence, limits)
    if process.state is State.RUNNING:
        return _judge_running(process, evidence, memory, limits)
    if process.state is State.STOPPING and _is_to_be_finished(evidence, memory):
        return _Finding(Verdict.INTERRUPTED, "stopping in the middle of a restart by the watchdog", patience_s=0)
    since = _elapsed(memory.transition_since_s, evidence)
    reason = f"supervisord has reported {_state(process)} for {since:.0f} s"
    is_overdue = since > limits.transition_timeout_s
    # Leave a stop to supervisord, which kills at its own deadline: an operator may have ordered it.
    if is_overdue and process.state is not State.STOPPING:
        return _Finding(Verdict.TRANSITION, reason, patience_s=0)
    return _Finding(Verdict.TRANSITION, reason, is_overdue=is_overdue)


def _state(process: Process) -> str:
    return f"{process.state} ({process.cause})" if process.cause else str(process.state)


def _pointless_start(evidence: Evidence, memory: Memory, limits: Limits) -> _Finding | None:
    """Returns START_FAILED once enough starts in a row have failed the same way, or one in a way that recurs."""
    if not memory.failed_starts:
        return None
    last, count = memory.failed_starts[-1], len(memory.failed_starts)
    advice = f" {last.advice}" if last.advice else ""
    if last.recurs and evidence.settings in ("", last.settings):
        return _Finding(Verdict.START_FAILED, f"no start with these settings can succeed: {last.cause}.{advice}")
    if count < limits.max_alike_failures:
        return None
    return _Finding(Verdict.START_FAILED, f"the start failed {count} times in the same way: {last.cause}.{advice}")


def _is_to_be_finished(evidence: Evidence, memory: Memory) -> bool:
    """True for a stop that an earlier watchdog ordered: we end it sooner than supervisord alone would."""
    intent = evidence.intent
    return intent is not None and intent.step is Step.STOPPING and intent.key != memory.continued_intent


def _judge_answering(process: Process, evidence: Evidence, limits: Limits) -> _Finding:
    """Judges a program without a heartbeat, of which only the health is known."""
    health = evidence.health
    if health is ProbeAnswer.SERVING:
        # Without Postgres orders cannot be taken yet: look again soon.
        is_known = evidence.database_up_s is not None
        return _Finding(Verdict.HEALTHY, "serving", check_in_s=limits.check_interval_s if is_known else None)
    reason = f"health is {health}"
    if process.age_s <= limits.start_grace_s:
        return _Finding(Verdict.STARTING, f"started {process.age_s:.0f} s ago, {reason}")
    if health is ProbeAnswer.NOT_PROBED:
        return _Finding(Verdict.NOT_READY, "the address to probe is unknown")
    if health in (ProbeAnswer.UNAVAILABLE, ProbeAnswer.DEADLINE_EXCEEDED):
        failed = f"the health probe failed with {health}"
        return _Finding(Verdict.RPC_WEDGED, failed, patience_s=limits.wedged_confirm_s)
    return _Finding(Verdict.NOT_READY, reason, patience_s=limits.not_ready_confirm_s)


def _judge_running(process: Process, evidence: Evidence, memory: Memory, limits: Limits) -> _Finding:
    health, beat = evidence.health, _beat(evidence, limits)
    phase = memory.heard_phase
    if phase in LOADING_PHASES:
        since_s = process.age_s if memory.able_since_s is None else _elapsed(memory.able_since_s, evidence)
        reason = f"{phase} for {since_s:.0f} s of at most {limits.load_timeout_s:.0f} s"
        if since_s <= limits.load_timeout_s:
            return _Finding(Verdict.STARTING, reason)
        return _Finding(Verdict.START_TIMEOUT, reason, patience_s=limits.confirm_s)
    if not phase and _may_not_have_beaten(process, evidence, limits):
        return _Finding(Verdict.STARTING, f"started {process.age_s:.0f} s ago, no heartbeat yet")

    heard = _heard(evidence)
    if not phase and health is ProbeAnswer.NOT_SERVING and evidence.database_up_s is None:
        # It loads once Postgres has given it its name: another one would only wait again.
        return _Finding(Verdict.DATABASE_AWAY, f"the worker answers, and cannot start while {heard}")
    if health is ProbeAnswer.SERVING:
        if beat is _Beat.UNKNOWN:
            return _Finding(Verdict.DATABASE_AWAY, f"health is SERVING, {heard}")
        if beat is _Beat.FRESH:
            return _Finding(
                Verdict.HEALTHY, "serving, with a fresh heartbeat", check_in_s=_until_stale(evidence, limits)
            )
        return _Finding(Verdict.HEARTBEAT_LOST, f"health is SERVING, {heard}", patience_s=limits.heartbeat_confirm_s)
    if health is ProbeAnswer.NOT_SERVING and phase in ENDING_PHASES:
        since = _elapsed(memory.ending_since_s, evidence)
        reason = f"{phase} for {since:.0f} s of at most {limits.drain_timeout_s:.0f} s"
        is_late = since > limits.drain_timeout_s
        return _Finding(Verdict.DRAINING, reason, patience_s=limits.confirm_s if is_late else None)
    if health is ProbeAnswer.NOT_SERVING and phase == "stalled":
        return _Finding(
            Verdict.ENGINE_STALLED, "the worker reports that its engine makes no progress", patience_s=limits.confirm_s
        )
    if health is ProbeAnswer.NOT_SERVING and phase == "engine_dead":
        if (pointless := _pointless_start(evidence, memory, limits)) is not None:
            return pointless
        cause = f": {evidence.heartbeat.cause}" if evidence.heartbeat and evidence.heartbeat.cause else ""
        return _Finding(
            Verdict.ENGINE_DEAD, f"the worker reports that its engine died{cause}", patience_s=limits.confirm_s
        )
    if health in (ProbeAnswer.UNAVAILABLE, ProbeAnswer.DEADLINE_EXCEEDED):
        reason = f"the health probe failed with {health}, {heard}"
        if beat is _Beat.FRESH:
            return _Finding(Verdict.RPC_WEDGED, reason, patience_s=limits.wedged_confirm_s)
        # Without Postgres it may be as busy as one that beats, or about to exit, having closed its port.
        patience_s = limits.confirm_s if beat is _Beat.LOST else limits.wedged_confirm_s
        return _Finding(Verdict.FROZEN, reason, patience_s=patience_s)
    if health is ProbeAnswer.NOT_PROBED and beat is _Beat.UNKNOWN:
        return _Finding(Verdict.DATABASE_AWAY, f"the worker cannot be probed, {heard}")
    reason = f"health is {health} in phase {phase or 'unknown'}, {heard}"
    return _Finding(Verdict.NOT_READY, reason, patience_s=limits.not_ready_confirm_s)


def _beat(evidence: Evidence, limits: Limits) -> _Beat:
    if evidence.database_up_s is None:
        return _Beat.UNKNOWN
    heartbeat = evidence.heartbeat
    # If the clock was set back, heartbeats lie in the future: those too far ahead are not fresh either.
    if heartbeat is not None and heartbeat.is_current and abs(heartbeat.age_s) <= limits.heartbeat_timeout_s:
        return _Beat.FRESH
    # While Postgres was away no worker could write its heartbeat.
    return _Beat.LOST if evidence.database_up_s > limits.heartbeat_timeout_s else _Beat.UNKNOWN


def _may_not_have_beaten(process: Process, evidence: Evidence, limits: Limits) -> bool:
    """True for a process too young to be overdue. Without Postgres it cannot even report that it is loading."""
    if evidence.database_up_s is None:
        return process.age_s <= limits.load_timeout_s
    return min(process.age_s, evidence.database_up_s) <= max(limits.start_grace_s, limits.heartbeat_timeout_s)


def _heard(evidence: Evidence) -> str:
    if evidence.database_up_s is None:
        return "the database is away"
    if evidence.heartbeat is None:
        return "there is no heartbeat"
    age = f"{evidence.heartbeat.age_s:.0f} s ago"
    return f"last heartbeat {age}" if evidence.heartbeat.is_current else f"last heartbeat {age} by an earlier process"


def _elapsed(since_s: float | None, evidence: Evidence) -> float:
    return 0.0 if since_s is None else evidence.time_s - since_s


def _until_stale(evidence: Evidence, limits: Limits) -> float:
    age_s = evidence.heartbeat.age_s if evidence.heartbeat else 0.0
    return max(limits.confirm_interval_s, limits.heartbeat_timeout_s - age_s)


def _remember_starts(evidence: Evidence, memory: Memory) -> Memory:
    """Counts each failed start once; starts over when the settings change or the worker serves or has served."""
    has_changed = bool(evidence.settings) and evidence.settings != memory.gave_up_settings
    heartbeat = evidence.heartbeat
    serves = (
        evidence.health is ProbeAnswer.SERVING
        and heartbeat is not None
        and heartbeat.is_current
        and heartbeat.phase == "ready"
    )
    if serves or evidence.has_served or (memory.gave_up_settings and has_changed):
        return memory.with_fresh_starts() if memory.gave_up_settings else replace(memory, failed_starts=())
    failed, process = evidence.failed_start, evidence.process
    if failed is None or failed.incarnation == memory.forgiven:
        return memory
    if process is not None and process.state is State.STOPPED:
        # It did not end by itself.
        return memory
    if any(failed.incarnation == other.incarnation for other in memory.failed_starts):
        return memory
    if memory.failed_starts and memory.failed_starts[-1].is_like(failed):
        return replace(memory, failed_starts=(*memory.failed_starts, failed))
    # It fails differently than when we gave up, so somebody has changed something.
    memory = memory.with_fresh_starts() if memory.gave_up_settings else memory
    return replace(memory, failed_starts=(failed,))


def _remember(evidence: Evidence, memory: Memory) -> Memory:
    """Remembers what this evidence shows, for when the next shows less."""
    memory = _remember_starts(evidence, memory)
    process = evidence.process
    if process is None:
        return memory
    is_between = process.state in (State.STARTING, State.BACKOFF, State.STOPPING, State.UNKNOWN)
    if is_between or (process.state is State.EXITED and not evidence.beats):
        since = evidence.time_s if memory.transition_since_s is None else memory.transition_since_s
        return replace(memory, transition_since_s=since)
    memory = replace(memory, transition_since_s=None)
    if process.pid != memory.heard_pid:
        memory = replace(memory, heard_pid=process.pid, heard_phase="", able_since_s=None, ending_since_s=None)
    if not memory.heard_phase:
        up_s = evidence.database_up_s
        able_since_s = None if up_s is None else evidence.time_s - min(process.age_s, up_s)
        memory = replace(memory, able_since_s=able_since_s)
    if evidence.heartbeat is not None and evidence.heartbeat.is_current:
        memory = replace(memory, heard_phase=evidence.heartbeat.phase)
    is_unheard = evidence.database_up_s is None or memory.heard_phase in LOADING_PHASES
    if evidence.health is ProbeAnswer.SERVING and is_unheard:
        # SERVING implies ready, even if the worker has not been able to write that yet.
        memory = replace(memory, heard_phase="ready")
    if memory.heard_phase not in ENDING_PHASES:
        return replace(memory, ending_since_s=None)
    since = evidence.time_s if memory.ending_since_s is None else memory.ending_since_s
    return replace(memory, ending_since_s=since)


def _note_health(verdict: Verdict, time_s: float, memory: Memory, limits: Limits) -> Memory:
    if verdict is Verdict.HEALTHY:
        since = time_s if memory.healthy_since_s is None else memory.healthy_since_s
        is_afresh = time_s - since >= limits.healthy_reset_s
        return replace(memory, healthy_since_s=since, streak=0 if is_afresh else memory.streak)
    if verdict in (Verdict.SUPERVISOR_AWAY, Verdict.PAUSED, Verdict.DATABASE_AWAY):
        return memory
    return replace(memory, healthy_since_s=None)


def _suspect(verdict: Verdict, evidence: Evidence, before: Suspicion | None) -> Suspicion:
    pid = evidence.process.pid if evidence.process else 0
    # When the watchdog was held up, the worker may have been too: it gets the full time again.
    if before is None or before.pid != pid or before.sick_since_s < evidence.stalled_until_s:
        return Suspicion(pid, verdict, evidence.time_s, evidence.time_s, 1)
    if before.verdict is not verdict:
        return Suspicion(pid, verdict, before.sick_since_s, evidence.time_s, 1)
    return replace(before, probes=before.probes + 1)


def _is_sure(suspicion: Suspicion, patience_s: float, time_s: float, limits: Limits) -> bool:
    """True when enough probes agree, or the process has long been unhealthy in changing ways."""
    is_agreed = time_s - suspicion.since_s >= patience_s
    is_long_sick = time_s - suspicion.sick_since_s >= limits.not_ready_confirm_s
    return suspicion.probes >= limits.confirm_probes and (is_agreed or is_long_sick)


def _restart(finding: _Finding, evidence: Evidence, memory: Memory, limits: Limits) -> tuple[Decision, Memory]:
    """Restarts if backoff and budget allow. An open intent is continued once without either: it was counted before."""
    now, intent = evidence.time_s, evidence.intent
    if intent is not None and intent.step is not Step.LOADING and memory.continued_intent != intent.key:
        memory = replace(memory, continued_intent=intent.key, suspicion=None)
        return Decision(finding.verdict, Action.RESTART, finding.reason, 0, continues=True), memory

    restarts = tuple(time for time in memory.restarts if now - time < HOUR_S)
    memory = replace(memory, restarts=restarts)
    if memory.gave_up or len(restarts) >= limits.max_restarts_per_hour:
        reason = f"{finding.reason}; the restart budget of {limits.max_restarts_per_hour} an hour is exhausted"
        decision = Decision(finding.verdict, Action.GIVE_UP, reason, limits.check_interval_s)
        return decision, replace(memory, gave_up=True)
    if restarts and memory.streak > 0:
        delay = min(limits.backoff_max_s, limits.backoff_s * 2.0 ** min(memory.streak - 1, 30))
        wait = restarts[-1] + delay - now
        if wait > 0:
            reason = f"{finding.reason}; next restart in {wait:.1f} s"
            return Decision(finding.verdict, Action.BACK_OFF, reason, min(wait, limits.check_interval_s)), memory
    memory = replace(memory, restarts=(*restarts, now), streak=memory.streak + 1, healthy_since_s=None, suspicion=None)
    return Decision(finding.verdict, Action.RESTART, finding.reason, 0), memory


def budget_left(memory: Memory, time_s: float, limits: Limits) -> int:
    """Returns how many restarts are left in the current hour."""
    if memory.gave_up:
        return 0
    return max(0, limits.max_restarts_per_hour - sum(time_s - time < HOUR_S for time in memory.restarts))
