"""What `status` and `top` show: the answers of gateway and watchdog at one moment. Either may be down."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import grpc

from vllm_batch.client import Client
from vllm_batch.errors import CallError
from vllm_batch.v1 import batch_service_pb2 as pb
from vllm_batch.v1 import host_service_pb2 as hpb
from vllm_batch.v1 import recovery_service_pb2 as rpb
from vllm_batch.v1 import recovery_service_pb2_grpc

TIMEOUT_S = 10
RUNNING = ("BATCH_STATE_VALIDATING", "BATCH_STATE_IN_PROGRESS", "BATCH_STATE_FINALIZING", "BATCH_STATE_CANCELLING")


@dataclass(frozen=True)
class Gateway:
    """The gateway's answer. `failure`: why there is none; `refusal`: why new work is not accepted, empty when it is."""

    failure: str = ""
    refusal: str = ""
    # Running ones first, then ended ones; each newest first.
    batches: Sequence[pb.Batch] = field(default_factory=tuple)
    # Served now; none while new work is not accepted.
    models: Sequence[str] = field(default_factory=tuple)


@dataclass(frozen=True)
class Watchdog:
    """The watchdog's answer. `failure`: why there is none."""

    failure: str = ""
    workers: Sequence[rpb.WorkerStatus] = field(default_factory=tuple)
    # Newest first.
    restarts: Sequence[rpb.RecoveryEvent] = field(default_factory=tuple)


def ask_gateway(client: Client, limit: int) -> Gateway:
    """Whether new work is accepted; up to `limit` running batches, and as many of the newest."""
    try:
        running = list(client.list(RUNNING, limit))
        ids = {batch.id for batch in running}
        ended = [batch for batch in client.list(limit=limit) if batch.id not in ids]
        status = client.service_status()
    except CallError as error:
        return Gateway(failure=error.message)
    return Gateway(refusal=status.message, batches=running + ended, models=status.models)


def ask_hosts(client: Client) -> Sequence[hpb.Host]:
    """All hosts; none for callers that may not ask."""
    try:
        return list(client.hosts())
    except CallError:
        return ()


def ask_watchdog(channel: grpc.Channel) -> Watchdog:
    """All workers, and the restarts among the latest events."""
    stub = recovery_service_pb2_grpc.RecoveryServiceStub(channel)
    try:
        workers = stub.GetStatus(rpb.GetStatusRequest(), timeout=TIMEOUT_S).workers
        events = stub.ListEvents(rpb.ListEventsRequest(page_size=100), timeout=TIMEOUT_S).events
    except grpc.RpcError as error:
        return Watchdog(failure=CallError(error).message)
    return Watchdog("", workers, [event for event in events if event.kind == "restart"])
