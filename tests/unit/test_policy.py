"""The decision table, row by row, and the properties that hold for any evidence."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.db.heartbeats import Phase
from watchdog import policy
from watchdog.policy import (
    Action,
    Decision,
    Evidence,
    FailedStart,
    Heartbeat,
    Intent,
    Limits,
    Memory,
    ProbeAnswer,
    Process,
    State,
    Step,
    Verdict,
    decide,
)

LIMITS = Limits()
RUNNING = Process(State.RUNNING, pid=7, age_s=500)
YOUNG = replace(RUNNING, age_s=10)
OLD = replace(RUNNING, age_s=LIMITS.load_timeout_s + 100)
FRESH = Heartbeat(age_s=3, phase="ready", is_current=True, incarnation="a")
STALE = replace(FRESH, age_s=61)
OTHER = replace(FRESH, is_current=False)
UP = 10_000.0
BETWEEN = (State.STARTING, State.BACKOFF, State.STOPPING, State.UNKNOWN)


def beat(phase: str, age_s: float = 3) -> Heartbeat:
    return replace(FRESH, phase=phase, age_s=age_s)


def seen(
    process: Process | None = RUNNING,
    health: ProbeAnswer = ProbeAnswer.NOT_PROBED,
    heartbeat: Heartbeat | None = None,
    database_up_s: float | None = UP,
    **more: Any,
) -> Evidence:
    return Evidence(1000.0, process, health, database_up_s, heartbeat, **more)


def in_state(state: State, step: Step | None = None) -> Evidence:
    return seen(Process(state), intent=step and Intent("a", step))


def run(evidence: Evidence, for_s: float, memory: Memory | None = None, limits: Limits = LIMITS) -> list[Decision]:
    """The decisions on constant evidence, until it has lasted `for_s` or an action is taken."""
    memory, decisions, end = memory or Memory(), [], evidence.time_s + for_s
    while evidence.time_s <= end:
        decision, memory = decide(evidence, memory, limits)
        decisions.append(decision)
        if decision.action not in (Action.HOLD, Action.CONFIRM):
            break
        process = evidence.process and replace(evidence.process, age_s=evidence.process.age_s + decision.check_in_s)
        up_s = None if evidence.database_up_s is None else evidence.database_up_s + decision.check_in_s
        evidence = replace(evidence, time_s=evidence.time_s + decision.check_in_s, process=process, database_up_s=up_s)
    return decisions


HOLDS = [
    ("supervisord unreachable", seen(None, ProbeAnswer.SERVING, FRESH), Verdict.SUPERVISOR_AWAY),
    ("paused", seen(Process(State.EXITED), pause_left_s=5), Verdict.PAUSED),
    ("stopped by an operator", in_state(State.STOPPED), Verdict.OPERATOR_STOP),
    ("stopping by an operator while our restart loads", in_state(State.STOPPING, Step.LOADING), Verdict.TRANSITION),
    ("stopped by an operator while our restart loads", in_state(State.STOPPED, Step.LOADING), Verdict.OPERATOR_STOP),
    ("starting", seen(health=ProbeAnswer.UNAVAILABLE, heartbeat=beat("starting")), Verdict.STARTING),
    ("loading", seen(health=ProbeAnswer.NOT_SERVING, heartbeat=beat("loading")), Verdict.STARTING),
    (
        "loading, and silent",
        seen(health=ProbeAnswer.DEADLINE_EXCEEDED, heartbeat=beat("loading", 300)),
        Verdict.STARTING,
    ),
    ("just started, no row", seen(YOUNG, ProbeAnswer.UNAVAILABLE, None), Verdict.STARTING),
    ("just started, row of before", seen(YOUNG, ProbeAnswer.NOT_SERVING, OTHER), Verdict.STARTING),
    ("just started, serves already", seen(YOUNG, ProbeAnswer.SERVING, OTHER), Verdict.STARTING),
    ("just started without Postgres", seen(YOUNG, ProbeAnswer.NOT_SERVING, None, None), Verdict.STARTING),
    ("healthy", seen(health=ProbeAnswer.SERVING, heartbeat=FRESH), Verdict.HEALTHY),
    ("ready, and has not written so yet", seen(health=ProbeAnswer.SERVING, heartbeat=beat("loading")), Verdict.HEALTHY),
    ("Postgres away", seen(health=ProbeAnswer.SERVING, database_up_s=None), Verdict.DATABASE_AWAY),
    ("Postgres just back", seen(health=ProbeAnswer.SERVING, heartbeat=STALE, database_up_s=2), Verdict.DATABASE_AWAY),
    ("waits for Postgres", seen(OLD, ProbeAnswer.NOT_SERVING, database_up_s=None), Verdict.DATABASE_AWAY),
    ("has waited for Postgres", seen(OLD, ProbeAnswer.NOT_SERVING, OTHER, 2), Verdict.STARTING),
    (
        "loading since Postgres is back",
        seen(OLD, ProbeAnswer.NOT_SERVING, beat("loading"), LIMITS.load_timeout_s - 1),
        Verdict.STARTING,
    ),
    ("no address to ask, Postgres away", seen(replace(RUNNING, age_s=9e9), database_up_s=None), Verdict.DATABASE_AWAY),
    ("draining", seen(health=ProbeAnswer.NOT_SERVING, heartbeat=beat("draining")), Verdict.DRAINING),
    ("stopping by itself", seen(health=ProbeAnswer.NOT_SERVING, heartbeat=beat("stopping")), Verdict.DRAINING),
    *((f"in {state}", in_state(state), Verdict.TRANSITION) for state in BETWEEN),
    ("name taken, refused", replace(in_state(State.EXITED), name_taken_by="b"), Verdict.NAME_TAKEN),
    (
        "name taken, serves here",
        seen(health=ProbeAnswer.SERVING, heartbeat=OTHER, name_taken_by="b"),
        Verdict.NAME_TAKEN,
    ),
    ("name taken, stopped here", replace(in_state(State.STOPPED), name_taken_by="b"), Verdict.OPERATOR_STOP),
]


@pytest.mark.parametrize(("evidence", "verdict"), [row[1:] for row in HOLDS], ids=[row[0] for row in HOLDS])
def test_rows_that_hold(evidence: Evidence, verdict: Verdict) -> None:
    """Each row of the table that calls for patience gets its verdict and no action."""
    (decision,) = run(evidence, 0)
    assert (decision.verdict, decision.action) == (verdict, Action.HOLD)


AT_ONCE = [
    ("exited, whatever the code", in_state(State.EXITED), Verdict.CRASHED, False),
    ("fatal", in_state(State.FATAL), Verdict.CRASHED, False),
    ("restarted by us, died while loading", in_state(State.EXITED, Step.LOADING), Verdict.CRASHED, False),
    ("watchdog died before stop", in_state(State.EXITED, Step.STOPPING), Verdict.CRASHED, True),
    ("watchdog died during stop", in_state(State.STOPPING, Step.STOPPING), Verdict.INTERRUPTED, True),
    ("watchdog died after stop", in_state(State.STOPPED, Step.STOPPING), Verdict.INTERRUPTED, True),
    ("watchdog died before start", in_state(State.STOPPED, Step.STARTING), Verdict.INTERRUPTED, True),
]


@pytest.mark.parametrize(
    ("evidence", "verdict", "continues"), [row[1:] for row in AT_ONCE], ids=[row[0] for row in AT_ONCE]
)
def test_rows_that_restart_at_once(evidence: Evidence, verdict: Verdict, continues: bool) -> None:
    """A process that is gone is restarted without confirmation, and an open intent is continued, not counted twice."""
    decision, memory = decide(evidence, Memory(), LIMITS)
    assert (decision.verdict, decision.action, decision.continues) == (verdict, Action.RESTART, continues)
    assert len(memory.restarts) == (0 if continues else 1)


CONFIRMED = [
    (
        "loading too long",
        seen(replace(RUNNING, age_s=1801), ProbeAnswer.NOT_SERVING, beat("loading")),
        Verdict.START_TIMEOUT,
        2,
    ),
    ("stale", seen(health=ProbeAnswer.SERVING, heartbeat=STALE), Verdict.HEARTBEAT_LOST, 15),
    (
        "from the future",
        seen(health=ProbeAnswer.SERVING, heartbeat=replace(FRESH, age_s=-61)),
        Verdict.HEARTBEAT_LOST,
        15,
    ),
    ("missing", seen(health=ProbeAnswer.SERVING, heartbeat=None), Verdict.HEARTBEAT_LOST, 15),
    ("lost while loading", seen(health=ProbeAnswer.SERVING, heartbeat=beat("loading", 61)), Verdict.HEARTBEAT_LOST, 15),
    ("of another incarnation", seen(health=ProbeAnswer.SERVING, heartbeat=OTHER), Verdict.HEARTBEAT_LOST, 15),
    ("stalled", seen(health=ProbeAnswer.NOT_SERVING, heartbeat=beat("stalled")), Verdict.ENGINE_STALLED, 2),
    ("engine dead", seen(health=ProbeAnswer.NOT_SERVING, heartbeat=beat("engine_dead")), Verdict.ENGINE_DEAD, 2),
    ("times out, beats", seen(health=ProbeAnswer.DEADLINE_EXCEEDED, heartbeat=FRESH), Verdict.RPC_WEDGED, 20),
    ("refused, beats", seen(health=ProbeAnswer.UNAVAILABLE, heartbeat=FRESH), Verdict.RPC_WEDGED, 20),
    ("times out, stale", seen(health=ProbeAnswer.DEADLINE_EXCEEDED, heartbeat=STALE), Verdict.FROZEN, 2),
    ("refused, of another", seen(health=ProbeAnswer.UNAVAILABLE, heartbeat=OTHER), Verdict.FROZEN, 2),
    ("not serving, ready", seen(health=ProbeAnswer.NOT_SERVING, heartbeat=FRESH), Verdict.NOT_READY, 60),
    ("not serving, stale", seen(health=ProbeAnswer.NOT_SERVING, heartbeat=STALE), Verdict.NOT_READY, 60),
    ("unknown", seen(health=ProbeAnswer.UNKNOWN, heartbeat=FRESH), Verdict.NOT_READY, 60),
    ("no row, no address to ask", seen(), Verdict.NOT_READY, 60),
]


@pytest.mark.parametrize(
    ("evidence", "verdict", "patience_s"), [row[1:] for row in CONFIRMED], ids=[row[0] for row in CONFIRMED]
)
def test_rows_that_confirm_and_restart(evidence: Evidence, verdict: Verdict, patience_s: float) -> None:
    """A running process is restarted only after several probes agree, for as long as its row of the table states."""
    *before, last = run(evidence, 100)
    assert {(d.verdict, d.action) for d in before} == {(verdict, Action.CONFIRM)}
    assert (last.verdict, last.action) == (verdict, Action.RESTART)
    assert len(before) >= LIMITS.confirm_probes - 1
    assert sum(d.check_in_s for d in before) == pytest.approx(patience_s, abs=LIMITS.confirm_interval_s)


def test_confirmation_takes_several_probes_however_slow() -> None:
    """Confirmation takes three probes, however far apart they are."""
    evidence, memory, actions = seen(health=ProbeAnswer.DEADLINE_EXCEEDED, heartbeat=STALE), Memory(), []
    for time_s in (0.0, 100.0, 200.0):
        decision, memory = decide(replace(evidence, time_s=time_s), memory, LIMITS)
        actions.append(decision.action)
    assert actions == [Action.CONFIRM, Action.CONFIRM, Action.RESTART]


@pytest.mark.parametrize(
    "between",
    [
        seen(health=ProbeAnswer.SERVING, heartbeat=FRESH),
        seen(None),
        seen(health=ProbeAnswer.SERVING, database_up_s=None),
        seen(replace(RUNNING, pid=8), ProbeAnswer.DEADLINE_EXCEEDED, STALE),
    ],
    ids=["healthy", "supervisord away", "Postgres away", "another process"],
)
def test_confirmation_begins_anew_after_any_other_sight(between: Evidence) -> None:
    """One good or missing observation, or a new process, resets the confirmation."""
    sick, memory = seen(health=ProbeAnswer.DEADLINE_EXCEEDED, heartbeat=STALE), Memory()
    actions = []
    for time_s, evidence in enumerate([sick, sick, between, sick, sick]):
        decision, memory = decide(replace(evidence, time_s=10.0 * time_s), memory, LIMITS)
        actions.append(decision.action)
    assert Action.RESTART not in actions


def test_sick_in_changing_ways_is_restarted_in_the_end() -> None:
    """A worker that alternates between two faults is restarted too, although neither fault is ever confirmed alone."""
    wedged = seen(health=ProbeAnswer.DEADLINE_EXCEEDED, heartbeat=FRESH)
    unready = seen(health=ProbeAnswer.NOT_SERVING, heartbeat=FRESH)
    memory, time_s, action = Memory(), 0.0, Action.HOLD
    while action is not Action.RESTART and time_s < 1000:
        phase = wedged if int(time_s) // 4 % 2 else unready
        decision, memory = decide(replace(phase, time_s=time_s), memory, LIMITS)
        action, time_s = decision.action, time_s + 1
    assert 60 <= time_s < 70


def test_heartbeat_is_not_missed_before_postgres_has_been_up_for_the_timeout() -> None:
    """After an outage of Postgres, workers get the whole heartbeat timeout again."""
    decisions = run(seen(health=ProbeAnswer.SERVING, heartbeat=STALE, database_up_s=0), 100)
    held = sum(d.check_in_s for d in decisions if d.verdict is Verdict.DATABASE_AWAY)
    assert held == pytest.approx(LIMITS.heartbeat_timeout_s, abs=2)
    assert decisions[-1].verdict is Verdict.HEARTBEAT_LOST


def test_loading_is_remembered_while_postgres_is_away() -> None:
    """A worker that was loading when Postgres went away is still treated as loading, even if it does not answer."""
    _, memory = decide(seen(health=ProbeAnswer.NOT_SERVING, heartbeat=beat("loading")), Memory(), LIMITS)
    for health in (ProbeAnswer.NOT_SERVING, ProbeAnswer.DEADLINE_EXCEEDED, ProbeAnswer.UNAVAILABLE):
        decisions = run(seen(health=health, database_up_s=None), 600, memory)
        assert {(d.verdict, d.action) for d in decisions} == {(Verdict.STARTING, Action.HOLD)}


def test_loaded_while_postgres_is_away_is_not_late() -> None:
    """A worker that becomes ready while Postgres is away does not run into the load timeout."""
    _, memory = decide(seen(health=ProbeAnswer.NOT_SERVING, heartbeat=beat("loading")), Memory(), LIMITS)
    decisions = run(seen(health=ProbeAnswer.SERVING, database_up_s=None), 2 * LIMITS.load_timeout_s, memory)
    assert {(d.verdict, d.action) for d in decisions} == {(Verdict.DATABASE_AWAY, Action.HOLD)}


def test_loading_is_late_by_the_time_in_which_it_could_load() -> None:
    """A worker that waited for Postgres has its whole deadline from Postgres' return, however often that goes again."""
    waiting, memory = seen(OLD, ProbeAnswer.NOT_SERVING, database_up_s=None), Memory()
    _, memory = decide(waiting, memory, LIMITS)
    back_s = 5000.0
    loading = replace(waiting, time_s=back_s, heartbeat=beat("starting"), database_up_s=0.0)
    decision, memory = decide(loading, memory, LIMITS)
    assert decision.verdict is Verdict.STARTING
    for after_s, verdict in ((0.9, Verdict.STARTING), (1.1, Verdict.START_TIMEOUT)):
        time_s = back_s + after_s * LIMITS.load_timeout_s
        for heartbeat, up_s in ((beat("loading"), 1.0), (None, None)):
            later = replace(loading, time_s=time_s, heartbeat=heartbeat, database_up_s=up_s)
            assert decide(later, memory, LIMITS)[0].verdict is verdict


def test_frozen_while_postgres_is_away_is_restarted() -> None:
    """A worker that was ready and no longer answers is restarted even though its heartbeat cannot be read.

    It may be busy, as one that beats: it is given as long.
    """
    _, memory = decide(seen(health=ProbeAnswer.SERVING, heartbeat=FRESH), Memory(), LIMITS)
    *before, last = run(seen(health=ProbeAnswer.DEADLINE_EXCEEDED, database_up_s=None), 60, memory)
    assert (last.verdict, last.action) == (Verdict.FROZEN, Action.RESTART)
    assert sum(decision.check_in_s for decision in before) >= LIMITS.wedged_confirm_s


def test_draining_past_its_deadline_is_restarted() -> None:
    """A worker that drains past its deadline is restarted, and not before."""
    decisions = run(seen(health=ProbeAnswer.NOT_SERVING, heartbeat=beat("draining")), 200)
    assert decisions[-1].action is Action.RESTART
    assert sum(d.check_in_s for d in decisions) >= LIMITS.drain_timeout_s


def test_a_port_that_closes_at_the_end_is_no_freeze() -> None:
    """Without Postgres, a draining worker that no longer answers gets time to end before it is restarted."""
    _, memory = decide(seen(health=ProbeAnswer.NOT_SERVING, heartbeat=beat("draining")), Memory(), LIMITS)
    decisions = run(seen(health=ProbeAnswer.UNAVAILABLE, database_up_s=None), 60, memory)
    assert (decisions[-1].verdict, decisions[-1].action) == (Verdict.FROZEN, Action.RESTART)
    assert sum(decision.check_in_s for decision in decisions) >= LIMITS.wedged_confirm_s


@pytest.mark.parametrize("state", [State.STARTING, State.BACKOFF, State.UNKNOWN])
def test_transition_past_its_deadline_is_finished(state: State) -> None:
    """A process stuck between two states of supervisord is restarted after the deadline, and not before."""
    decisions = run(in_state(state), 400)
    assert (decisions[-1].verdict, decisions[-1].action) == (Verdict.TRANSITION, Action.RESTART)
    assert sum(d.check_in_s for d in decisions) >= LIMITS.transition_timeout_s


def test_suspicion_from_before_the_watchdog_was_held_up_does_not_count() -> None:
    """Suspicion from before a pause of the whole machine does not count: confirmation starts over."""
    lost = seen(health=ProbeAnswer.SERVING, heartbeat=STALE)
    first, memory = decide(lost, Memory(), LIMITS)
    after = replace(lost, time_s=lost.time_s + 100, stalled_until_s=lost.time_s + 100)
    decisions = run(after, 60, memory)
    assert first.action is Action.CONFIRM
    assert decisions[-1].action is Action.RESTART
    assert sum(decision.check_in_s for decision in decisions[:-1]) >= LIMITS.heartbeat_confirm_s


def test_transition_through_several_states_counts_from_the_first() -> None:
    """A program that alternates between STARTING and BACKOFF has one deadline, counted from the first state."""
    memory, time_s, action = Memory(), 0.0, Action.HOLD
    while action is Action.HOLD and time_s < 1000:
        state = State.BACKOFF if int(time_s) % 2 else State.STARTING
        decision, memory = decide(replace(in_state(state), time_s=time_s), memory, LIMITS)
        action, time_s = decision.action, time_s + 1
    assert LIMITS.transition_timeout_s < time_s < LIMITS.transition_timeout_s + 3


def test_stopping_is_left_to_supervisord() -> None:
    """A slow stop is never turned into a restart, because it may be an operator's."""
    assert {d.action for d in run(in_state(State.STOPPING), 4 * LIMITS.transition_timeout_s)} == {Action.HOLD}


def test_stop_of_ours_is_taken_up_once() -> None:
    """An interrupted stop is continued once; a worker that cannot be killed does not use up the budget."""
    stopping, memory = in_state(State.STOPPING, Step.STOPPING), Memory()
    first, memory = decide(stopping, memory, LIMITS)
    second, memory = decide(stopping, memory, LIMITS)
    assert (first.action, first.continues) == (Action.RESTART, True)
    assert (second.verdict, second.action, memory.restarts) == (Verdict.TRANSITION, Action.HOLD, ())


def test_interrupted_restart_is_free_once() -> None:
    """An interrupted restart is continued once for free; each further attempt counts against the budget."""
    stopped, memory = in_state(State.STOPPED, Step.STARTING), Memory()
    first, memory = decide(stopped, memory, LIMITS)
    second, memory = decide(replace(stopped, time_s=1001.0), memory, LIMITS)
    assert (first.action, first.continues) == (Action.RESTART, True)
    assert (second.action, second.continues, len(memory.restarts)) == (Action.RESTART, False, 1)


def test_backoff_grows_and_is_capped() -> None:
    """Each restart that does not help doubles the next wait, up to a maximum."""
    limits = replace(LIMITS, max_restarts_per_hour=1000)
    evidence, memory, times = in_state(State.EXITED), Memory(), [0.0]
    evidence = replace(evidence, time_s=0.0)
    while len(times) < 14:
        decision, memory = decide(evidence, memory, limits)
        if decision.action is Action.RESTART:
            times.append(evidence.time_s)
        evidence = replace(evidence, time_s=evidence.time_s + (decision.check_in_s or 0.001))
    waits = [round(b - a) for a, b in pairwise(times[1:])]
    assert waits == [1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300, 300]


def test_backoff_starts_afresh_after_a_healthy_while() -> None:
    """A worker that was healthy for `healthy_reset_s` is restarted without back-off when it dies again."""
    healthy = replace(seen(health=ProbeAnswer.SERVING, heartbeat=FRESH), time_s=0.0)
    for lasted_s, action in ((LIMITS.healthy_reset_s, Action.RESTART), (LIMITS.healthy_reset_s - 1, Action.BACK_OFF)):
        memory = Memory(restarts=(-1.0,), streak=20)
        _, memory = decide(healthy, memory, LIMITS)
        _, memory = decide(replace(healthy, time_s=lasted_s), memory, LIMITS)
        decision, _ = decide(
            replace(in_state(State.EXITED), time_s=lasted_s), memory, replace(LIMITS, backoff_max_s=1e6)
        )
        assert decision.action is action


def test_a_healthy_while_is_one_without_a_break() -> None:
    """Only an uninterrupted healthy period resets the back-off."""
    healthy, sick = seen(health=ProbeAnswer.SERVING, heartbeat=FRESH), seen(health=ProbeAnswer.SERVING, heartbeat=STALE)
    memory = Memory(restarts=(0.0,), streak=20)
    for time_s, evidence in ((0.0, healthy), (200.0, sick), (250.0, healthy), (LIMITS.healthy_reset_s, healthy)):
        _, memory = decide(replace(evidence, time_s=time_s), memory, LIMITS)
    assert memory.streak == 20


def test_a_new_process_is_not_judged_by_what_the_old_one_said() -> None:
    """A new process is not judged by the last phase of its predecessor."""
    _, memory = decide(seen(health=ProbeAnswer.NOT_SERVING, heartbeat=beat("stalled")), Memory(), LIMITS)
    new = seen(replace(YOUNG, pid=8), ProbeAnswer.NOT_SERVING, replace(beat("stalled"), is_current=False))
    assert decide(new, memory, LIMITS)[0].verdict is Verdict.STARTING


def test_budget_spent_gives_up_until_a_person_gives_it_back() -> None:
    """Once the budget is exhausted nothing is restarted, not even hours later, until an operator resets it."""
    crashed = in_state(State.EXITED)
    memory = Memory(restarts=tuple(float(i) for i in range(10)))
    decision, memory = decide(replace(crashed, time_s=1000.0), memory, LIMITS)
    assert (decision.action, memory.gave_up) == (Action.GIVE_UP, True)
    decision, memory = decide(replace(crashed, time_s=9000.0), memory, LIMITS)
    assert (decision.action, memory.gave_up) == (Action.GIVE_UP, True)
    decision, _ = decide(replace(crashed, time_s=9001.0), memory.with_budget(), LIMITS)
    assert decision.action is Action.RESTART


def test_no_budget_at_all_never_restarts() -> None:
    """With a limit of 0 the watchdog only watches."""
    decision, _ = decide(in_state(State.EXITED), Memory(), replace(LIMITS, max_restarts_per_hour=0))
    assert decision.action is Action.GIVE_UP


def test_healthy_worker_is_looked_at_again_when_its_heartbeat_would_be_stale() -> None:
    """The next check is due when the heartbeat would become stale, not only after the regular interval."""
    assert decide(seen(health=ProbeAnswer.SERVING, heartbeat=FRESH), Memory(), LIMITS)[0].check_in_s == 30
    old = seen(health=ProbeAnswer.SERVING, heartbeat=beat("ready", 50))
    assert decide(old, Memory(), LIMITS)[0].check_in_s == 10


def test_phases_are_those_of_the_heartbeat() -> None:
    """The phases that the policy mentions are phases that workers report."""
    assert policy.LOADING_PHASES | policy.ENDING_PHASES | {"stalled", "engine_dead"} < set(Phase)


def gateway(process: Process, health: ProbeAnswer = ProbeAnswer.NOT_PROBED) -> Evidence:
    """Evidence about a program that writes no heartbeat."""
    return seen(process, health, beats=False)


@pytest.mark.parametrize(
    ("evidence", "verdict"),
    [
        (gateway(RUNNING, ProbeAnswer.SERVING), Verdict.HEALTHY),
        (gateway(YOUNG, ProbeAnswer.UNAVAILABLE), Verdict.STARTING),
        (gateway(RUNNING, ProbeAnswer.NOT_PROBED), Verdict.NOT_READY),
        (gateway(Process(State.STOPPED)), Verdict.OPERATOR_STOP),
        (gateway(Process(State.EXITED)), Verdict.TRANSITION),
        (gateway(Process(State.STARTING)), Verdict.TRANSITION),
        (replace(gateway(RUNNING, ProbeAnswer.SERVING), database_up_s=None), Verdict.HEALTHY),
    ],
    ids=["serving", "young", "address unknown", "stopped", "ended", "starting", "Postgres away"],
)
def test_gateway_is_left_alone(evidence: Evidence, verdict: Verdict) -> None:
    """A gateway that serves, is starting, was stopped, or is being restarted by supervisord is left alone."""
    decisions = run(evidence, 15)
    assert {(decision.verdict, decision.action) for decision in decisions} == {(verdict, Action.HOLD)}


@pytest.mark.parametrize(
    ("evidence", "verdict", "after_s"),
    [
        (gateway(RUNNING, ProbeAnswer.UNAVAILABLE), Verdict.RPC_WEDGED, LIMITS.wedged_confirm_s),
        (gateway(RUNNING, ProbeAnswer.DEADLINE_EXCEEDED), Verdict.RPC_WEDGED, LIMITS.wedged_confirm_s),
        (gateway(RUNNING, ProbeAnswer.NOT_SERVING), Verdict.NOT_READY, LIMITS.not_ready_confirm_s),
        (gateway(Process(State.FATAL)), Verdict.CRASHED, 0),
        (gateway(Process(State.EXITED)), Verdict.TRANSITION, LIMITS.transition_timeout_s),
    ],
    ids=["refuses", "frozen", "not serving", "supervisord gave up", "not started again"],
)
def test_deaf_gateway_is_restarted(evidence: Evidence, verdict: Verdict, after_s: float) -> None:
    """A gateway that does not answer, is not serving, or stays down is restarted after the time for its verdict."""
    decisions = run(evidence, after_s + 5)
    assert (decisions[-1].verdict, decisions[-1].action) == (verdict, Action.RESTART)
    assert sum(decision.check_in_s for decision in decisions[:-1]) >= after_s


def failed(number: int, key: str = "k", with_settings: str = "s") -> FailedStart:
    return FailedStart(f"life-{number}", with_settings, f"no such model ({number})", "Check BATCH_MODEL.", key)


def dies_at_start(
    *lives: FailedStart, settings_now: str = "s", memory: Memory | None = None
) -> tuple[Decision, Memory]:
    """The decision after these lives ended in turn, each observed dead twice, with long gaps between the restarts."""
    memory, decision = memory or Memory(), None
    for number, life in enumerate(lives):
        for later_s in (0, 0.5):
            evidence = seen(Process(State.EXITED), failed_start=life, settings=settings_now)
            decision, memory = decide(replace(evidence, time_s=1000.0 + 600 * number + later_s), memory, LIMITS)
    assert decision is not None
    return decision, memory


def test_a_start_that_fails_alike_three_times_is_not_tried_again() -> None:
    """After three starts that fail alike the worker is given up with cause and advice, whatever budget is left."""
    lives = [failed(number) for number in range(3)]
    assert dies_at_start(*lives[:2])[0].verdict is Verdict.CRASHED
    decision, memory = dies_at_start(*lives)
    assert (decision.verdict, decision.action) == (Verdict.START_FAILED, Action.GIVE_UP)
    assert "3 times in the same way: no such model (2). Check BATCH_MODEL." in decision.reason
    assert len(memory.restarts) == 2
    # Also much later, and however often it is checked.
    later, _ = decide(replace(seen(Process(State.EXITED), settings="s"), time_s=90_000.0), memory, LIMITS)
    assert (later.verdict, later.action) == (Verdict.START_FAILED, Action.GIVE_UP)


@pytest.mark.parametrize(
    "lives",
    [
        [failed(0), failed(1), failed(2, key="other"), failed(3)],
        [failed(0), failed(1), failed(2, with_settings="t"), failed(3)],
        [failed(0), failed(0), failed(0), failed(0)],
    ],
    ids=["another cause between", "other settings between", "one life seen often"],
)
def test_starts_that_fail_otherwise_have_the_whole_budget(lives: list[FailedStart]) -> None:
    """Only consecutive lives that fail the same way with the same settings count, each once."""
    assert dies_at_start(*lives)[0].verdict is Verdict.CRASHED


def test_a_start_that_was_stopped_has_not_failed() -> None:
    """However often a worker is stopped while it loads, and has to be killed for it, none of that counts as failed."""
    memory = Memory()
    for number in range(3):
        stopped = seen(Process(State.STOPPED), failed_start=failed(number), settings="s")
        decision, memory = decide(replace(stopped, time_s=1000.0 * number), memory, LIMITS)
        assert decision.verdict is Verdict.OPERATOR_STOP
    assert dies_at_start(failed(4), failed(5), memory=memory)[0].verdict is Verdict.CRASHED


def test_an_engine_that_dies_before_it_ever_served_counts_as_a_failed_start() -> None:
    """A process that stays alive although its engine died while starting counts as a failed start too."""
    memory = Memory(failed_starts=(failed(0), failed(1)))
    dead = seen(health=ProbeAnswer.NOT_SERVING, heartbeat=beat("engine_dead"), failed_start=failed(2), settings="s")
    assert decide(dead, memory, LIMITS)[0].verdict is Verdict.START_FAILED


def test_a_worker_that_has_served_keeps_its_whole_budget() -> None:
    """Once a worker has served, earlier failed starts no longer count and crashes are restarted."""
    lives = [failed(0), failed(1)]
    _, memory = dies_at_start(*lives)
    _, memory = decide(replace(seen(health=ProbeAnswer.SERVING, heartbeat=FRESH), time_s=5000.0), memory, LIMITS)
    assert dies_at_start(failed(3), memory=memory)[0].verdict is Verdict.CRASHED
    decision, _ = decide(replace(seen(Process(State.EXITED)), time_s=20_000.0), memory, LIMITS)
    assert decision.action is Action.RESTART


@pytest.mark.parametrize(
    ("ended_by", "is_anew"),
    [
        (seen(Process(State.EXITED), failed_start=failed(2), settings="changed"), True),
        (seen(Process(State.EXITED), failed_start=failed(2), settings=""), False),
        (seen(Process(State.EXITED), failed_start=failed(2), settings="s"), False),
        (seen(Process(State.EXITED), failed_start=failed(3), settings="s"), False),
        (seen(Process(State.EXITED), failed_start=failed(3, "other"), settings="s"), True),
        (seen(health=ProbeAnswer.SERVING, heartbeat=FRESH, settings="s"), True),
    ],
    ids=["settings changed", "settings unreadable", "nothing changed", "fails again", "fails otherwise", "it serves"],
)
def test_other_settings_or_a_worker_that_serves_begin_anew(ended_by: Evidence, is_anew: bool) -> None:
    """Changed settings, a different failure or a worker that serves end a give-up, without restoring the budget."""
    _, memory = dies_at_start(*(failed(number) for number in range(3)))
    decision, after = decide(replace(ended_by, time_s=5000.0), memory, LIMITS)
    assert after.gave_up is not is_anew
    assert len(after.restarts) >= 2
    if is_anew and ended_by.process and ended_by.process.state is State.EXITED:
        assert decision.action is Action.RESTART
        # And it has all its attempts again.
        assert dies_at_start(failed(4), settings_now="changed", memory=after)[0].verdict is Verdict.CRASHED


def test_a_reset_forgives_the_starts_that_failed() -> None:
    """After `recovery reset` a worker is again given up only at its third failed start."""
    _, memory = dies_at_start(*(failed(number) for number in range(3)))
    decision, memory = decide(
        replace(seen(Process(State.EXITED), failed_start=failed(2), settings="s"), time_s=9000.0),
        memory.with_budget(),
        LIMITS,
    )
    assert decision.action is Action.RESTART
    assert dies_at_start(failed(3), failed(4), memory=memory)[0].verdict is Verdict.CRASHED
    assert dies_at_start(failed(3), failed(4), failed(5), memory=memory)[0].verdict is Verdict.START_FAILED


def hopeless(number: int, with_settings: str = "s") -> FailedStart:
    return replace(failed(number, with_settings=with_settings), recurs=True)


def test_a_start_that_recurs_is_not_tried_again() -> None:
    """A start whose failure recurs with the same settings is given up at once, with nothing of the budget spent."""
    decision, memory = dies_at_start(hopeless(0))
    assert (decision.verdict, decision.action) == (Verdict.START_FAILED, Action.GIVE_UP)
    assert "no start with these settings can succeed: no such model (0). Check BATCH_MODEL." in decision.reason
    assert (memory.restarts, policy.budget_left(memory.with_budget(), 0, LIMITS)) == ((), 10)
    later, _ = decide(replace(seen(Process(State.EXITED), settings="s"), time_s=90_000.0), memory, LIMITS)
    assert (later.verdict, later.action) == (Verdict.START_FAILED, Action.GIVE_UP)


@pytest.mark.parametrize(
    ("evidence", "verdict"),
    [
        (seen(Process(State.EXITED), failed_start=hopeless(0), settings="s"), Verdict.START_FAILED),
        (seen(Process(State.FATAL), failed_start=hopeless(0), settings="s"), Verdict.START_FAILED),
        (seen(Process(State.EXITED), failed_start=hopeless(0), settings=""), Verdict.START_FAILED),
        (seen(Process(State.EXITED), failed_start=hopeless(0), settings="changed"), Verdict.CRASHED),
        (seen(Process(State.EXITED), failed_start=failed(0), settings="s"), Verdict.CRASHED),
        (seen(Process(State.EXITED), settings="s", has_served=True), Verdict.CRASHED),
        (seen(Process(State.EXITED, exit_status=2), settings=""), Verdict.START_FAILED),
        (seen(Process(State.FATAL, exit_status=2), settings=""), Verdict.START_FAILED),
        (seen(Process(State.FATAL, exit_status=2), settings="", beats=False), Verdict.START_FAILED),
        (seen(Process(State.EXITED, exit_status=2), settings="s"), Verdict.CRASHED),
        (seen(Process(State.EXITED, exit_status=1), settings=""), Verdict.CRASHED),
        (seen(Process(State.EXITED, exit_status=-1), settings=""), Verdict.CRASHED),
        (seen(Process(State.STOPPED, exit_status=2), settings=""), Verdict.OPERATOR_STOP),
    ],
)
def test_what_recurs(evidence: Evidence, verdict: Verdict) -> None:
    """Nothing is started while it is certain that it cannot start, and everything else is."""
    assert decide(evidence, Memory(), LIMITS)[0].verdict is verdict


@pytest.mark.parametrize(
    "ended_by",
    [
        seen(Process(State.EXITED), failed_start=hopeless(0), settings="changed"),
        seen(Process(State.EXITED), failed_start=failed(1, "other"), settings="s"),
        seen(Process(State.EXITED), settings="s", has_served=True),
    ],
    ids=["settings changed", "fails otherwise", "it has served unseen"],
)
def test_a_give_up_for_what_recurs_ends(ended_by: Evidence) -> None:
    """Changed settings, a different failure, or that the settings have served after all end it with a restart."""
    _, memory = dies_at_start(hopeless(0))
    decision, after = decide(replace(ended_by, time_s=5000.0), memory, LIMITS)
    assert (decision.action, after.gave_up) == (Action.RESTART, False)


def test_a_reset_tries_once_more() -> None:
    """After `recovery reset`, such as when another vLLM was installed, it is started once."""
    _, memory = dies_at_start(hopeless(0))
    again = replace(seen(Process(State.EXITED), failed_start=hopeless(0), settings="s"), time_s=9000.0)
    decision, memory = decide(again, memory.with_budget(), LIMITS)
    assert decision.action is Action.RESTART
    assert dies_at_start(hopeless(1), memory=memory)[0].verdict is Verdict.START_FAILED


def test_wrong_settings_are_waited_for() -> None:
    """A program that refused its settings is started as soon as they can be read, whatever they are then."""
    wrong = seen(Process(State.EXITED, exit_status=2), settings="")
    decision, memory = decide(wrong, Memory(), LIMITS)
    assert (decision.action, memory.restarts) == (Action.GIVE_UP, ())
    assert "doctor.sh" in decision.reason
    for settings_now in ("s", "t"):
        mended = replace(wrong, settings=settings_now, time_s=60.0)
        decision, after = decide(mended, memory, LIMITS)
        assert (decision.action, after.gave_up) == (Action.RESTART, False)


# Properties: evidence of every kind in any order, with time advancing by anything from nothing to half an hour.

processes = st.none() | st.builds(
    Process,
    state=st.sampled_from(State),
    pid=st.sampled_from([0, 7, 8]),
    age_s=st.floats(0, 4000),
    exit_status=st.sampled_from([0, 1, 2, -1]),
)
heartbeats = st.none() | st.builds(
    Heartbeat,
    age_s=st.floats(-100, 200),
    phase=st.sampled_from([str(phase) for phase in Phase]),
    is_current=st.booleans(),
)
intents = st.none() | st.builds(Intent, key=st.sampled_from("abc"), step=st.sampled_from(Step))


failed_starts = st.none() | st.builds(
    FailedStart,
    incarnation=st.sampled_from("abcdef"),
    settings=st.sampled_from("st"),
    cause=st.just("cause"),
    advice=st.just("advice"),
    key=st.sampled_from("kl"),
    recurs=st.sampled_from([False, False, True]),
)


def observations(**fixed: st.SearchStrategy[Any]) -> st.SearchStrategy[Evidence]:
    kinds: dict[str, st.SearchStrategy[Any]] = {
        "time_s": st.just(0.0),
        "process": processes,
        "health": st.sampled_from(ProbeAnswer),
        "database_up_s": st.none() | st.floats(0, 1e6),
        "heartbeat": heartbeats,
        "intent": intents,
        "failed_start": failed_starts,
        "has_served": st.sampled_from([False, False, True]),
        "settings": st.sampled_from(["", "s", "t"]),
        "beats": st.sampled_from([True, True, False]),
        "pause_left_s": st.sampled_from([0.0, 0.0, 0.0, 5.0]),
    }
    return st.builds(Evidence, **(kinds | fixed))


steps_s = st.sampled_from([0.0, 0.1, 1.0, 5.0, 60.0, 400.0, 1800.0])
histories = st.lists(st.tuples(steps_s, observations(), st.integers(1, 40)), max_size=40)
History = list[tuple[float, Evidence, int]]


def play(history: History, limits: Limits = LIMITS) -> tuple[list[tuple[Evidence, Decision]], Memory]:
    """Decides on each evidence of a history, repeated as often as it says, advancing time by its step."""
    memory, time_s, made = Memory(), 0.0, []
    for step_s, kind, times in history:
        for _ in range(times):
            time_s += step_s
            evidence = replace(kind, time_s=time_s)
            decision, memory = decide(evidence, memory, limits)
            made.append((evidence, decision))
    return made, memory


@given(histories, st.integers(0, 4))
@settings(max_examples=max(150, settings.default.max_examples))
def test_never_more_restarts_than_the_budget_in_any_hour(history: History, budget: int) -> None:
    """No sequence of evidence leads to more restarts in any hour than the budget, and each intent is continued once."""
    limits = replace(LIMITS, max_restarts_per_hour=budget, backoff_max_s=2)
    made, _ = play(history, limits)
    restarts = [e.time_s for e, d in made if d.action is Action.RESTART and not d.continues]
    for start in restarts:
        assert sum(start <= time < start + policy.HOUR_S for time in restarts) <= budget
    continued = [e.intent for e, d in made if d.action is Action.RESTART and d.continues]
    assert all(intent is not None and intent.step is not Step.LOADING for intent in continued)
    assert all(a.key != b.key for a, b in pairwise(continued) if a and b)


def running(pids: list[int], **fixed: st.SearchStrategy[Any]) -> st.SearchStrategy[Evidence]:
    """Observations of a running worker."""
    process = st.builds(Process, state=st.just(State.RUNNING), pid=st.sampled_from(pids), age_s=st.floats(0, 1e6))
    return observations(process=process, beats=st.just(True), **fixed)


def unheard(*healths: ProbeAnswer) -> st.SearchStrategy[Evidence]:
    """Observations of a worker while Postgres is away, which so says nothing about it."""
    return running(
        [7],
        health=st.sampled_from(healths),
        database_up_s=st.none(),
        heartbeat=st.none(),
        failed_start=st.none(),
        has_served=st.just(False),
        intent=st.none(),
        pause_left_s=st.just(0.0),
    )


missing = observations(process=st.none()) | unheard(ProbeAnswer.SERVING, ProbeAnswer.NOT_PROBED)
gaps = st.lists(st.tuples(steps_s, missing, st.integers(1, 200)), min_size=1, max_size=20)


@given(gaps)
@settings(max_examples=max(150, settings.default.max_examples))
def test_missing_evidence_never_restarts(history: History) -> None:
    """However long supervisord or Postgres is away, that alone never restarts a worker."""
    made, _ = play(history)
    assert {d.action for _, d in made} == {Action.HOLD}


waits = st.lists(
    st.tuples(steps_s, unheard(ProbeAnswer.NOT_SERVING, ProbeAnswer.NOT_PROBED), st.integers(1, 40)), max_size=20
)


@given(waits, st.floats(0, 1e6), st.floats(0, 1), st.sampled_from([None, OTHER, beat("starting"), beat("loading")]))
@settings(max_examples=max(150, settings.default.max_examples))
def test_waiting_for_postgres_never_restarts(
    history: History, age_s: float, lasts: float, heartbeat: Heartbeat | None
) -> None:
    """A worker that answers and has nothing to load yet, because Postgres is away, is left alone however long it takes;
    and so it is after Postgres' return for as long as any start may take.
    """
    grace_s = LIMITS.load_timeout_s if heartbeat and heartbeat.is_current else LIMITS.heartbeat_timeout_s
    up_s = lasts * grace_s
    back = seen(replace(RUNNING, age_s=age_s + up_s), ProbeAnswer.NOT_SERVING, heartbeat, up_s)
    made, _ = play([*history, (up_s, back, 1)])
    assert {d.action for _, d in made} == {Action.HOLD}


outages = st.lists(st.tuples(steps_s, unheard(*ProbeAnswer), st.integers(1, 100)), min_size=1, max_size=10)


@given(histories, outages, st.floats(0, 1e4))
@settings(max_examples=max(150, settings.default.max_examples))
def test_an_outage_of_postgres_hastens_no_restart(before: History, outage: History, age_s: float) -> None:
    """Whatever restarts a worker while Postgres is away would do so, and no later, if its heartbeats were read and
    fresh.
    """
    _, memory = play(before)
    read, time_s = memory, sum(step_s * times for step_s, _, times in before)
    for step_s, kind, times in outage:
        for _ in range(times):
            time_s, age_s = time_s + step_s, age_s + step_s
            evidence = replace(kind, time_s=time_s, process=replace(RUNNING, age_s=age_s))
            decision, memory = decide(evidence, memory, LIMITS)
            fresh = replace(FRESH, phase=memory.heard_phase or "starting")
            told, read = decide(replace(evidence, heartbeat=fresh, database_up_s=1e6), read, LIMITS)
            if Action.RESTART in (decision.action, told.action):
                assert told.action is Action.RESTART
                return


healthy = observations(
    process=st.builds(Process, state=st.just(State.RUNNING), pid=st.sampled_from([7, 8]), age_s=st.floats(0, 1e6)),
    health=st.just(ProbeAnswer.SERVING),
    database_up_s=st.floats(0, 1e6),
    heartbeat=st.builds(Heartbeat, age_s=st.floats(0, 60), phase=st.just("ready"), is_current=st.just(True)),
)


@given(histories, healthy)
@settings(max_examples=max(150, settings.default.max_examples))
def test_healthy_worker_is_never_touched(history: History, evidence: Evidence) -> None:
    """Whatever happened before, a worker that serves and beats is left alone."""
    made, _ = play([*history, (0.1, evidence, 1)])
    assert made[-1][1].action is Action.HOLD


@given(histories)
@settings(max_examples=max(150, settings.default.max_examples))
def test_paused_never_restarts(history: History) -> None:
    """While recovery is paused nothing is restarted, whatever the evidence."""
    made, _ = play([(step_s, replace(kind, pause_left_s=1), times) for step_s, kind, times in history])
    assert {d.action for _, d in made} <= {Action.HOLD}


@given(histories)
@settings(max_examples=max(150, settings.default.max_examples))
def test_another_machine_restarts_nothing(history: History) -> None:
    """While another machine runs under the name nothing here is restarted, whatever else is seen of it."""
    made, _ = play([(step_s, replace(kind, name_taken_by="b"), times) for step_s, kind, times in history])
    assert {d.action for _, d in made} <= {Action.HOLD}


@given(histories, st.booleans())
@settings(max_examples=max(150, settings.default.max_examples))
def test_operator_stop_stays(history: History, is_loading: bool) -> None:
    """A STOPPED process stays stopped, unless a restart of ours was interrupted between stop and start."""
    stopped = in_state(State.STOPPED, Step.LOADING if is_loading else None)
    made, _ = play([*history, (1.0, stopped, 100)])
    assert {d.action for _, d in made[-100:]} == {Action.HOLD}


@given(histories)
@settings(max_examples=max(150, settings.default.max_examples))
def test_only_what_fails_alike_or_recurs_gives_up_early(history: History) -> None:
    """START_FAILED takes three different lives that failed alike, or one that recurs with the settings of now, or
    settings that were refused and still are wrong, in any sequence of evidence.
    """
    lives: list[FailedStart] = []
    for evidence, decision in play(history)[0]:
        if evidence.failed_start is not None and evidence.failed_start not in lives:
            lives.append(evidence.failed_start)
        if decision.verdict is Verdict.START_FAILED:
            assert decision.action is Action.GIVE_UP
            are_alike = any(sum(life.is_like(other) for other in lives) >= 3 for life in lives)
            recurs = any(life.recurs and evidence.settings in ("", life.settings) for life in lives)
            refused = evidence.process is not None and evidence.process.exit_status == 2 and not evidence.settings
            assert are_alike or recurs or refused


@given(histories)
@settings(max_examples=max(150, settings.default.max_examples))
def test_what_has_served_is_never_given_up_early(history: History) -> None:
    """A worker whose settings have served has its whole budget, whatever failed to start before or with others."""
    for evidence, decision in play(history)[0]:
        if evidence.has_served and evidence.settings:
            assert decision.verdict is not Verdict.START_FAILED
