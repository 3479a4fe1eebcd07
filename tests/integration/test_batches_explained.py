"""A batch says when it will end, or why it does not move, while real workers do what the reasons are about."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from uuid import uuid4

import grpc
import psutil
import pytest

from service.db import recoveries
from service.db.connection import Database
from service.db.recoveries import Event
from tests.support.batches import count, finished, line, lines
from tests.support.servers import Server, Stack
from tests.support.waiting import until
from vllm_batch import CallError, Client
from vllm_batch.v1 import batch_service_pb2 as pb

# What the contract promises, and the start of a process on a busy machine.
WITHIN_S = 15.0


class Watched:
    """What WatchBatch has sent of a batch."""

    def __init__(self, client: Client, batch_id: str) -> None:
        self.sent: list[pb.Batch] = []
        self._client, self._batch_id = client, batch_id
        threading.Thread(target=self._follow, daemon=True).start()

    def _follow(self) -> None:
        # Until the test closes the client.
        with contextlib.suppress(CallError, ValueError, grpc.RpcError):
            for batch in self._client.watch(self._batch_id):
                self.sent.append(batch)

    def until(self, reason: str, timeout_s: float = WITHIN_S) -> pb.Wait:
        """What it says of a reason, which it has to send though nothing moves."""

        def last() -> pb.Wait | None:
            wait = self.sent[-1].wait if self.sent else pb.Wait()
            return wait if pb.WaitReason.Name(wait.reason) == f"WAIT_REASON_{reason}" else None

        return until(last, f"{reason}, after {[each.wait for each in self.sent[-3:]]}", timeout_s)


def engine_of(worker: Server) -> psutil.Process:
    [engine] = psutil.Process(worker.process.pid).children()
    return engine


@pytest.fixture
def watching(stack: Stack) -> Iterator[Client]:
    """A client that goes on when a call fails."""
    with Client(stack.target, patience_s=60) as client:
        yield client


def note(stack: Stack, worker_id: str, kind: str, reason: str, lasts: timedelta = timedelta()) -> None:
    """Writes to the audit log as the watchdog does."""
    now = datetime.now(UTC)
    event = Event(*(0, uuid4(), worker_id, kind, "", reason, {}, "", "", {}, now, now + lasts, None, None))
    database = Database(stack.database_url, "test")
    database.call(recoveries.put, event)
    database.close()


def test_whatever_happens_to_its_worker_is_said(stack: Stack, watching: Client) -> None:
    """Behind another batch, with its engine frozen, its worker killed, paused, given up, loading and of another model:
    each is said by its code within seconds, to who watches, and by GetBatch and ListBatches alike."""
    stack.gateway()
    worker = stack.worker(simulated_window=8, window=32)
    stack.wait_until_accepting()
    running = watching.submit_lines(lines(300, vllm_xargs={"simulate": 30}), priority=1)
    waiting = watching.submit_lines(lines(300))
    moves = until(lambda: (found := watching.get(running.id)).counts.running and found, "the first batch to run")
    assert not moves.HasField("wait")
    first, second = Watched(watching, running.id), Watched(watching, waiting.id)
    turn = second.until("TURN")
    assert "requests of other batches that workers run now" in turn.message
    assert "priority" in turn.advice

    engine_of(worker).send_signal(signal.SIGSTOP)
    assert "makes no progress" in first.until("ENGINE_STALLED").message
    second.until("ENGINE_STALLED")

    engine = engine_of(worker)
    worker.kill()
    engine.kill()
    offline = first.until("WORKER_OFFLINE")
    assert "last seen" in offline.message
    assert "supervisorctl start" in offline.advice
    [worker_id] = {event["worker_id"] for event in stack.servers[0].events("worker_phase")}

    note(stack, str(worker_id), "paused", "driver upgrade (ann)", timedelta(minutes=30))
    paused = second.until("RECOVERY_PAUSED")
    assert "UTC: driver upgrade (ann)" in paused.message
    assert "vllm-batch recovery resume" in paused.advice
    first.until("RECOVERY_PAUSED")
    note(stack, str(worker_id), "resumed", "resumed by an operator")
    second.until("WORKER_OFFLINE")

    note(stack, str(worker_id), "gave_up", "budget exhausted")
    assert "vllm-batch recovery reset" in second.until("RECOVERY_GAVE_UP").advice

    loading = stack.worker(simulated_load_s=600)
    assert "loading its model for" in second.until("WORKER_LOADING", WITHIN_S + 15).message
    first.until("WORKER_LOADING")
    loading.kill()

    stack.worker(model="other")
    unserved = second.until("NO_WORKER_OF_MODEL", WITHIN_S + 15)
    assert unserved.message == "no worker serves the model tiny; models served: other"
    for found in (watching.get(waiting.id), *watching.list(limit=1)):
        assert found.wait == unserved
        assert not found.HasField("estimated_end_time")


def test_suspects_that_run_alone_are_said_of_all_that_wait_for_them(stack: Stack, watching: Client) -> None:
    """The batch of the suspect says that it runs alone, and another that it waits for that."""
    stack.gateway()
    worker = stack.worker()
    stack.wait_until_accepting()
    suspect = watching.submit_lines([line("s", vllm_xargs={"simulate": 25})])
    for deaths in range(2):
        held = f"chunks WHERE state = 'leased' AND deaths = {deaths}"
        until(lambda held=held: count(stack, held), "the request to run")  # type: ignore[misc]
        worker.kill()
        worker.start()
        stack.wait_until_accepting()
    other = Watched(watching, watching.submit_lines(lines(3)).id)
    alone = Watched(watching, suspect.id).until("SUSPECTS_ALONE")
    assert "1 request of it" in alone.message
    assert "runs requests of others" in other.until("SUSPECTS_ALONE").message


def test_the_end_is_estimated(stack: Stack, watching: Client) -> None:
    """From 2 % on who watches gets an end that is yet to come; before that, and once the batch has ended, none."""
    stack.gateway()
    stack.worker(simulated_window=8, window=16)
    stack.wait_until_accepting()
    batch = watching.submit_lines(lines(400, vllm_xargs={"simulate": 0.1}))
    watched = Watched(watching, batch.id)
    done = finished(watching, batch.id)
    assert not done.HasField("estimated_end_time")
    assert not done.counts.running
    until(lambda: watched.sent[-1].HasField("end_time"), "the last message")
    estimated = [each for each in watched.sent if each.HasField("estimated_end_time")]
    assert estimated
    for each in estimated:
        # How good it is, benchmarks/claims/estimate.py measures.
        assert each.counts.completed >= 0.02 * each.counts.total
        assert each.estimated_end_time.ToDatetime() > each.start_time.ToDatetime()
        assert not each.HasField("wait")
