"""RecoveryService: what the watchdog sees, decided and did; and operators' orders."""

import asyncio
from collections.abc import Iterable
from datetime import datetime, timedelta
from json import dumps

import grpc

from service.db import recoveries
from service.db.connection import Database
from service.db.recoveries import Event
from service.db.recovery_orders import MAX_PAUSE
from service.errors import ApiError, Violation, database_unavailable, invalid, not_found
from service.rpc import call_context, pages
from service.rpc.handlers import Context
from service.rpc.times import duration, timestamp
from vllm_batch.v1 import recovery_service_pb2 as pb
from vllm_batch.v1 import recovery_service_pb2_grpc
from watchdog.guard import Guard, Snapshot
from watchdog.host import Host
from watchdog.policy import Verdict
from watchdog.record.audit_log import UnrecordedError


class RecoveryServicer(recovery_service_pb2_grpc.RecoveryServiceServicer):
    """Answers from the guards' last snapshots and from the audit log."""

    def __init__(self, workers: Host, servers: Host, database: Database, max_restarts_per_hour: int) -> None:
        self._workers = workers
        self._servers = servers
        self._database = database
        self._max_restarts_per_hour = max_restarts_per_hour

    async def GetStatus(self, request: pb.GetStatusRequest, context: Context) -> pb.GetStatusResponse:
        """Returns the last observation and decision for each worker and server."""

        def of(host: Host) -> list[pb.WorkerStatus]:
            limit = self._max_restarts_per_hour
            return [status_message(name, guard.snapshot, limit) for name, guard in sorted(host.by_worker.items())]

        return pb.GetStatusResponse(workers=of(self._workers), gateways=of(self._servers))

    async def ListEvents(self, request: pb.ListEventsRequest, context: Context) -> pb.ListEventsResponse:
        """Lists the audit log, newest first."""
        size = pages.size(request.page_size)
        before = pages.position(request.page_token, "events", "page_token")
        if "\0" in request.worker_id:
            raise invalid([Violation("worker_id", "must not contain NUL")])
        page = await self._database.read(recoveries.list_page, request.worker_id or None, before, size + 1)
        more = len(page) > size
        return pb.ListEventsResponse(
            events=[event_message(event) for event in page[:size]],
            next_page_token=pages.token("events", page[size - 1].id) if more else "",
        )

    async def PauseRecovery(self, request: pb.PauseRecoveryRequest, context: Context) -> pb.PauseRecoveryResponse:
        """Pauses recovery of one worker or gateway, or of all."""
        violations = []
        # Seconds of a message may be more than a timedelta holds.
        lasts_s = request.duration.seconds + request.duration.nanos / 1e9
        if not 0 < lasts_s <= MAX_PAUSE.total_seconds():
            hours = MAX_PAUSE // timedelta(hours=1)
            violations.append(Violation("duration", f"must be more than 0 and at most {hours} hours"))
        violations += _wrong_reason(request.reason)
        if violations:
            raise invalid(violations)
        by = call_context.current().caller.name
        reason = f"{request.reason} ({by})" if by else request.reason
        end_time = await self._order(request.worker_id, "paused", reason, lasts_s)
        return pb.PauseRecoveryResponse(end_time=timestamp(end_time))

    async def ResumeRecovery(self, request: pb.ResumeRecoveryRequest, context: Context) -> pb.ResumeRecoveryResponse:
        """Ends a pause for one worker or gateway, or for all."""
        await self._order(request.worker_id, "resumed", "resumed by an operator")
        return pb.ResumeRecoveryResponse()

    async def ResetBudget(self, request: pb.ResetBudgetRequest, context: Context) -> pb.ResetBudgetResponse:
        """Resets the restart budget of one worker or gateway, or of all."""
        if violations := _wrong_reason(request.reason):
            raise invalid(violations)
        await self._order(request.worker_id, "budget_reset", request.reason)
        return pb.ResetBudgetResponse()

    async def _order(self, worker_id: str, kind: str, reason: str, lasts_s: float = 0) -> datetime | None:
        """Records an order for one worker or gateway, or for all. Returns when the last of them ends."""
        guards = {**self._workers.by_worker, **self._servers.by_worker}
        if worker_id and worker_id not in guards:
            raise not_found(f"worker {worker_id[:100]!r}")
        chosen = [guards[worker_id]] if worker_id else list(guards.values())
        if not chosen:
            raise ApiError(grpc.StatusCode.UNAVAILABLE, "the watchdog has not found any worker yet", retry_delay_s=5)
        try:
            # One call for all: a client that disconnects does not cut the order short.
            return await asyncio.to_thread(_order_each, chosen, kind, reason, lasts_s)
        except UnrecordedError as error:
            raise database_unavailable(str(error)) from error


def _wrong_reason(reason: str) -> list[Violation]:
    # Postgres refuses NUL, so such an order would stay in the journal for ever and block the guard.
    return [] if reason and "\0" not in reason else [Violation("reason", "is required and must not contain NUL")]


def _order_each(guards: Iterable[Guard], kind: str, reason: str, lasts_s: float) -> datetime | None:
    end_time = None
    for guard in guards:
        end_time = guard.order(kind, reason, lasts_s)
    return end_time


def status_message(worker_id: str, snapshot: Snapshot | None, limit: int) -> pb.WorkerStatus:
    """Converts a guard's snapshot to its message; `limit` is the restart budget."""
    if snapshot is None:
        return pb.WorkerStatus(worker_id=worker_id, reason="not checked yet", budget_limit=limit)
    evidence, decision = snapshot.evidence, snapshot.decision
    process, heartbeat, history = evidence.process, evidence.heartbeat, snapshot.history
    # A worker that serves may not have written its next heartbeat yet, the one without the cause of its last start.
    failed = heartbeat if decision.verdict != Verdict.HEALTHY else None
    return pb.WorkerStatus(
        worker_id=worker_id,
        verdict=f"VERDICT_{decision.verdict}",
        action=f"ACTION_{decision.action}",
        reason=decision.reason,
        process_state=process.state if process else "",
        pid=process.pid if process else 0,
        health=evidence.health,
        heartbeat_age=duration(heartbeat.age_s) if heartbeat else None,
        phase=heartbeat.phase if heartbeat else "",
        incarnation=heartbeat.incarnation if heartbeat else "",
        verdict_time=timestamp(snapshot.verdict_time),
        observe_time=timestamp(snapshot.observe_time),
        budget_left=snapshot.budget_left,
        budget_limit=limit,
        intent=event_message(snapshot.intent) if snapshot.intent else None,
        pause_end_time=timestamp(history.pause_end_time) if evidence.pause_left_s else None,
        pause_reason=history.pause_reason if evidence.pause_left_s else "",
        gave_up=snapshot.gave_up,
        cause=failed.cause if failed else "",
        advice=failed.advice if failed else "",
    )


def event_message(event: Event) -> pb.RecoveryEvent:
    """Converts an event to its message."""
    timings = [pb.PhaseTiming(phase=phase, duration=duration(time_s)) for phase, time_s in event.timings.items()]
    return pb.RecoveryEvent(
        id=event.id,
        worker_id=event.worker_id,
        kind=event.kind,
        verdict=f"VERDICT_{event.verdict}" if event.verdict else None,
        reason=event.reason,
        evidence_json=dumps(event.evidence),
        outcome=event.outcome,
        timings=timings,
        start_time=timestamp(event.start_time),
        end_time=timestamp(event.end_time),
        old_incarnation=str(event.old_incarnation or ""),
        new_incarnation=str(event.new_incarnation or ""),
    )
