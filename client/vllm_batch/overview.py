"""What an operator wants to see, as gateway and watchdog tell it at one moment; each of them may be down."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import grpc

from vllm_batch.calls import CallError
from vllm_batch.client import Client
from vllm_batch.v1 import batch_service_pb2 as pb
from vllm_batch.v1 import recovery_service_pb2 as rpb
from vllm_batch.v1 import recovery_service_pb2_grpc

TIMEOUT_S = 10
RUNNING = ("BATCH_STATE_VALIDATING", "BATCH_STATE_IN_PROGRESS", "BATCH_STATE_FINALIZING", "BATCH_STATE_CANCELLING")


@dataclass(frozen=True)
class Gateway:
    """What the gateway tells. `failure`: why it tells nothing; `refusal`: why it takes no new work. Empty: it does."""

    failure: str = ""
    refusal: str = ""
    # Those that run, then those that ended; each newest first.
    batches: Sequence[pb.Batch] = field(default_factory=tuple)


@dataclass(frozen=True)
class Watchdog:
    """What the watchdog tells. `failure`: why it tells nothing."""

    failure: str = ""
    workers: Sequence[rpb.WorkerStatus] = field(default_factory=tuple)
    # Newest first.
    restarts: Sequence[rpb.RecoveryEvent] = field(default_factory=tuple)


def ask_gateway(client: Client, limit: int) -> Gateway:
    """Up to `limit` batches that run and as many of the newest."""
    try:
        running = list(client.list(RUNNING, limit))
        ids = {batch.id for batch in running}
        ended = [batch for batch in client.list(limit=limit) if batch.id not in ids]
    except CallError as error:
        return Gateway(failure=error.message)
    return Gateway(refusal=client.accepting(), batches=running + ended)


def ask_watchdog(channel: grpc.Channel) -> Watchdog:
    """All workers, and the restarts among the last events."""
    stub = recovery_service_pb2_grpc.RecoveryServiceStub(channel)
    try:
        workers = stub.GetStatus(rpb.GetStatusRequest(), timeout=TIMEOUT_S).workers
        events = stub.ListEvents(rpb.ListEventsRequest(page_size=100), timeout=TIMEOUT_S).events
    except grpc.RpcError as error:
        return Watchdog(failure=CallError(error).message)
    return Watchdog("", workers, [event for event in events if event.kind == "restart"])
