"""RecoveryService: what the watchdog sees, decided and did; and a person's orders to it."""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from functools import wraps
from json import dumps
from typing import TypeVar

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from service import logs, ports
from service.access import Access
from service.config import Settings
from service.db import recoveries
from service.db.connection import Database
from service.db.recoveries import Event
from service.errors import ApiError, Violation, database_unavailable, invalid, not_found
from vllm_batch.v1 import recovery_service_pb2 as pb
from vllm_batch.v1 import recovery_service_pb2_grpc
from watchdog.access import AccessInterceptor
from watchdog.calls import CallInterceptor
from watchdog.guard import Guard, Snapshot
from watchdog.guards import Guards
from watchdog.record import AWAY, UnrecordedError

SERVICE = "vllm_batch.v1.RecoveryService"
THREADS = 8
DEFAULT_PAGE_SIZE = 50
MAX_PAGE_SIZE = 1000
MAX_PAUSE = timedelta(hours=24)

Context = grpc.ServicerContext
Request = TypeVar("Request")
Response = TypeVar("Response")

log = logs.get("recovery")


def _with_errors(
    method: Callable[["RecoveryServicer", Request, Context], Response],
) -> Callable[["RecoveryServicer", Request, Context], Response]:
    """Ends a call that raised with the code and details of its error."""

    @wraps(method)
    def call(self: "RecoveryServicer", request: Request, context: Context) -> Response:
        try:
            return method(self, request, context)
        except (*AWAY, UnrecordedError) as error:
            failure = database_unavailable(str(error).strip() or type(error).__name__)
        except ApiError as error:
            failure = error
        except Exception as error:
            log.exception("call_failed", method=method.__name__)
            failure = ApiError(grpc.StatusCode.INTERNAL, f"{method.__name__} failed: {type(error).__name__}")
        context.set_trailing_metadata(failure.trailing_metadata)
        context.abort(failure.code, failure.message)
        raise AssertionError("abort raises")

    return call


class RecoveryServicer(recovery_service_pb2_grpc.RecoveryServiceServicer):
    """Answers from what the guards saw last, and from the audit log."""

    def __init__(self, guards: Guards, database: Database) -> None:
        self._guards = guards
        self._database = database

    @_with_errors
    def GetStatus(self, request: pb.GetStatusRequest, context: Context) -> pb.GetStatusResponse:
        """Returns what was seen and decided last for each worker."""
        limit = self._guards.limits.max_restarts_per_hour
        guards = sorted(self._guards.by_worker.items())
        return pb.GetStatusResponse(workers=[_status(worker_id, guard.snapshot, limit) for worker_id, guard in guards])

    @_with_errors
    def ListEvents(self, request: pb.ListEventsRequest, context: Context) -> pb.ListEventsResponse:
        """Lists the audit log, newest first."""
        size = request.page_size or DEFAULT_PAGE_SIZE
        if not 1 <= size <= MAX_PAGE_SIZE:
            raise invalid([Violation("page_size", f"must be 1 to {MAX_PAGE_SIZE}")])
        before = None
        if request.page_token:
            if not request.page_token.isascii() or not request.page_token.isdigit() or len(request.page_token) > 18:
                raise invalid([Violation("page_token", "is not a token that this call has given")])
            before = int(request.page_token)
        events = self._database.call(recoveries.list_page, request.worker_id or None, before, size + 1)
        has_more = len(events) > size
        page = events[:size]
        token = str(page[-1].id) if has_more else ""
        return pb.ListEventsResponse(events=[event_message(event) for event in page], next_page_token=token)

    @_with_errors
    def PauseRecovery(self, request: pb.PauseRecoveryRequest, context: Context) -> pb.PauseRecoveryResponse:
        """Writes a pause for the workers named, and has their guards take note."""
        violations = []
        duration = request.duration.ToTimedelta()
        if not timedelta(0) < duration <= MAX_PAUSE:
            violations.append(Violation("duration", "must be more than 0 and at most 24 hours"))
        if not request.reason:
            violations.append(Violation("reason", "is required"))
        if violations:
            raise invalid(violations)
        return pb.PauseRecoveryResponse(
            end_time=_timestamp(self._order(request.worker_id, "paused", request.reason, duration.total_seconds()))
        )

    @_with_errors
    def ResumeRecovery(self, request: pb.ResumeRecoveryRequest, context: Context) -> pb.ResumeRecoveryResponse:
        """Writes the end of a pause, and has the guards take note."""
        self._order(request.worker_id, "resumed", "resumed by a person")
        return pb.ResumeRecoveryResponse()

    @_with_errors
    def ResetBudget(self, request: pb.ResetBudgetRequest, context: Context) -> pb.ResetBudgetResponse:
        """Writes that the budget is given back, and has the guards take note."""
        if not request.reason:
            raise invalid([Violation("reason", "is required")])
        self._order(request.worker_id, "budget_reset", request.reason)
        return pb.ResetBudgetResponse()

    def _order(self, worker_id: str, kind: str, reason: str, lasts_s: float = 0) -> datetime | None:
        """Writes an order for one worker, or for all. Returns when the last of them ends."""
        guards = self._guards.by_worker
        if worker_id and worker_id not in guards:
            raise not_found(f"worker {worker_id!r}")
        chosen: Mapping[str, Guard] = {worker_id: guards[worker_id]} if worker_id else guards
        if not chosen:
            raise ApiError(grpc.StatusCode.UNAVAILABLE, "no worker has been found yet", retry_delay_s=5)
        end_time = None
        for guard in chosen.values():
            end_time = guard.order(kind, reason, lasts_s)
        return end_time


class Server:
    """The watchdog's port: RecoveryService, health and reflection. Health says NOT_SERVING until told otherwise."""

    def __init__(self, settings: Settings, servicer: RecoveryServicer, access: Access) -> None:
        """Raises RuntimeError when the port cannot be had."""
        self._health = health.HealthServicer(experimental_thread_pool=ThreadPoolExecutor(THREADS))
        self.set_serving(False)
        self._server = grpc.server(
            ThreadPoolExecutor(THREADS, thread_name_prefix="rpc"),
            interceptors=[CallInterceptor(), AccessInterceptor(access)],
            options=ports.OPTIONS,
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        recovery_service_pb2_grpc.add_RecoveryServiceServicer_to_server(servicer, self._server)
        if settings.reflection:
            reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server)
        self.port = ports.open(self._server, settings, settings.watchdog_port)
        self._server.start()

    def set_serving(self, is_serving: bool) -> None:
        """Says in health whether recovery is at work."""
        status = health_pb2.HealthCheckResponse.SERVING if is_serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in ("", SERVICE):
            self._health.set(name, status)

    def stop(self) -> None:
        """Closes the port; calls that are under way are cut off."""
        self._server.stop(grace=None)


def _status(worker_id: str, snapshot: Snapshot | None, limit: int) -> pb.WorkerStatus:
    if snapshot is None:
        return pb.WorkerStatus(worker_id=worker_id, reason="not looked at yet", budget_limit=limit)
    evidence, decision = snapshot.evidence, snapshot.decision
    process, heartbeat, past = evidence.process, evidence.heartbeat, snapshot.past
    return pb.WorkerStatus(
        worker_id=worker_id,
        verdict=f"VERDICT_{decision.verdict}",
        action=f"ACTION_{decision.action}",
        reason=decision.reason,
        process_state=process.state if process else "",
        pid=process.pid if process else 0,
        health=evidence.health,
        heartbeat_age=_duration(heartbeat.age_s) if heartbeat else None,
        phase=heartbeat.phase if heartbeat else "",
        incarnation=heartbeat.incarnation if heartbeat else "",
        verdict_time=_timestamp(snapshot.verdict_time),
        observe_time=_timestamp(snapshot.observe_time),
        budget_left=snapshot.budget_left,
        budget_limit=limit,
        intent=event_message(snapshot.intent) if snapshot.intent else None,
        pause_end_time=_timestamp(past.pause_end_time) if evidence.pause_left_s else None,
        pause_reason=past.pause_reason if evidence.pause_left_s else "",
        gave_up=snapshot.gave_up,
    )


def event_message(event: Event) -> pb.RecoveryEvent:
    """An event as clients get it."""
    timings = [pb.PhaseTiming(phase=phase, duration=_duration(time_s)) for phase, time_s in event.timings.items()]
    return pb.RecoveryEvent(
        id=event.id,
        worker_id=event.worker_id,
        kind=event.kind,
        verdict=f"VERDICT_{event.verdict}" if event.verdict else None,
        reason=event.reason,
        evidence_json=dumps(event.evidence),
        outcome=event.outcome,
        timings=timings,
        start_time=_timestamp(event.start_time),
        end_time=_timestamp(event.end_time),
        old_incarnation=str(event.old_incarnation or ""),
        new_incarnation=str(event.new_incarnation or ""),
    )


def _duration(time_s: float) -> Duration:
    duration = Duration()
    duration.FromMicroseconds(round(time_s * 1e6))
    return duration


def _timestamp(time: datetime | None) -> Timestamp | None:
    if time is None:
        return None
    message = Timestamp()
    message.FromDatetime(time)
    return message
