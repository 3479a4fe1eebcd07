"""What the evidence means and what follows: the decision table of recovery. Pure: no I/O, no clock."""

from dataclasses import dataclass, replace
from enum import Enum, StrEnum, auto

HOUR_S = 3600.0

# Phases as workers write them in their heartbeat.
LOADING_PHASES = frozenset({"starting", "loading"})
ENDING_PHASES = frozenset({"draining", "stopping"})


class State(StrEnum):
    """supervisord's states of a process."""

    STOPPED = "STOPPED"
    STARTING = "STARTING"
    RUNNING = "RUNNING"
    BACKOFF = "BACKOFF"
    STOPPING = "STOPPING"
    EXITED = "EXITED"
    FATAL = "FATAL"
    UNKNOWN = "UNKNOWN"


class Health(StrEnum):
    """The answer to a health probe, or how it failed."""

    SERVING = "SERVING"
    NOT_SERVING = "NOT_SERVING"
    UNKNOWN = "UNKNOWN"
    UNAVAILABLE = "UNAVAILABLE"
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
    NOT_PROBED = "NOT_PROBED"


class Step(StrEnum):
    """How far a restart of ours has come."""

    STOPPING = "stopping"
    STARTING = "starting"
    LOADING = "loading"


class Verdict(StrEnum):
    """What the evidence means: the rows of the table in its order."""

    SUPERVISOR_AWAY = "SUPERVISOR_AWAY"
    PAUSED = "PAUSED"
    INTERRUPTED = "INTERRUPTED"
    OPERATOR_STOP = "OPERATOR_STOP"
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
    """A process as supervisord has it. `pid` 0: none; `age_s` is that of the process."""

    state: State
    pid: int = 0
    age_s: float = 0.0


@dataclass(frozen=True)
class Heartbeat:
    """A worker's last heartbeat, aged by the database. `is_current`: written by the process that runs now."""

    age_s: float
    phase: str
    is_current: bool
    incarnation: str = ""


@dataclass(frozen=True)
class Intent:
    """A restart of ours that is written down and not finished."""

    key: str
    step: Step


@dataclass(frozen=True)
class Evidence:
    """All that is known of a worker at one moment. What could not be found out is None, and no reason to act."""

    # Monotonic.
    time_s: float
    # None: supervisord is unreachable or shutting down.
    process: Process | None
    health: Health = Health.NOT_PROBED
    # How long Postgres has been up and reachable; None: it is away.
    database_up_s: float | None = None
    # None: there is no row, or Postgres is away.
    heartbeat: Heartbeat | None = None
    intent: Intent | None = None
    pause_left_s: float = 0.0
    # Since when the watchdog itself has not been held up, with the whole machine perhaps.
    awake_since_s: float = 0.0


@dataclass(frozen=True)
class Limits:
    """How long things may take, and how much may be done. All but the last group come from the settings."""

    max_restarts_per_hour: int = 10
    heartbeat_timeout_s: float = 60
    check_interval_s: float = 30
    load_timeout_s: float = 1800
    drain_timeout_s: float = 60
    # STARTING, BACKOFF and UNKNOWN; longer than a stop may take.
    transition_timeout_s: float = 120
    # Longer than two beats: after a jump of the database's clock every heartbeat is old until the next.
    heartbeat_confirm_s: float = 15

    # Until its first heartbeat a process gets the heartbeat's timeout, but at least this.
    start_grace_s: float = 30
    # How many probes in a row, this far apart, must agree before anything is restarted that still has a process.
    confirm_probes: int = 3
    confirm_interval_s: float = 0.5
    # For how long they must agree: where the worker itself says it is sick, or nothing of it moves;
    confirm_s: float = 2
    # where it does not answer but beats: it may be very busy;
    wedged_confirm_s: float = 20
    # and where nothing is known but that it does not serve.
    not_ready_confirm_s: float = 60
    # Whatever is not quiet is looked at this often.
    restless_interval_s: float = 1
    # Between the first and the second restart; doubled for each further one.
    backoff_s: float = 1
    backoff_max_s: float = 300
    # Healthy for so long, a worker starts afresh with backing off.
    healthy_reset_s: float = 300


@dataclass(frozen=True)
class Suspicion:
    """A run of probes that found the process sick: since when, and since when with this same verdict."""

    pid: int
    verdict: Verdict
    sick_since_s: float
    since_s: float
    probes: int


@dataclass(frozen=True)
class Memory:
    """What must be remembered from one decision to the next. Times are those of the evidence."""

    # When we restarted it, within the last hour.
    restarts: tuple[float, ...] = ()
    # How many restarts there were since it was healthy for a while.
    streak: int = 0
    healthy_since_s: float | None = None
    # The budget was spent. Stays until a person gives it back.
    gave_up: bool = False
    # What the process `heard_pid` last said of itself.
    heard_pid: int = 0
    heard_phase: str = ""
    ending_since_s: float | None = None
    transition_since_s: float | None = None
    suspicion: Suspicion | None = None
    # The intent that was taken up again without a new unit of the budget.
    continued_intent: str | None = None

    def with_budget(self) -> "Memory":
        """The same with a whole budget: a person has given it back."""
        return replace(self, restarts=(), streak=0, gave_up=False)

    def with_past(
        self, restart_ages_s: tuple[float, ...], has_given_up: bool, time_s: float, limits: Limits
    ) -> "Memory":
        """The same with what was done before, or by somebody else."""
        return replace(
            self,
            restarts=tuple(time_s - age_s for age_s in restart_ages_s),
            streak=max(self.streak, sum(age_s < limits.healthy_reset_s for age_s in restart_ages_s)),
            gave_up=has_given_up,
        )


@dataclass(frozen=True)
class Decision:
    """What to do.

    `continues`: the open intent is taken up, instead of beginning another. `is_overdue`: it is held, but should have
    changed by itself long ago.
    """

    verdict: Verdict
    action: Action
    reason: str
    check_in_s: float
    continues: bool = False
    is_overdue: bool = False


class _Beat(Enum):
    """What the heartbeat tells."""

    FRESH = auto()
    LOST = auto()
    # Nobody could have beaten, or nobody can look.
    UNKNOWN = auto()


@dataclass(frozen=True)
class _Finding:
    """A row of the table. `patience_s`: how long probes must agree before it is acted on; None: it is no fault."""

    verdict: Verdict
    reason: str
    patience_s: float | None = None
    check_in_s: float | None = None
    is_overdue: bool = False


def decide(evidence: Evidence, memory: Memory, limits: Limits) -> tuple[Decision, Memory]:
    """Judges the evidence by the table of recovery, the first row that matches.

    The memory that comes with a RESTART counts it: drop that memory if the restart is not made after all.
    """
    memory = _remember(evidence, memory)
    finding = _judge(evidence, memory, limits)
    memory = _note_health(finding.verdict, evidence.time_s, memory, limits)
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
    if process.state is State.STOPPED:
        if evidence.intent is not None and evidence.intent.step is not Step.LOADING:
            return _Finding(Verdict.INTERRUPTED, "stopped in the middle of a restart of ours", patience_s=0)
        return _Finding(Verdict.OPERATOR_STOP, "stopped by an operator", check_in_s=limits.check_interval_s)
    if process.state in (State.EXITED, State.FATAL):
        return _Finding(Verdict.CRASHED, f"the process is gone, supervisord says {process.state}", patience_s=0)
    if process.state is State.RUNNING:
        return _judge_running(process, evidence, memory, limits)
    if process.state is State.STOPPING and _is_to_be_finished(evidence, memory):
        return _Finding(Verdict.INTERRUPTED, "stopping in the middle of a restart of ours", patience_s=0)
    since = _elapsed(memory.transition_since_s, evidence)
    reason = f"supervisord says {process.state} for {since:.0f} s"
    is_overdue = since > limits.transition_timeout_s
    # A stop is left to supervisord, which kills at its own deadline: it may be an operator's.
    if is_overdue and process.state is not State.STOPPING:
        return _Finding(Verdict.TRANSITION, reason, patience_s=0)
    return _Finding(Verdict.TRANSITION, reason, is_overdue=is_overdue)


def _is_to_be_finished(evidence: Evidence, memory: Memory) -> bool:
    """True for a stop that a watchdog ordered and did not see to its end; supervisord alone would take longer."""
    intent = evidence.intent
    return intent is not None and intent.step is Step.STOPPING and intent.key != memory.continued_intent


def _judge_running(process: Process, evidence: Evidence, memory: Memory, limits: Limits) -> _Finding:
    health, beat = evidence.health, _beat(evidence, limits)
    phase = memory.heard_phase
    if phase in LOADING_PHASES:
        reason = f"{phase} for {process.age_s:.0f} s, may take {limits.load_timeout_s:.0f} s"
        if process.age_s <= limits.load_timeout_s:
            return _Finding(Verdict.STARTING, reason)
        return _Finding(Verdict.START_TIMEOUT, reason, patience_s=limits.confirm_s)
    if not phase and _may_not_have_beaten(process, evidence, limits):
        return _Finding(Verdict.STARTING, f"started {process.age_s:.0f} s ago, not heard of yet")

    heard = _heard(evidence)
    if health is Health.SERVING:
        if beat is _Beat.UNKNOWN:
            return _Finding(Verdict.DATABASE_AWAY, f"health is SERVING, {heard}")
        if beat is _Beat.FRESH:
            return _Finding(Verdict.HEALTHY, "serving and beating", check_in_s=_until_stale(evidence, limits))
        return _Finding(Verdict.HEARTBEAT_LOST, f"health is SERVING, {heard}", patience_s=limits.heartbeat_confirm_s)
    if health is Health.NOT_SERVING and phase in ENDING_PHASES:
        since = _elapsed(memory.ending_since_s, evidence)
        reason = f"{phase} for {since:.0f} s, may take {limits.drain_timeout_s:.0f} s"
        is_late = since > limits.drain_timeout_s
        return _Finding(Verdict.DRAINING, reason, patience_s=limits.confirm_s if is_late else None)
    if health is Health.NOT_SERVING and phase == "stalled":
        return _Finding(Verdict.ENGINE_STALLED, "the worker says its engine does not move", patience_s=limits.confirm_s)
    if health is Health.NOT_SERVING and phase == "engine_dead":
        return _Finding(Verdict.ENGINE_DEAD, "the worker says its engine died", patience_s=limits.confirm_s)
    if health in (Health.UNAVAILABLE, Health.DEADLINE_EXCEEDED):
        reason = f"the health probe failed with {health}, {heard}"
        if beat is _Beat.FRESH:
            return _Finding(Verdict.RPC_WEDGED, reason, patience_s=limits.wedged_confirm_s)
        # The port is closed some time before the process ends.
        may_be_ending = beat is _Beat.UNKNOWN and phase in ENDING_PHASES
        patience_s = limits.wedged_confirm_s if may_be_ending else limits.confirm_s
        return _Finding(Verdict.FROZEN, reason, patience_s=patience_s)
    if health is Health.NOT_PROBED and beat is _Beat.UNKNOWN:
        return _Finding(Verdict.DATABASE_AWAY, f"nothing can be asked, {heard}")
    reason = f"health is {health} in phase {phase or 'unknown'}, {heard}"
    return _Finding(Verdict.NOT_READY, reason, patience_s=limits.not_ready_confirm_s)


def _beat(evidence: Evidence, limits: Limits) -> _Beat:
    if evidence.database_up_s is None:
        return _Beat.UNKNOWN
    heartbeat = evidence.heartbeat
    # A clock that was set back makes heartbeats of the future: as old as they are young, they are not fresh either.
    if heartbeat is not None and heartbeat.is_current and abs(heartbeat.age_s) <= limits.heartbeat_timeout_s:
        return _Beat.FRESH
    # While Postgres was away nobody could beat.
    return _Beat.LOST if evidence.database_up_s > limits.heartbeat_timeout_s else _Beat.UNKNOWN


def _may_not_have_beaten(process: Process, evidence: Evidence, limits: Limits) -> bool:
    """True for a process that is too young to be missed. Without a database it cannot even say that it is loading."""
    if evidence.database_up_s is None:
        return process.age_s <= limits.load_timeout_s
    return process.age_s <= max(limits.start_grace_s, limits.heartbeat_timeout_s)


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


def _remember(evidence: Evidence, memory: Memory) -> Memory:
    """Keeps what this evidence says for when the next says less."""
    process = evidence.process
    if process is None:
        return memory
    if process.state in (State.STARTING, State.BACKOFF, State.STOPPING, State.UNKNOWN):
        since = evidence.time_s if memory.transition_since_s is None else memory.transition_since_s
        return replace(memory, transition_since_s=since)
    memory = replace(memory, transition_since_s=None)
    if process.pid != memory.heard_pid:
        memory = replace(memory, heard_pid=process.pid, heard_phase="", ending_since_s=None)
    if evidence.heartbeat is not None and evidence.heartbeat.is_current:
        memory = replace(memory, heard_phase=evidence.heartbeat.phase)
    is_unheard = evidence.database_up_s is None or memory.heard_phase in LOADING_PHASES
    if evidence.health is Health.SERVING and is_unheard:
        # It would not say so while loading; that it is ready it could not write, or not yet.
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
    # While the watchdog was held up the worker may have been too: it gets the whole time to answer afterwards.
    if before is None or before.pid != pid or before.sick_since_s < evidence.awake_since_s:
        return Suspicion(pid, verdict, evidence.time_s, evidence.time_s, 1)
    if before.verdict is not verdict:
        return Suspicion(pid, verdict, before.sick_since_s, evidence.time_s, 1)
    return replace(before, probes=before.probes + 1)


def _is_sure(suspicion: Suspicion, patience_s: float, time_s: float, limits: Limits) -> bool:
    """True when enough probes agree; or when it has long been sick, if in changing ways."""
    is_agreed = time_s - suspicion.since_s >= patience_s
    is_long_sick = time_s - suspicion.sick_since_s >= limits.not_ready_confirm_s
    return suspicion.probes >= limits.confirm_probes and (is_agreed or is_long_sick)


def _restart(finding: _Finding, evidence: Evidence, memory: Memory, limits: Limits) -> tuple[Decision, Memory]:
    """A restart, if backoff and budget let it. An intent is taken up once without either: it has had its unit."""
    now, intent = evidence.time_s, evidence.intent
    if intent is not None and intent.step is not Step.LOADING and memory.continued_intent != intent.key:
        memory = replace(memory, continued_intent=intent.key, suspicion=None)
        return Decision(finding.verdict, Action.RESTART, finding.reason, 0, continues=True), memory

    restarts = tuple(time for time in memory.restarts if now - time < HOUR_S)
    memory = replace(memory, restarts=restarts)
    if memory.gave_up or len(restarts) >= limits.max_restarts_per_hour:
        reason = f"{finding.reason}; {limits.max_restarts_per_hour} restarts within an hour did not help"
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
    """How many restarts may still be made within the hour."""
    if memory.gave_up:
        return 0
    return max(0, limits.max_restarts_per_hour - sum(time_s - time < HOUR_S for time in memory.restarts))
