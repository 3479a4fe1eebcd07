"""Every fault in every situation, on a whole stack: verdict, action and audit log are right, and nothing is lost.

In each cell every request ends with exactly one correct result. `MATRIX=all` runs all cells; the default is CI's
selection, with each fault once and each situation several times.
"""

import hashlib
import json
import os
import random
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace

import grpc
import pytest
from _pytest.mark.structures import ParameterSet

from tests.support.faults import Faults
from tests.support.stacks import ROOT, FullStack, full_stack
from tests.support.waiting import until
from vllm_batch import Client
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
    # Injects faults inside the processes.
    "PYTHONPATH": str(ROOT / "tests" / "chaos" / "inject"),
}


@dataclass(frozen=True)
class Expected:
    """What must follow a fault: the verdict and action while it lasts, and the verdicts of all restarts in the end.

    `A|B` where either may occur.
    """

    verdict: str
    action: str
    restarts: tuple[str, ...]
    # The phase in the worker's heartbeat, as recorded with the restart.
    phase: str = ""
    # Whom verdict and action are about.
    is_of_gateway: bool = False


def restart(verdict: str, phase: str = "", times: int = 1) -> Expected:
    """The worker is restarted with this verdict."""
    return Expected(verdict, "RESTART", (verdict,) * times, phase)


def hold(verdict: str) -> Expected:
    """The fault is recognized, and nothing is restarted."""
    return Expected(verdict, "HOLD", ())


def finish(verdict: str) -> Expected:
    """The next watchdog finishes the one open restart, which has this verdict."""
    return Expected("INTERRUPTED", "RESTART", (verdict,))


def of_gateway(expected: Expected) -> Expected:
    """The same, of the gateway."""
    return replace(expected, is_of_gateway=True)


# A draining worker ends by itself, and only the watchdog starts another: at once, or when it can.
DRAINED = Expected("CRASHED", "HOLD|RESTART", ("CRASHED",))
# Whether the watchdog saw it drain before Postgres went away is chance. If not, it looks like a worker that is frozen.
DRAINED_UNHEARD = Expected("CRASHED|FROZEN", "HOLD|RESTART", ("CRASHED|FROZEN",))
ONLY_LOADING = "a worker loads while it starts, and at no other time"

# A text says why there is no such cell.
TABLE: dict[str, dict[str, Expected | str]] = {
    "kill_worker": dict.fromkeys((STARTING, IDLE, SATURATED, DRAINING), restart("CRASHED")),
    "exit_worker": dict.fromkeys((STARTING, IDLE, SATURATED, DRAINING), restart("CRASHED")),
    "orphan_engine": dict.fromkeys((STARTING, IDLE, SATURATED, DRAINING), restart("CRASHED")),
    "freeze_worker": {
        # It has reported that it is loading, which may take long.
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
        # It finishes loading, and serves.
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
    # /dev/shm belongs to the whole machine, so it is not filled: the engine gets the kernel's error instead.
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
    # Of the gateway: the worker is left alone, and goes on.
    "stop_answering": {
        STARTING: of_gateway(restart("RPC_WEDGED")),
        IDLE: of_gateway(restart("RPC_WEDGED")),
        SATURATED: of_gateway(restart("RPC_WEDGED")),
        # And the worker, which has drained.
        DRAINING: of_gateway(Expected("RPC_WEDGED", "RESTART", ("CRASHED|RPC_WEDGED",) * 2)),
    },
    "stop_gateway": {
        STARTING: of_gateway(hold("OPERATOR_STOP")),
        IDLE: of_gateway(hold("OPERATOR_STOP")),
        SATURATED: of_gateway(hold("OPERATOR_STOP")),
        DRAINING: of_gateway(Expected("OPERATOR_STOP", "HOLD", ("CRASHED",))),
    },
    # The next supervisord starts everything by itself.
    "kill_supervisord": dict.fromkeys((STARTING, IDLE, SATURATED, DRAINING), hold("HEALTHY")),
    "kill_watchdog_before_start": {
        STARTING: finish("ENGINE_DEAD"),
        IDLE: finish("ENGINE_DEAD"),
        SATURATED: finish("ENGINE_DEAD"),
        # It ended by itself, not by the watchdog: the next watchdog finds it gone, and the restart half done.
        DRAINING: DRAINED,
    },
    # As when a new version is deployed: no fault at all, and no restart by the watchdog.
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
    ("freeze_engine", SATURATED),
    ("refuse_shm", STARTING),
    ("overflow_shm", IDLE),
    ("stop_postgres", SATURATED),
    ("slow_postgres", DRAINING),
    ("restart_postgres", DRAINING),
    ("cut_connections", STARTING),
    ("shift_clock", SATURATED),
    ("remove_socket", IDLE),
    ("stop_answering", SATURATED),
    ("stop_gateway", IDLE),
    ("kill_supervisord", DRAINING),
    ("kill_watchdog_before_start", SATURATED),
    ("redeploy_worker", SATURATED),
    ("stop_worker", STARTING),
    ("poison", IDLE),
}


def cells(*situations: str) -> list[ParameterSet]:
    """The cells of these situations: fault, situation, expectation."""
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
    """A batch, the client of its tenant, its request bodies by `custom_id`, and which requests are poison."""

    client: Client
    id: str
    bodies: dict[str, str]
    killers: frozenset[str]

    def completed(self) -> int:
        """The number of requests that are done."""
        return self.client.get(self.id).counts.completed

    def check(self) -> None:
        """Checks that every request has exactly one result, and the right one."""
        until(lambda: self.client.get(self.id).state == pb.BATCH_STATE_COMPLETED, f"{self.id} to complete")
        results = list(self.client.results(self.id))
        assert [result.custom_id for result in results] == list(self.bodies)
        for result in results:
            if result.custom_id in self.killers:
                assert result.error.code == "REQUEST_CRASHED_ENGINE"
                continue
            answer = json.loads(result.response.body_json)["choices"][0]["message"]["content"]
            assert answer == hashlib.sha256(self.bodies[result.custom_id].encode()).hexdigest()


def submit(client: Client, count: int, simulate: float, killers: int = 0) -> Sent:
    """Submits a batch of requests that take `simulate` seconds each; the first `killers` of them crash the worker."""
    bodies = {}
    for number in range(count):
        # Groups share the beginning of their prompts, so that chunks are not cut in the file's order.
        message = {"role": "user", "content": f"group {number % 3}: {'read this first. ' * 50}number {number}"}
        pace: object = "crash" if number < killers else simulate
        body = {"model": "tiny", "messages": [message], "vllm_xargs": {"simulate": pace}}
        bodies[f"c{number}"] = json.dumps(body)
    lines = (
        f'{{"custom_id": "{name}", "url": "/v1/chat/completions", "body": {body}}}'.encode()
        for name, body in bodies.items()
    )
    return Sent(client, client.submit_lines(lines).id, bodies, frozenset(list(bodies)[:killers]))


def verdict_name(number: int) -> str:
    return rpb.Verdict.Name(number).removeprefix("VERDICT_")


def action_name(number: int) -> str:
    return rpb.Action.Name(number).removeprefix("ACTION_")


def has_said(stack: FullStack, what: str) -> bool:
    """True if this holds for the heartbeat of the running process."""
    return bool(stack.sql(f"SELECT 1 FROM heartbeats WHERE pid = {stack.pid('worker')} AND {what}"))


def is_well(stack: FullStack, client: Client) -> bool:
    """True if the worker is healthy, no restart is open, and new work is accepted."""
    try:
        both = [stack.status("worker"), stack.status("gateway")]
        are_healthy = all(one.verdict == rpb.VERDICT_HEALTHY and not one.HasField("intent") for one in both)
        return are_healthy and not client.accepting()
    except (grpc.RpcError, ValueError):
        return False


def bring_about(stack: FullStack, tenants: list[Client], situation: str) -> list[Sent]:
    """Brings the stack into a situation, with unfinished work of each tenant in all but `idle`."""

    def submit_each(count: int, simulate: float) -> list[Sent]:
        return [submit(client, count, simulate) for client in tenants]

    if situation == IDLE:
        sent = submit_each(WINDOW // 2, 0)
        for each in sent:
            each.check()
    elif situation == SATURATED:
        sent = submit_each(3 * WINDOW, 0.25)
        until(lambda: sent[0].completed() > 0, "the first results")
    elif situation == STARTING:
        sent = submit_each(2 * WINDOW, 0.5)
        stack.supervisor.stop("worker")
        until(lambda: stack.supervisor.info("worker").state is State.STOPPED, "the worker to stop")
        stack.supervisor.start("worker")
        until(lambda: has_said(stack, "phase = 'loading'"), "the worker to be loading")
    else:
        sent = submit_each(1, 3)
        until(lambda: has_said(stack, "(detail->>'in_engine')::int = 2"), "the requests to run")
        os.kill(stack.pid("worker"), signal.SIGTERM)
        until(lambda: has_said(stack, "phase = 'draining'"), "the worker to be draining")
    if situation != IDLE:
        assert all(each.completed() < len(each.bodies) for each in sent), "a batch was done before the fault"
    return sent


def check_cell(stack: FullStack, fault: str, situation: str, expected: Expected) -> None:
    """Causes the fault, waits for what must follow, repairs what an operator would, and checks the result."""
    with ExitStack() as opened:
        tenants = [
            opened.enter_context(Client(stack.target, patience_s=90, token=token)) for token in stack.tokens.values()
        ]
        client = tenants[0]
        until(lambda: is_well(stack, client), "the stack to be healthy")
        before, noted = len(stack.restarts()), len(stack.audit())
        sent = bring_about(stack, tenants, situation)
        end_of_log = stack.mark("watchdog")
        mend = None
        if fault == "poison":
            sent.append(submit(client, WINDOW, 0.05, killers=1))
        else:
            mend = Faults(stack, random.Random(0)).strike(fault)
        try:
            until(told(stack, end_of_log, expected), f"{expected.verdict} to be reported")
            check_held(stack, expected)
        finally:
            if mend is not None:
                mend()
        until(lambda: is_well(stack, client), "the stack to be healthy again")
        # It also works.
        sent.append(submit(client, WINDOW, 0))
        for each in sent:
            each.check()
    # What was done while Postgres was away may be written a little later.
    until(lambda: len(stack.restarts()) >= before + len(expected.restarts), f"{len(expected.restarts)} restarts")
    restarts = stack.restarts()[before:]
    verdicts = [verdict_name(event.verdict) for event in restarts]
    assert len(verdicts) == len(expected.restarts), (verdicts, [event.reason for event in restarts])
    for verdict, wanted in zip(verdicts, expected.restarts, strict=True):
        assert verdict in wanted.split("|")
    # A restart whose worker dies before it is seen healthy has failed; the last one has not.
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
    """A condition: the watchdog has reported the expected verdict since a mark in its log, or reports it now."""
    verdicts, actions = expected.verdict.split("|"), expected.action.split("|")

    def is_told() -> bool:
        for event in stack.events("watchdog", "verdict_changed", since):
            if event["worker_id"].endswith(":gateway") is not expected.is_of_gateway:
                continue
            if event["verdict"] in verdicts and event["action"] in actions:
                return True
        try:
            status = stack.status("gateway" if expected.is_of_gateway else "worker")
        except (grpc.RpcError, ValueError):
            return False
        return verdict_name(status.verdict) in verdicts and action_name(status.action) in actions

    return is_told


def check_held(stack: FullStack, expected: Expected) -> None:
    """Checks that a verdict that holds lasts over several checks of the watchdog."""
    if expected.action != "HOLD" or expected.restarts or "HEALTHY" in expected.verdict:
        return
    looks: set[int] = set()

    def looked() -> bool:
        status = stack.status("gateway" if expected.is_of_gateway else "worker")
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
        stack.require_tokens("alpha", "beta")
        stack.start_all()
        yield stack


# Two classes, which run in parallel.
class TestChanging:
    """Faults of a worker that is starting or draining."""

    @pytest.mark.parametrize(("fault", "situation", "expected"), cells(STARTING, DRAINING))
    def test_cell(self, stack: FullStack, fault: str, situation: str, expected: Expected) -> None:
        """A fault while the worker starts or drains gives the right verdict, the expected restarts, and no loss."""
        check_cell(stack, fault, situation, expected)


class TestReady:
    """Faults of a worker that is ready."""

    @pytest.mark.parametrize(("fault", "situation", "expected"), cells(IDLE, SATURATED))
    def test_cell(self, stack: FullStack, fault: str, situation: str, expected: Expected) -> None:
        """A fault of an idle or saturated worker gives the right verdict, the expected restarts, and no loss."""
        check_cell(stack, fault, situation, expected)


def test_table_is_complete() -> None:
    """CI's selection has every fault, every situation several times, and only cells that exist."""
    assert {fault for fault, _ in IN_CI} == TABLE.keys()
    for situation in (STARTING, IDLE, SATURATED, DRAINING):
        assert sum(where == situation for _, where in IN_CI) >= 3
    assert all(isinstance(TABLE[fault][situation], Expected) for fault, situation in IN_CI)
