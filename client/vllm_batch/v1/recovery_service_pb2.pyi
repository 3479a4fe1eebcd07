import datetime

from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Verdict(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    VERDICT_UNSPECIFIED: _ClassVar[Verdict]
    VERDICT_HEALTHY: _ClassVar[Verdict]
    VERDICT_SUPERVISOR_AWAY: _ClassVar[Verdict]
    VERDICT_PAUSED: _ClassVar[Verdict]
    VERDICT_INTERRUPTED: _ClassVar[Verdict]
    VERDICT_OPERATOR_STOP: _ClassVar[Verdict]
    VERDICT_CRASHED: _ClassVar[Verdict]
    VERDICT_STARTING: _ClassVar[Verdict]
    VERDICT_START_TIMEOUT: _ClassVar[Verdict]
    VERDICT_DATABASE_AWAY: _ClassVar[Verdict]
    VERDICT_HEARTBEAT_LOST: _ClassVar[Verdict]
    VERDICT_DRAINING: _ClassVar[Verdict]
    VERDICT_ENGINE_STALLED: _ClassVar[Verdict]
    VERDICT_ENGINE_DEAD: _ClassVar[Verdict]
    VERDICT_RPC_WEDGED: _ClassVar[Verdict]
    VERDICT_FROZEN: _ClassVar[Verdict]
    VERDICT_NOT_READY: _ClassVar[Verdict]
    VERDICT_TRANSITION: _ClassVar[Verdict]
    VERDICT_START_FAILED: _ClassVar[Verdict]
    VERDICT_NAME_TAKEN: _ClassVar[Verdict]

class Action(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ACTION_UNSPECIFIED: _ClassVar[Action]
    ACTION_HOLD: _ClassVar[Action]
    ACTION_CONFIRM: _ClassVar[Action]
    ACTION_BACK_OFF: _ClassVar[Action]
    ACTION_RESTART: _ClassVar[Action]
    ACTION_GIVE_UP: _ClassVar[Action]
VERDICT_UNSPECIFIED: Verdict
VERDICT_HEALTHY: Verdict
VERDICT_SUPERVISOR_AWAY: Verdict
VERDICT_PAUSED: Verdict
VERDICT_INTERRUPTED: Verdict
VERDICT_OPERATOR_STOP: Verdict
VERDICT_CRASHED: Verdict
VERDICT_STARTING: Verdict
VERDICT_START_TIMEOUT: Verdict
VERDICT_DATABASE_AWAY: Verdict
VERDICT_HEARTBEAT_LOST: Verdict
VERDICT_DRAINING: Verdict
VERDICT_ENGINE_STALLED: Verdict
VERDICT_ENGINE_DEAD: Verdict
VERDICT_RPC_WEDGED: Verdict
VERDICT_FROZEN: Verdict
VERDICT_NOT_READY: Verdict
VERDICT_TRANSITION: Verdict
VERDICT_START_FAILED: Verdict
VERDICT_NAME_TAKEN: Verdict
ACTION_UNSPECIFIED: Action
ACTION_HOLD: Action
ACTION_CONFIRM: Action
ACTION_BACK_OFF: Action
ACTION_RESTART: Action
ACTION_GIVE_UP: Action

class WorkerStatus(_message.Message):
    __slots__ = ("worker_id", "verdict", "action", "reason", "process_state", "pid", "health", "heartbeat_age", "phase", "incarnation", "verdict_time", "observe_time", "budget_left", "budget_limit", "intent", "pause_end_time", "pause_reason", "gave_up", "cause", "advice")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    VERDICT_FIELD_NUMBER: _ClassVar[int]
    ACTION_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    PROCESS_STATE_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    HEALTH_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_AGE_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    VERDICT_TIME_FIELD_NUMBER: _ClassVar[int]
    OBSERVE_TIME_FIELD_NUMBER: _ClassVar[int]
    BUDGET_LEFT_FIELD_NUMBER: _ClassVar[int]
    BUDGET_LIMIT_FIELD_NUMBER: _ClassVar[int]
    INTENT_FIELD_NUMBER: _ClassVar[int]
    PAUSE_END_TIME_FIELD_NUMBER: _ClassVar[int]
    PAUSE_REASON_FIELD_NUMBER: _ClassVar[int]
    GAVE_UP_FIELD_NUMBER: _ClassVar[int]
    CAUSE_FIELD_NUMBER: _ClassVar[int]
    ADVICE_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    verdict: Verdict
    action: Action
    reason: str
    process_state: str
    pid: int
    health: str
    heartbeat_age: _duration_pb2.Duration
    phase: str
    incarnation: str
    verdict_time: _timestamp_pb2.Timestamp
    observe_time: _timestamp_pb2.Timestamp
    budget_left: int
    budget_limit: int
    intent: RecoveryEvent
    pause_end_time: _timestamp_pb2.Timestamp
    pause_reason: str
    gave_up: bool
    cause: str
    advice: str
    def __init__(self, worker_id: _Optional[str] = ..., verdict: _Optional[_Union[Verdict, str]] = ..., action: _Optional[_Union[Action, str]] = ..., reason: _Optional[str] = ..., process_state: _Optional[str] = ..., pid: _Optional[int] = ..., health: _Optional[str] = ..., heartbeat_age: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., phase: _Optional[str] = ..., incarnation: _Optional[str] = ..., verdict_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., observe_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., budget_left: _Optional[int] = ..., budget_limit: _Optional[int] = ..., intent: _Optional[_Union[RecoveryEvent, _Mapping]] = ..., pause_end_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., pause_reason: _Optional[str] = ..., gave_up: _Optional[bool] = ..., cause: _Optional[str] = ..., advice: _Optional[str] = ...) -> None: ...

class PhaseTiming(_message.Message):
    __slots__ = ("phase", "duration")
    PHASE_FIELD_NUMBER: _ClassVar[int]
    DURATION_FIELD_NUMBER: _ClassVar[int]
    phase: str
    duration: _duration_pb2.Duration
    def __init__(self, phase: _Optional[str] = ..., duration: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class RecoveryEvent(_message.Message):
    __slots__ = ("id", "worker_id", "kind", "verdict", "reason", "evidence_json", "outcome", "timings", "start_time", "end_time", "old_incarnation", "new_incarnation")
    ID_FIELD_NUMBER: _ClassVar[int]
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    VERDICT_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    EVIDENCE_JSON_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    START_TIME_FIELD_NUMBER: _ClassVar[int]
    END_TIME_FIELD_NUMBER: _ClassVar[int]
    OLD_INCARNATION_FIELD_NUMBER: _ClassVar[int]
    NEW_INCARNATION_FIELD_NUMBER: _ClassVar[int]
    id: int
    worker_id: str
    kind: str
    verdict: Verdict
    reason: str
    evidence_json: str
    outcome: str
    timings: _containers.RepeatedCompositeFieldContainer[PhaseTiming]
    start_time: _timestamp_pb2.Timestamp
    end_time: _timestamp_pb2.Timestamp
    old_incarnation: str
    new_incarnation: str
    def __init__(self, id: _Optional[int] = ..., worker_id: _Optional[str] = ..., kind: _Optional[str] = ..., verdict: _Optional[_Union[Verdict, str]] = ..., reason: _Optional[str] = ..., evidence_json: _Optional[str] = ..., outcome: _Optional[str] = ..., timings: _Optional[_Iterable[_Union[PhaseTiming, _Mapping]]] = ..., start_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., end_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., old_incarnation: _Optional[str] = ..., new_incarnation: _Optional[str] = ...) -> None: ...

class GetStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetStatusResponse(_message.Message):
    __slots__ = ("workers", "gateways")
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    GATEWAYS_FIELD_NUMBER: _ClassVar[int]
    workers: _containers.RepeatedCompositeFieldContainer[WorkerStatus]
    gateways: _containers.RepeatedCompositeFieldContainer[WorkerStatus]
    def __init__(self, workers: _Optional[_Iterable[_Union[WorkerStatus, _Mapping]]] = ..., gateways: _Optional[_Iterable[_Union[WorkerStatus, _Mapping]]] = ...) -> None: ...

class ListEventsRequest(_message.Message):
    __slots__ = ("page_size", "page_token", "worker_id")
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    page_size: int
    page_token: str
    worker_id: str
    def __init__(self, page_size: _Optional[int] = ..., page_token: _Optional[str] = ..., worker_id: _Optional[str] = ...) -> None: ...

class ListEventsResponse(_message.Message):
    __slots__ = ("events", "next_page_token")
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    events: _containers.RepeatedCompositeFieldContainer[RecoveryEvent]
    next_page_token: str
    def __init__(self, events: _Optional[_Iterable[_Union[RecoveryEvent, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class PauseRecoveryRequest(_message.Message):
    __slots__ = ("duration", "reason", "worker_id")
    DURATION_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    duration: _duration_pb2.Duration
    reason: str
    worker_id: str
    def __init__(self, duration: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., reason: _Optional[str] = ..., worker_id: _Optional[str] = ...) -> None: ...

class PauseRecoveryResponse(_message.Message):
    __slots__ = ("end_time",)
    END_TIME_FIELD_NUMBER: _ClassVar[int]
    end_time: _timestamp_pb2.Timestamp
    def __init__(self, end_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...

class ResumeRecoveryRequest(_message.Message):
    __slots__ = ("worker_id",)
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    def __init__(self, worker_id: _Optional[str] = ...) -> None: ...

class ResumeRecoveryResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ResetBudgetRequest(_message.Message):
    __slots__ = ("worker_id", "reason")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    reason: str
    def __init__(self, worker_id: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class ResetBudgetResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
