import datetime

from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class HostState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    HOST_STATE_UNSPECIFIED: _ClassVar[HostState]
    HOST_STATE_ALIVE: _ClassVar[HostState]
    HOST_STATE_STOPPED: _ClassVar[HostState]
    HOST_STATE_LOST: _ClassVar[HostState]
HOST_STATE_UNSPECIFIED: HostState
HOST_STATE_ALIVE: HostState
HOST_STATE_STOPPED: HostState
HOST_STATE_LOST: HostState

class Host(_message.Message):
    __slots__ = ("name", "state", "age", "programs", "workers", "gpus", "drain", "notes")
    NAME_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    AGE_FIELD_NUMBER: _ClassVar[int]
    PROGRAMS_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    GPUS_FIELD_NUMBER: _ClassVar[int]
    DRAIN_FIELD_NUMBER: _ClassVar[int]
    NOTES_FIELD_NUMBER: _ClassVar[int]
    name: str
    state: HostState
    age: _duration_pb2.Duration
    programs: _containers.RepeatedCompositeFieldContainer[HostProgram]
    workers: _containers.RepeatedCompositeFieldContainer[HostWorker]
    gpus: _containers.RepeatedCompositeFieldContainer[Gpu]
    drain: Drain
    notes: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, name: _Optional[str] = ..., state: _Optional[_Union[HostState, str]] = ..., age: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., programs: _Optional[_Iterable[_Union[HostProgram, _Mapping]]] = ..., workers: _Optional[_Iterable[_Union[HostWorker, _Mapping]]] = ..., gpus: _Optional[_Iterable[_Union[Gpu, _Mapping]]] = ..., drain: _Optional[_Union[Drain, _Mapping]] = ..., notes: _Optional[_Iterable[str]] = ...) -> None: ...

class HostProgram(_message.Message):
    __slots__ = ("name", "state", "is_alive", "address", "version", "schema_version", "age")
    NAME_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    IS_ALIVE_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    SCHEMA_VERSION_FIELD_NUMBER: _ClassVar[int]
    AGE_FIELD_NUMBER: _ClassVar[int]
    name: str
    state: str
    is_alive: bool
    address: str
    version: str
    schema_version: int
    age: _duration_pb2.Duration
    def __init__(self, name: _Optional[str] = ..., state: _Optional[str] = ..., is_alive: _Optional[bool] = ..., address: _Optional[str] = ..., version: _Optional[str] = ..., schema_version: _Optional[int] = ..., age: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class HostWorker(_message.Message):
    __slots__ = ("worker_id", "phase", "models", "requests_held", "verdict", "reason", "budget_left", "budget_limit", "gave_up", "cause")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    MODELS_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_HELD_FIELD_NUMBER: _ClassVar[int]
    VERDICT_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    BUDGET_LEFT_FIELD_NUMBER: _ClassVar[int]
    BUDGET_LIMIT_FIELD_NUMBER: _ClassVar[int]
    GAVE_UP_FIELD_NUMBER: _ClassVar[int]
    CAUSE_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    phase: str
    models: _containers.RepeatedScalarFieldContainer[str]
    requests_held: int
    verdict: str
    reason: str
    budget_left: int
    budget_limit: int
    gave_up: bool
    cause: str
    def __init__(self, worker_id: _Optional[str] = ..., phase: _Optional[str] = ..., models: _Optional[_Iterable[str]] = ..., requests_held: _Optional[int] = ..., verdict: _Optional[str] = ..., reason: _Optional[str] = ..., budget_left: _Optional[int] = ..., budget_limit: _Optional[int] = ..., gave_up: _Optional[bool] = ..., cause: _Optional[str] = ...) -> None: ...

class Gpu(_message.Message):
    __slots__ = ("name", "memory_bytes")
    NAME_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    name: str
    memory_bytes: int
    def __init__(self, name: _Optional[str] = ..., memory_bytes: _Optional[int] = ...) -> None: ...

class Drain(_message.Message):
    __slots__ = ("reason", "age", "is_complete", "held")
    REASON_FIELD_NUMBER: _ClassVar[int]
    AGE_FIELD_NUMBER: _ClassVar[int]
    IS_COMPLETE_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    reason: str
    age: _duration_pb2.Duration
    is_complete: bool
    held: int
    def __init__(self, reason: _Optional[str] = ..., age: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., is_complete: _Optional[bool] = ..., held: _Optional[int] = ...) -> None: ...

class ListHostsRequest(_message.Message):
    __slots__ = ("page_size", "page_token", "name")
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    page_size: int
    page_token: str
    name: str
    def __init__(self, page_size: _Optional[int] = ..., page_token: _Optional[str] = ..., name: _Optional[str] = ...) -> None: ...

class ListHostsResponse(_message.Message):
    __slots__ = ("hosts", "next_page_token")
    HOSTS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    hosts: _containers.RepeatedCompositeFieldContainer[Host]
    next_page_token: str
    def __init__(self, hosts: _Optional[_Iterable[_Union[Host, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class DrainHostRequest(_message.Message):
    __slots__ = ("name", "reason")
    NAME_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    name: str
    reason: str
    def __init__(self, name: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class DrainHostResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ResumeHostRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class ResumeHostResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ForgetHostRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class ForgetHostResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
