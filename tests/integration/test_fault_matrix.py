"""Every fault in every situation, on a whole stack: what is concluded, done and written down, and that nothing is lost.

In each cell every request submitted ends with its one right result. `MATRIX=all` runs all cells; without
it those of CI, which have each fault once and each situation several times.
"""

import hashlib
import json
import os
import random
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import grpc
import pytest
from _pytest.mark.structures import ParameterSet

from tests.chaos.faults import Faults
from tests.stacks import ROOT, FullStack, full_stack
from tests.waiting import until
from vllm_batch.client import Client
from vllm_batch.v1 import batch_service_pb2 as pb
from vllm_batch.v1 import recovery_service_pb2 as rpb
from watchdog.policy import State

pytestmark = pytest.mark.timeout(240)

STARTING, IDLE, SATURATED, DRAINING = "starting", "idle", "saturated", "draining"
WINDOW = 8
SETTINGS = {
    "BATCH_ENGINE": "simulated",
    "BATCH_SIMULATED_LOAD_S": "1",
    "BATCH_SIMULATED_WINDOW": str(WINDOW),
    "BATCH_WINDOW": str(WINDOW),
    "BATCH_HEARTBEAT_INTERVAL_S": "0.3",
    "BATCH_HEARTBEAT_TIMEOUT_S": "3",
    "BATCH_LEASE_S": "5",
    "BATCH_DATABASE_TIMEOUT_S": "1",
    "BATCH_DRAIN_TIMEOUT_S": "6",
    "BATCH_CHECK_INTERVAL_S": "0.5",
    "BATCH_PROBE_TIMEOUT_S": "0.5",
    "BATCH_LOAD_TIMEOUT_S": "30",
    "BATCH_STOP_TIMEOUT_S": "2",
    "BATCH_MAX_RESTARTS_PER_HOUR": "1000",
    "BATCH_RESTART_BACKOFF_MAX_S": "0.2",
    # Faults from within the processes.
    "PYTHONPATH": str(ROOT / "tests" / "chaos" / "inject"),
}


@dataclass(frozen=True)
class Expected:
    """What is to come of a fault: verdict and action told while it lasts, and the verdicts of all restarts in the end.

    `A|B` where it may be either.
    """

    verdict: str
    action: str
    restarts: tuple[str, ...]
    # What the worker said of itself, as written down with the restart.
    phase: str = ""


def restart(verdict: str, phase: str = "", times: int = 1) -> Expected:
    """Restarted for that reason."""
    return Expected(verdict, "RESTART", (verdict,) * times, phase)


def hold(verdict: str) -> Expected:
    """Known for what it is, and left alone."""
    return Expected(verdict, "HOLD", ())


def finish(verdict: str) -> Expected:
    """The one restart, for that reason, is taken up by the next watchdog."""
    return Expected("INTERRUPTED", "RESTART", (verdict,))


# A worker that drains ends by itself, and nobody but the watchdog starts another: at once, or when it can.
DRAINED = Expected("CRASHED", "HOLD|RESTART", ("CRASHED",))
# Whether the watchdog has read that it drains before Postgres went is chance. If not, it is one that answers nothing.
DRAINED_UNHEARD = Expected("CRASHED|FROZEN", "HOLD|RESTART", ("CRASHED|FROZEN",))
ONLY_LOADING = "a worker loads while it starts, and at no other time"

# What is a text is why there is no such cell.
TABLE: dict[str, dict[str, Expected | str]] = {
    "kill_worker": dict.fromkeys((STARTING, IDLE, SATURATED, DRAINING), restart("CRASHED")),
    "exit_worker": dict.fromkeys((STARTING, IDLE, SATURATED, DRAINING), restart("CRASHED")),
    "orphan_engine": dict.fromkeys((STARTING, IDLE, SATURATED, DRAINING), restart("CRASHED")),
    "freeze_worker": {
        # It has said that it loads: that may take its time.
        STARTING: restart("START_TIMEOUT", "loading"),
        IDLE: restart("FROZEN"),
        SATURATED: restart("FROZEN"),
        DRAINING: restart("FROZEN"),
    },
    "block_loop": {
        STARTING: restart("START_TIMEOUT", "loading"),
        IDLE: restart("RPC_WEDGED", "stalled"),
        SATURATED: restart("RPC_WEDGED", "stalled"),
        DRAINING: restart("RPC_WEDGED", "draining"),
    },
    "stop_heart": {
        # It loads to its end, and serves.
        STARTING: restart("HEARTBEAT_LOST", "loading"),
        IDLE: restart("HEARTBEAT_LOST"),
        SATURATED: restart("HEARTBEAT_LOST"),
        DRAINING: DRAINED,
    },
    # While loading: a load that is too slow.
    "freeze_engine": {
        STARTING: restart("START_TIMEOUT", "loading"),
        IDLE: restart("ENGINE_STALLED", "stalled"),
        SATURATED: restart("ENGINE_STALLED", "stalled"),
        # The worker's own deadline, or the watchdog's.
        DRAINING: restart("CRASHED|DRAINING"),
    },
    # /dev/shm belongs to the whole machine, so it is not filled: the engine gets what the kernel gives then.
    "refuse_shm": {
        STARTING: restart("CRASHED"),
        IDLE: ONLY_LOADING,
        SATURATED: ONLY_LOADING,
        DRAINING: ONLY_LOADING,
    },
    "overflow_shm": {
        STARTING: restart("ENGINE_DEAD", "engine_dead"),
        IDLE: restart("ENGINE_DEAD", "engine_dead"),
        SATURATED: restart("ENGINE_DEAD", "engine_dead"),
        DRAINING: DRAINED,
    },
    "stop_postgres": {
        STARTING: hold("STARTING|HEALTHY|DATABASE_AWAY"),
        IDLE: hold("DATABASE_AWAY"),
        SATURATED: hold("DATABASE_AWAY"),
        DRAINING: DRAINED_UNHEARD,
    },
    "slow_postgres": {
        STARTING: hold("STARTING|HEALTHY|DATABASE_AWAY"),
        IDLE: hold("DATABASE_AWAY"),
        SATURATED: hold("DATABASE_AWAY"),
        DRAINING: DRAINED_UNHEARD,
    },
    "restart_postgres": {
        STARTING: hold("STARTING|HEALTHY|DATABASE_AWAY"),
        IDLE: hold("HEALTHY"),
        SATURATED: hold("HEALTHY"),
        DRAINING: DRAINED,
    },
    "cut_connections": {
        STARTING: hold("STARTING|HEALTHY|DATABASE_AWAY"),
        IDLE: hold("HEALTHY"),
        SATURATED: hold("HEALTHY"),
        DRAINING: DRAINED,
    },
    "shift_clock": {
        STARTING: hold("STARTING|HEALTHY|DATABASE_AWAY"),
        # Until the next beat, before it is confirmed.
        IDLE: Expected("HEARTBEAT_LOST", "CONFIRM", ()),
        SATURATED: Expected("HEARTBEAT_LOST", "CONFIRM", ()),
        DRAINING: DRAINED,
    },
    "remove_socket": {
        STARTING: hold("SUPERVISOR_AWAY"),
        IDLE: hold("SUPERVISOR_AWAY"),
        SATURATED: hold("SUPERVISOR_AWAY"),
        DRAINING: Expected("SUPERVISOR_AWAY", "HOLD", ("CRASHED",)),
    },
    # The next supervisord starts everything by itself.
    "kill_supervisord": dict.fromkeys((STARTING, IDLE, SATURATED, DRAINING), hold("HEALTHY")),
    "kill_watchdog_before_start": {
        STARTING: finish("ENGINE_DEAD"),
        IDLE: finish("ENGINE_DEAD"),
        SATURATED: finish("ENGINE_DEAD"),
        # Ended by itself, not stopped by the watchdog: the next one finds it gone, and the restart half done.
        DRAINING: DRAINED,
    },
    # As a new version is brought out: no fault at all, and no restart of ours.
    "redeploy_worker": {
        STARTING: hold("HEALTHY"),
        IDLE: hold("HEALTHY"),
        SATURATED: hold("HEALTHY"),
        DRAINING: hold("HEALTHY"),
    },
    "stop_worker": {
        STARTING: hold("OPERATOR_STOP"),
        IDLE: hold("OPERATOR_STOP"),
        SATURATED: hold("OPERATOR_STOP"),
        DRAINING: "what drains has been told to stop already",
    },
    "poison": {
        STARTING: "in no engine before it is ready: the same as idle",
        IDLE: restart("CRASHED", times=3),
        SATURATED: restart("CRASHED", times=3),
        DRAINING: "a worker that drains takes no request in",
    },
}
# Each fault once, in one of its situations.
IN_CI = {
    ("kill_worker", SATURATED),
    ("exit_worker", DRAINING),
    ("orphan_engine", STARTING),
    ("freeze_worker", DRAINING),
    ("block_loop", SATURATED),
    ("stop_heart", IDLE),
    ("freeze_engine", STARTING),
    ("refuse_shm", STARTING),
    ("overflow_shm", IDLE),
    ("stop_postgres", SATURATED),
    ("slow_postgres", DRAINING),
    ("restart_postgres", DRAINING),
    ("cut_connections", STARTING),
    ("shift_clock", SATURATED),
    ("remove_socket", IDLE),
    ("kill_supervisord", DRAINING),
    ("kill_watchdog_before_start", SATURATED),
    ("redeploy_worker", SATURATED),
    ("stop_worker", STARTING),
    ("poison", IDLE),
}


def cells(*situations: str) -> list[ParameterSet]:
    """The cells of these situations: fault, situation, what is expected."""
    found = []
    for fault, row in TABLE.items():
        assert row.keys() == {STARTING, IDLE, SATURATED, DRAINING}
        for situation in situations:
            expected = row[situation]
            is_wanted = os.environ.get("MATRIX") == "all" or (fault, situation) in IN_CI
            if isinstance(expected, Expected) and is_wanted:
                found.append(pytest.param(fault, situation, expected, id=f"{fault}-{situation}"))
    return found


@dataclass
class Sent:
    """A batch and what was asked in it, by `custom_id`; the poison among it."""

    id: str
    bodies: dict[str, str]
    killers: frozenset[str]

    def check(self, client: Client) -> None:
        """Each request has one result, the right one."""
        until(lambda: client.get(self.id).state == pb.BATCH_STATE_COMPLETED, f"{self.id} to be completed")
        results = list(client.results(self.id))
        assert [result.custom_id for result in results] == list(self.bodies)
        for result in results:
            if result.custom_id in self.killers:
                assert result.error.code == "REQUEST_CRASHED_ENGINE"
                continue
            answer = json.loads(result.response.body_json)["choices"][0]["message"]["content"]
            assert answer == hashlib.sha256(self.bodies[result.custom_id].encode()).hexdigest()


def submit(client: Client, count: int, simulate: float, killers: int = 0) -> Sent:
    """Submits a batch of requests that take `simulate` seconds each, the first of them `killers`."""
    bodies = {}
    for number in range(count):
        message = {"role": "user", "content": f"number {number}"}
        pace: object = "crash" if number < killers else simulate
        body = {"model": "tiny", "messages": [message], "vllm_xargs": {"simulate": pace}}
        bodies[f"c{number}"] = json.dumps(body)
    lines = (
        f'{{"custom_id": "{name}", "url": "/v1/chat/completions", "body": {body}}}'.encode()
        for name, body in bodies.items()
    )
    return Sent(client.submit_lines(lines).id, bodies, frozenset(list(bodies)[:killers]))


def verdict_name(number: int) -> str:
    return rpb.Verdict.Name(number).removeprefix("VERDICT_")


def action_name(number: int) -> str:
    return rpb.Action.Name(number).removeprefix("ACTION_")


def has_said(stack: FullStack, what: str) -> bool:
    """Whether this holds of the heartbeat of the process that runs."""
    return bool(stack.sql(f"SELECT 1 FROM heartbeats WHERE pid = {stack.pid('worker')} AND {what}"))


def is_well(stack: FullStack, client: Client) -> bool:
    """Healthy, no restart open, new work accepted."""
    try:
        status = stack.status()
        is_healthy = status.verdict == rpb.VERDICT_HEALTHY and not status.HasField("intent")
        return is_healthy and not client.accepting()
    except (grpc.RpcError, ValueError):
        return False


def bring_about(stack: FullStack, client: Client, situation: str) -> Sent:
    """Brings the stack into a situation, with work that is not done in all but `idle`."""
    if situation == IDLE:
        sent = submit(client, WINDOW, 0)
        sent.check(client)
    elif situation == SATURATED:
        sent = submit(client, 6 * WINDOW, 0.25)
        until(lambda: client.get(sent.id).counts.completed > 0, "the first results")
    elif situation == STARTING:
        sent = submit(client, 4 * WINDOW, 0.5)
        stack.supervisor.stop("worker")
        until(lambda: stack.supervisor.info("worker").state is State.STOPPED, "the worker to end")
        stack.supervisor.start("worker")
        until(lambda: has_said(stack, "phase = 'loading'"), "the worker to load")
    else:
        sent = submit(client, 2, 3)
        until(lambda: has_said(stack, "(detail->>'in_engine')::int = 2"), "the requests to run")
        os.kill(stack.pid("worker"), signal.SIGTERM)
        until(lambda: has_said(stack, "phase = 'draining'"), "the worker to drain")
    if situation != IDLE:
        assert client.get(sent.id).counts.completed < len(sent.bodies), "all was done before the fault"
    return sent


def check_cell(stack: FullStack, fault: str, situation: str, expected: Expected) -> None:
    """Strikes, waits for what follows, mends what an operator has to, and looks at all that is left."""
    with Client(stack.target, patience_s=90) as client:
        until(lambda: is_well(stack, client), "the stack to be well")
        before, noted = len(stack.restarts()), len(stack.audit())
        sent = [bring_about(stack, client, situation)]
        end_of_log = stack.mark("watchdog")
        mend = None
        if fault == "poison":
            sent.append(submit(client, WINDOW, 0.05, killers=1))
        else:
            mend = Faults(stack, random.Random(0)).strike(fault)
        try:
            until(told(stack, end_of_log, expected), f"{expected.verdict} to be told")
            check_held(stack, expected)
        finally:
            if mend is not None:
                mend()
        until(lambda: is_well(stack, client), "the stack to be well again")
        # It also works.
        sent.append(submit(client, WINDOW, 0))
        for each in sent:
            each.check(client)
    # What was done while Postgres was away may be written a little later.
    until(lambda: len(stack.restarts()) >= before + len(expected.restarts), f"{len(expected.restarts)} restarts")
    restarts = stack.restarts()[before:]
    verdicts = [verdict_name(event.verdict) for event in restarts]
    assert len(verdicts) == len(expected.restarts), (verdicts, [event.reason for event in restarts])
    for verdict, wanted in zip(verdicts, expected.restarts, strict=True):
        assert verdict in wanted.split("|")
    # One that dies again before it is seen healthy has failed; the last has not.
    may_fail = {"failed"} if len(restarts) > 1 else set()
    assert {event.outcome for event in restarts} <= {"recovered"} | may_fail
    assert all(event.outcome == "recovered" for event in restarts[-1:])
    for event in restarts:
        evidence = json.loads(event.evidence_json)
        assert event.reason
        assert evidence["process"]
        assert {timing.phase for timing in event.timings} >= {"stop", "sweep", "start"}
        assert not expected.phase or evidence["heartbeat"]["phase"] == expected.phase
    if expected.action == "HOLD" and not expected.restarts and "HEALTHY" not in expected.verdict:
        ends = [event for event in stack.audit()[noted:] if event.verdict == rpb.VERDICT_HEALTHY]
        assert {event.kind for event in ends} == {"verdict"}, "it is not written down that it was well again"
    stack.check_no_orphans()


def told(stack: FullStack, since: int, expected: Expected) -> Callable[[], bool]:
    """Whether the watchdog has come to the expected conclusion since a mark in its log, or still holds to it."""
    verdicts, actions = expected.verdict.split("|"), expected.action.split("|")

    def is_told() -> bool:
        for event in stack.events("watchdog", "verdict_changed", since):
            if event["verdict"] in verdicts and event["action"] in actions:
                return True
        try:
            status = stack.status()
        except (grpc.RpcError, ValueError):
            return False
        return verdict_name(status.verdict) in verdicts and action_name(status.action) in actions

    return is_told


def check_held(stack: FullStack, expected: Expected) -> None:
    """What is held for a reason of its own stays so when the watchdog looks again and again."""
    if expected.action != "HOLD" or expected.restarts or "HEALTHY" in expected.verdict:
        return
    looks: set[int] = set()

    def looked() -> bool:
        status = stack.status()
        if verdict_name(status.verdict) != expected.verdict:
            looks.clear()
        else:
            looks.add(status.observe_time.ToNanoseconds())
        return len(looks) >= 4

    until(looked, f"{expected.verdict} to last")


@pytest.fixture(scope="class")
def stack() -> Iterator[FullStack]:
    """One stack for all cells of a class."""
    with full_stack(**SETTINGS) as stack:
        started = stack.script("start-all.sh")
        assert started.returncode == 0, started.stdout + started.stderr + stack.logs()
        yield stack


# In two classes, which run at the same time.
class TestChanging:
    """Faults of a worker that is on its way."""

    @pytest.mark.parametrize(("fault", "situation", "expected"), cells(STARTING, DRAINING))
    def test_cell(self, stack: FullStack, fault: str, situation: str, expected: Expected) -> None:
        """A worker that starts or drains: the right conclusion, as many restarts as needed, nothing lost."""
        check_cell(stack, fault, situation, expected)


class TestReady:
    """Faults of a worker that is ready."""

    @pytest.mark.parametrize(("fault", "situation", "expected"), cells(IDLE, SATURATED))
    def test_cell(self, stack: FullStack, fault: str, situation: str, expected: Expected) -> None:
        """A worker with or without work: the right conclusion, as many restarts as needed, nothing lost."""
        check_cell(stack, fault, situation, expected)


def test_table_is_complete() -> None:
    """CI has each fault, each situation several times, and no cell that is not there."""
    assert {fault for fault, _ in IN_CI} == TABLE.keys()
    for situation in (STARTING, IDLE, SATURATED, DRAINING):
        assert sum(where == situation for _, where in IN_CI) >= 3
    assert all(isinstance(TABLE[fault][situation], Expected) for fault, situation in IN_CI)
