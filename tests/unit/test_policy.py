"""The decision table, row by row, and what must hold whatever is observed."""

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
    Health,
    Heartbeat,
    Intent,
    Limits,
    Memory,
    Process,
    State,
    Step,
    Verdict,
    decide,
)

LIMITS = Limits()
RUNNING = Process(State.RUNNING, pid=7, age_s=500)
YOUNG = replace(RUNNING, age_s=10)
FRESH = Heartbeat(age_s=3, phase="ready", is_current=True, incarnation="a")
STALE = replace(FRESH, age_s=61)
OTHER = replace(FRESH, is_current=False)
UP = 10_000.0
BETWEEN = (State.STARTING, State.BACKOFF, State.STOPPING, State.UNKNOWN)


def beat(phase: str, age_s: float = 3) -> Heartbeat:
    return replace(FRESH, phase=phase, age_s=age_s)


def seen(
    process: Process | None = RUNNING,
    health: Health = Health.NOT_PROBED,
    heartbeat: Heartbeat | None = None,
    database_up_s: float | None = UP,
    **more: Any,
) -> Evidence:
    return Evidence(1000.0, process, health, database_up_s, heartbeat, **more)


def in_state(state: State, step: Step | None = None) -> Evidence:
    return seen(Process(state), intent=step and Intent("a", step))


def run(evidence: Evidence, for_s: float, memory: Memory | None = None, limits: Limits = LIMITS) -> list[Decision]:
    """The decisions on the same evidence, until it has lasted `for_s` or something is done."""
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
    ("supervisord unreachable", seen(None, Health.SERVING, FRESH), Verdict.SUPERVISOR_AWAY),
    ("paused", seen(Process(State.EXITED), pause_left_s=5), Verdict.PAUSED),
    ("stopped by an operator", in_state(State.STOPPED), Verdict.OPERATOR_STOP),
    ("stopping by an operator while our restart loads", in_state(State.STOPPING, Step.LOADING), Verdict.TRANSITION),
    ("stopped by an operator while our restart loads", in_state(State.STOPPED, Step.LOADING), Verdict.OPERATOR_STOP),
    ("starting", seen(health=Health.UNAVAILABLE, heartbeat=beat("starting")), Verdict.STARTING),
    ("loading", seen(health=Health.NOT_SERVING, heartbeat=beat("loading")), Verdict.STARTING),
    ("loading, and silent", seen(health=Health.DEADLINE_EXCEEDED, heartbeat=beat("loading", 300)), Verdict.STARTING),
    ("just started, no row", seen(YOUNG, Health.UNAVAILABLE, None), Verdict.STARTING),
    ("just started, row of before", seen(YOUNG, Health.NOT_SERVING, OTHER), Verdict.STARTING),
    ("just started, serves already", seen(YOUNG, Health.SERVING, OTHER), Verdict.STARTING),
    ("just started without Postgres", seen(YOUNG, Health.NOT_SERVING, None, None), Verdict.STARTING),
    ("healthy", seen(health=Health.SERVING, heartbeat=FRESH), Verdict.HEALTHY),
    ("ready, and has not written so yet", seen(health=Health.SERVING, heartbeat=beat("loading")), Verdict.HEALTHY),
    ("Postgres away", seen(health=Health.SERVING, database_up_s=None), Verdict.DATABASE_AWAY),
    ("Postgres just back", seen(health=Health.SERVING, heartbeat=STALE, database_up_s=2), Verdict.DATABASE_AWAY),
    ("no address to ask, Postgres away", seen(replace(RUNNING, age_s=9e9), database_up_s=None), Verdict.DATABASE_AWAY),
    ("draining", seen(health=Health.NOT_SERVING, heartbeat=beat("draining")), Verdict.DRAINING),
    ("stopping by itself", seen(health=Health.NOT_SERVING, heartbeat=beat("stopping")), Verdict.DRAINING),
    *((f"in {state}", in_state(state), Verdict.TRANSITION) for state in BETWEEN),
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
    """A process that is gone is started again without confirmation; an open intent is taken up, not doubled."""
    decision, memory = decide(evidence, Memory(), LIMITS)
    assert (decision.verdict, decision.action, decision.continues) == (verdict, Action.RESTART, continues)
    assert len(memory.restarts) == (0 if continues else 1)


CONFIRMED = [
    (
        "loading too long",
        seen(replace(RUNNING, age_s=1801), Health.NOT_SERVING, beat("loading")),
        Verdict.START_TIMEOUT,
        2,
    ),
    ("stale", seen(health=Health.SERVING, heartbeat=STALE), Verdict.HEARTBEAT_LOST, 15),
    ("from the future", seen(health=Health.SERVING, heartbeat=replace(FRESH, age_s=-61)), Verdict.HEARTBEAT_LOST, 15),
    ("missing", seen(health=Health.SERVING, heartbeat=None), Verdict.HEARTBEAT_LOST, 15),
    ("lost while loading", seen(health=Health.SERVING, heartbeat=beat("loading", 61)), Verdict.HEARTBEAT_LOST, 15),
    ("of another incarnation", seen(health=Health.SERVING, heartbeat=OTHER), Verdict.HEARTBEAT_LOST, 15),
    ("stalled", seen(health=Health.NOT_SERVING, heartbeat=beat("stalled")), Verdict.ENGINE_STALLED, 2),
    ("engine dead", seen(health=Health.NOT_SERVING, heartbeat=beat("engine_dead")), Verdict.ENGINE_DEAD, 2),
    ("times out, beats", seen(health=Health.DEADLINE_EXCEEDED, heartbeat=FRESH), Verdict.RPC_WEDGED, 20),
    ("refused, beats", seen(health=Health.UNAVAILABLE, heartbeat=FRESH), Verdict.RPC_WEDGED, 20),
    ("times out, stale", seen(health=Health.DEADLINE_EXCEEDED, heartbeat=STALE), Verdict.FROZEN, 2),
    ("refused, of another", seen(health=Health.UNAVAILABLE, heartbeat=OTHER), Verdict.FROZEN, 2),
    ("not serving, ready", seen(health=Health.NOT_SERVING, heartbeat=FRESH), Verdict.NOT_READY, 60),
    ("not serving, stale", seen(health=Health.NOT_SERVING, heartbeat=STALE), Verdict.NOT_READY, 60),
    ("unknown", seen(health=Health.UNKNOWN, heartbeat=FRESH), Verdict.NOT_READY, 60),
    ("no row, no address to ask", seen(), Verdict.NOT_READY, 60),
]


@pytest.mark.parametrize(
    ("evidence", "verdict", "patience_s"), [row[1:] for row in CONFIRMED], ids=[row[0] for row in CONFIRMED]
)
def test_rows_that_confirm_and_restart(evidence: Evidence, verdict: Verdict, patience_s: float) -> None:
    """A process that is there is restarted only after several probes agree, for as long as its row says."""
    *before, last = run(evidence, 100)
    assert {(d.verdict, d.action) for d in before} == {(verdict, Action.CONFIRM)}
    assert (last.verdict, last.action) == (verdict, Action.RESTART)
    assert len(before) >= LIMITS.confirm_probes - 1
    assert sum(d.check_in_s for d in before) == pytest.approx(patience_s, abs=LIMITS.confirm_interval_s)


def test_confirmation_takes_several_probes_however_slow() -> None:
    """Probes that are far apart in time do not make up for their number."""
    evidence, memory, actions = seen(health=Health.DEADLINE_EXCEEDED, heartbeat=STALE), Memory(), []
    for time_s in (0.0, 100.0, 200.0):
        decision, memory = decide(replace(evidence, time_s=time_s), memory, LIMITS)
        actions.append(decision.action)
    assert actions == [Action.CONFIRM, Action.CONFIRM, Action.RESTART]


@pytest.mark.parametrize(
    "between",
    [
        seen(health=Health.SERVING, heartbeat=FRESH),
        seen(None),
        seen(health=Health.SERVING, database_up_s=None),
        seen(replace(RUNNING, pid=8), Health.DEADLINE_EXCEEDED, STALE),
    ],
    ids=["healthy", "supervisord away", "Postgres away", "another process"],
)
def test_confirmation_begins_anew_after_any_other_sight(between: Evidence) -> None:
    """One good or missing observation, or a new process, ends the suspicion."""
    sick, memory = seen(health=Health.DEADLINE_EXCEEDED, heartbeat=STALE), Memory()
    actions = []
    for time_s, evidence in enumerate([sick, sick, between, sick, sick]):
        decision, memory = decide(replace(evidence, time_s=10.0 * time_s), memory, LIMITS)
        actions.append(decision.action)
    assert Action.RESTART not in actions


def test_sick_in_changing_ways_is_restarted_in_the_end() -> None:
    """A worker that is sick in two alternating ways does not escape, each being confirmed anew."""
    wedged = seen(health=Health.DEADLINE_EXCEEDED, heartbeat=FRESH)
    unready = seen(health=Health.NOT_SERVING, heartbeat=FRESH)
    memory, time_s, action = Memory(), 0.0, Action.HOLD
    while action is not Action.RESTART and time_s < 1000:
        phase = wedged if int(time_s) // 4 % 2 else unready
        decision, memory = decide(replace(phase, time_s=time_s), memory, LIMITS)
        action, time_s = decision.action, time_s + 1
    assert 60 <= time_s < 70


def test_heartbeat_is_not_missed_before_postgres_has_been_up_for_the_timeout() -> None:
    """After an outage of Postgres workers get as long to beat as they always have."""
    decisions = run(seen(health=Health.SERVING, heartbeat=STALE, database_up_s=0), 100)
    held = sum(d.check_in_s for d in decisions if d.verdict is Verdict.DATABASE_AWAY)
    assert held == pytest.approx(LIMITS.heartbeat_timeout_s, abs=2)
    assert decisions[-1].verdict is Verdict.HEARTBEAT_LOST


def test_loading_is_remembered_while_postgres_is_away() -> None:
    """A worker that was loading when Postgres went is still held as such, and not as one that does not answer."""
    _, memory = decide(seen(health=Health.NOT_SERVING, heartbeat=beat("loading")), Memory(), LIMITS)
    for health in (Health.NOT_SERVING, Health.DEADLINE_EXCEEDED, Health.UNAVAILABLE):
        decisions = run(seen(health=health, database_up_s=None), 600, memory)
        assert {(d.verdict, d.action) for d in decisions} == {(Verdict.STARTING, Action.HOLD)}


def test_loaded_while_postgres_is_away_is_not_late() -> None:
    """A worker that became ready when it could not write so does not run into the deadline for loading."""
    _, memory = decide(seen(health=Health.NOT_SERVING, heartbeat=beat("loading")), Memory(), LIMITS)
    decisions = run(seen(health=Health.SERVING, database_up_s=None), 2 * LIMITS.load_timeout_s, memory)
    assert {(d.verdict, d.action) for d in decisions} == {(Verdict.DATABASE_AWAY, Action.HOLD)}


def test_frozen_while_postgres_is_away_is_restarted() -> None:
    """A worker that was ready and now answers nothing is restarted though its heartbeat cannot be read."""
    _, memory = decide(seen(health=Health.SERVING, heartbeat=FRESH), Memory(), LIMITS)
    last = run(seen(health=Health.DEADLINE_EXCEEDED, database_up_s=None), 60, memory)[-1]
    assert (last.verdict, last.action) == (Verdict.FROZEN, Action.RESTART)


def test_draining_past_its_deadline_is_restarted() -> None:
    """A worker that says it ends but does not is held until the deadline and restarted then."""
    decisions = run(seen(health=Health.NOT_SERVING, heartbeat=beat("draining")), 200)
    assert decisions[-1].action is Action.RESTART
    assert sum(d.check_in_s for d in decisions) >= LIMITS.drain_timeout_s


def test_a_port_that_closes_at_the_end_is_no_freeze() -> None:
    """Without Postgres a worker that was ending and answers no more is given the time to end; then it is restarted."""
    _, memory = decide(seen(health=Health.NOT_SERVING, heartbeat=beat("draining")), Memory(), LIMITS)
    decisions = run(seen(health=Health.UNAVAILABLE, database_up_s=None), 60, memory)
    assert (decisions[-1].verdict, decisions[-1].action) == (Verdict.FROZEN, Action.RESTART)
    assert sum(decision.check_in_s for decision in decisions) >= LIMITS.wedged_confirm_s


@pytest.mark.parametrize("state", [State.STARTING, State.BACKOFF, State.UNKNOWN])
def test_transition_past_its_deadline_is_finished(state: State) -> None:
    """What hangs between two states of supervisord is held until the deadline and restarted then."""
    decisions = run(in_state(state), 400)
    assert (decisions[-1].verdict, decisions[-1].action) == (Verdict.TRANSITION, Action.RESTART)
    assert sum(d.check_in_s for d in decisions) >= LIMITS.transition_timeout_s


def test_suspicion_from_before_the_watchdog_was_held_up_does_not_count() -> None:
    """A machine that stood still for a while is no reason to restart whoever had no time to answer since."""
    lost = seen(health=Health.SERVING, heartbeat=STALE)
    first, memory = decide(lost, Memory(), LIMITS)
    after = replace(lost, time_s=lost.time_s + 100, awake_since_s=lost.time_s + 100)
    decisions = run(after, 60, memory)
    assert first.action is Action.CONFIRM
    assert decisions[-1].action is Action.RESTART
    assert sum(decision.check_in_s for decision in decisions[:-1]) >= LIMITS.heartbeat_confirm_s


def test_transition_through_several_states_counts_from_the_first() -> None:
    """A program that supervisord keeps trying to start does not start the deadline anew each time."""
    memory, time_s, action = Memory(), 0.0, Action.HOLD
    while action is Action.HOLD and time_s < 1000:
        state = State.BACKOFF if int(time_s) % 2 else State.STARTING
        decision, memory = decide(replace(in_state(state), time_s=time_s), memory, LIMITS)
        action, time_s = decision.action, time_s + 1
    assert LIMITS.transition_timeout_s < time_s < LIMITS.transition_timeout_s + 3


def test_stopping_is_left_to_supervisord() -> None:
    """A stop that takes long may be an operator's: it is never turned into a restart."""
    assert {d.action for d in run(in_state(State.STOPPING), 4 * LIMITS.transition_timeout_s)} == {Action.HOLD}


def test_stop_of_ours_is_taken_up_once() -> None:
    """A worker that cannot be killed is left to supervisord, rather than costing the whole budget."""
    stopping, memory = in_state(State.STOPPING, Step.STOPPING), Memory()
    first, memory = decide(stopping, memory, LIMITS)
    second, memory = decide(stopping, memory, LIMITS)
    assert (first.action, first.continues) == (Action.RESTART, True)
    assert (second.verdict, second.action, memory.restarts) == (Verdict.TRANSITION, Action.HOLD, ())


def test_interrupted_restart_is_free_once() -> None:
    """An intent that still cannot be finished costs a unit of the budget from the second time on."""
    stopped, memory = in_state(State.STOPPED, Step.STARTING), Memory()
    first, memory = decide(stopped, memory, LIMITS)
    second, memory = decide(replace(stopped, time_s=1001.0), memory, LIMITS)
    assert (first.action, first.continues) == (Action.RESTART, True)
    assert (second.action, second.continues, len(memory.restarts)) == (Action.RESTART, False, 1)


def test_backoff_grows_and_is_capped() -> None:
    """Each restart that did not help makes the next wait longer, up to a limit."""
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
    """A worker that was healthy for long is restarted at once when it dies again."""
    healthy = replace(seen(health=Health.SERVING, heartbeat=FRESH), time_s=0.0)
    for lasted_s, action in ((LIMITS.healthy_reset_s, Action.RESTART), (LIMITS.healthy_reset_s - 1, Action.BACK_OFF)):
        memory = Memory(restarts=(-1.0,), streak=20)
        _, memory = decide(healthy, memory, LIMITS)
        _, memory = decide(replace(healthy, time_s=lasted_s), memory, LIMITS)
        decision, _ = decide(
            replace(in_state(State.EXITED), time_s=lasted_s), memory, replace(LIMITS, backoff_max_s=1e6)
        )
        assert decision.action is action


def test_a_healthy_while_is_one_without_a_break() -> None:
    """Being sick in between begins the healthy while anew, though nothing was restarted for it."""
    healthy, sick = seen(health=Health.SERVING, heartbeat=FRESH), seen(health=Health.SERVING, heartbeat=STALE)
    memory = Memory(restarts=(0.0,), streak=20)
    for time_s, evidence in ((0.0, healthy), (200.0, sick), (250.0, healthy), (LIMITS.healthy_reset_s, healthy)):
        _, memory = decide(replace(evidence, time_s=time_s), memory, LIMITS)
    assert memory.streak == 20


def test_a_new_process_is_not_judged_by_what_the_old_one_said() -> None:
    """The phase that is remembered is that of a process, and forgotten with it."""
    _, memory = decide(seen(health=Health.NOT_SERVING, heartbeat=beat("stalled")), Memory(), LIMITS)
    new = seen(replace(YOUNG, pid=8), Health.NOT_SERVING, replace(beat("stalled"), is_current=False))
    assert decide(new, memory, LIMITS)[0].verdict is Verdict.STARTING


def test_budget_spent_gives_up_until_a_person_gives_it_back() -> None:
    """After the last restart of the hour nothing is restarted any more, also in the next hour, until the reset."""
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
    """A heartbeat that stops is noticed when it is due, not only at the next floor."""
    assert decide(seen(health=Health.SERVING, heartbeat=FRESH), Memory(), LIMITS)[0].check_in_s == 30
    old = seen(health=Health.SERVING, heartbeat=beat("ready", 50))
    assert decide(old, Memory(), LIMITS)[0].check_in_s == 10


def test_phases_are_those_of_the_heartbeat() -> None:
    """The policy speaks of phases that workers really have."""
    assert policy.LOADING_PHASES | policy.ENDING_PHASES | {"stalled", "engine_dead"} < set(Phase)


# Properties. Evidence of every kind in any order, time going forward by anything from nothing to hours.

processes = st.none() | st.builds(
    Process,
    state=st.sampled_from(State),
    pid=st.sampled_from([0, 7, 8]),
    age_s=st.floats(0, 4000),
)
heartbeats = st.none() | st.builds(
    Heartbeat,
    age_s=st.floats(-100, 200),
    phase=st.sampled_from([str(phase) for phase in Phase]),
    is_current=st.booleans(),
)
intents = st.none() | st.builds(Intent, key=st.sampled_from("abc"), step=st.sampled_from(Step))


def observations(**fixed: st.SearchStrategy[Any]) -> st.SearchStrategy[Evidence]:
    kinds: dict[str, st.SearchStrategy[Any]] = {
        "time_s": st.just(0.0),
        "process": processes,
        "health": st.sampled_from(Health),
        "database_up_s": st.none() | st.floats(0, 1e6),
        "heartbeat": heartbeats,
        "intent": intents,
        "pause_left_s": st.sampled_from([0.0, 0.0, 0.0, 5.0]),
    }
    return st.builds(Evidence, **(kinds | fixed))


steps_s = st.sampled_from([0.0, 0.1, 1.0, 5.0, 60.0, 400.0, 1800.0])
histories = st.lists(st.tuples(steps_s, observations(), st.integers(1, 40)), max_size=40)
History = list[tuple[float, Evidence, int]]


def play(history: History, limits: Limits = LIMITS) -> tuple[list[tuple[Evidence, Decision]], Memory]:
    """Decides on each evidence of a history, repeated as often as it says, time going forward by its step."""
    memory, time_s, made = Memory(), 0.0, []
    for step_s, kind, times in history:
        for _ in range(times):
            time_s += step_s
            evidence = replace(kind, time_s=time_s)
            decision, memory = decide(evidence, memory, limits)
            made.append((evidence, decision))
    return made, memory


@given(histories, st.integers(0, 4))
@settings(max_examples=300, deadline=None)
def test_never_more_restarts_than_the_budget_in_any_hour(history: History, budget: int) -> None:
    """Whatever is seen, no hour holds more restarts than allowed, each intent being continued for free once."""
    limits = replace(LIMITS, max_restarts_per_hour=budget, backoff_max_s=2)
    made, _ = play(history, limits)
    restarts = [e.time_s for e, d in made if d.action is Action.RESTART and not d.continues]
    for start in restarts:
        assert sum(start <= time < start + policy.HOUR_S for time in restarts) <= budget
    continued = [e.intent for e, d in made if d.action is Action.RESTART and d.continues]
    assert all(intent is not None and intent.step is not Step.LOADING for intent in continued)
    assert all(a.key != b.key for a, b in pairwise(continued) if a and b)


missing = observations(process=st.none()) | observations(
    process=st.builds(Process, state=st.just(State.RUNNING), pid=st.just(7), age_s=st.floats(0, 1e6)),
    health=st.sampled_from([Health.SERVING, Health.NOT_PROBED]),
    database_up_s=st.none(),
    heartbeat=st.none(),
)
gaps = st.lists(st.tuples(steps_s, missing, st.integers(1, 200)), min_size=1, max_size=20)


@given(gaps)
@settings(max_examples=200, deadline=None)
def test_missing_evidence_never_restarts(history: History) -> None:
    """supervisord or Postgres being away, for as long as they like, is no reason to touch a worker."""
    made, _ = play(history)
    assert {d.action for _, d in made} == {Action.HOLD}


healthy = observations(
    process=st.builds(Process, state=st.just(State.RUNNING), pid=st.sampled_from([7, 8]), age_s=st.floats(0, 1e6)),
    health=st.just(Health.SERVING),
    database_up_s=st.floats(0, 1e6),
    heartbeat=st.builds(Heartbeat, age_s=st.floats(0, 60), phase=st.just("ready"), is_current=st.just(True)),
)


@given(histories, healthy)
@settings(max_examples=300, deadline=None)
def test_healthy_worker_is_never_touched(history: History, evidence: Evidence) -> None:
    """Whatever was seen before, a worker that serves and beats is left alone."""
    made, _ = play([*history, (0.1, evidence, 1)])
    assert made[-1][1].action is Action.HOLD


@given(histories)
@settings(max_examples=300, deadline=None)
def test_paused_never_restarts(history: History) -> None:
    """While recovery is paused nothing is done, whatever is seen."""
    made, _ = play([(step_s, replace(kind, pause_left_s=1), times) for step_s, kind, times in history])
    assert {d.action for _, d in made} <= {Action.HOLD}


@given(histories, st.booleans())
@settings(max_examples=300, deadline=None)
def test_operator_stop_stays(history: History, is_loading: bool) -> None:
    """Whatever was seen before, what is STOPPED without a restart of ours between stop and start stays so."""
    stopped = in_state(State.STOPPED, Step.LOADING if is_loading else None)
    made, _ = play([*history, (1.0, stopped, 100)])
    assert {d.action for _, d in made[-100:]} == {Action.HOLD}
