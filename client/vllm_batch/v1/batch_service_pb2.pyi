import datetime

from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf import struct_pb2 as _struct_pb2
from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class BatchState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    BATCH_STATE_UNSPECIFIED: _ClassVar[BatchState]
    BATCH_STATE_VALIDATING: _ClassVar[BatchState]
    BATCH_STATE_IN_PROGRESS: _ClassVar[BatchState]
    BATCH_STATE_FINALIZING: _ClassVar[BatchState]
    BATCH_STATE_COMPLETED: _ClassVar[BatchState]
    BATCH_STATE_FAILED: _ClassVar[BatchState]
    BATCH_STATE_EXPIRED: _ClassVar[BatchState]
    BATCH_STATE_CANCELLING: _ClassVar[BatchState]
    BATCH_STATE_CANCELLED: _ClassVar[BatchState]

class WaitReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    WAIT_REASON_UNSPECIFIED: _ClassVar[WaitReason]
    WAIT_REASON_NO_WORKER_OF_MODEL: _ClassVar[WaitReason]
    WAIT_REASON_WORKER_LOADING: _ClassVar[WaitReason]
    WAIT_REASON_ENGINE_STALLED: _ClassVar[WaitReason]
    WAIT_REASON_ENGINE_DEAD: _ClassVar[WaitReason]
    WAIT_REASON_WORKER_OFFLINE: _ClassVar[WaitReason]
    WAIT_REASON_RECOVERY_GAVE_UP: _ClassVar[WaitReason]
    WAIT_REASON_DATABASE_AWAY: _ClassVar[WaitReason]
    WAIT_REASON_TURN: _ClassVar[WaitReason]
    WAIT_REASON_SUSPECTS_ALONE: _ClassVar[WaitReason]
    WAIT_REASON_WORKER_DRAINING: _ClassVar[WaitReason]
    WAIT_REASON_CANCELLING: _ClassVar[WaitReason]
    WAIT_REASON_NOT_TAKEN: _ClassVar[WaitReason]
    WAIT_REASON_RECOVERY_PAUSED: _ClassVar[WaitReason]

class RunOrder(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    RUN_ORDER_UNSPECIFIED: _ClassVar[RunOrder]
    RUN_ORDER_PREFIX: _ClassVar[RunOrder]
    RUN_ORDER_INPUT: _ClassVar[RunOrder]

class ResultOrder(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    RESULT_ORDER_UNSPECIFIED: _ClassVar[ResultOrder]
    RESULT_ORDER_INPUT: _ClassVar[ResultOrder]
    RESULT_ORDER_FINISHED: _ClassVar[ResultOrder]

class ResultFormat(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    RESULT_FORMAT_UNSPECIFIED: _ClassVar[ResultFormat]
    RESULT_FORMAT_MESSAGE: _ClassVar[ResultFormat]
    RESULT_FORMAT_JSONL: _ClassVar[ResultFormat]

class ResultFilter(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    RESULT_FILTER_UNSPECIFIED: _ClassVar[ResultFilter]
    RESULT_FILTER_SUCCEEDED: _ClassVar[ResultFilter]
    RESULT_FILTER_FAILED: _ClassVar[ResultFilter]
BATCH_STATE_UNSPECIFIED: BatchState
BATCH_STATE_VALIDATING: BatchState
BATCH_STATE_IN_PROGRESS: BatchState
BATCH_STATE_FINALIZING: BatchState
BATCH_STATE_COMPLETED: BatchState
BATCH_STATE_FAILED: BatchState
BATCH_STATE_EXPIRED: BatchState
BATCH_STATE_CANCELLING: BatchState
BATCH_STATE_CANCELLED: BatchState
WAIT_REASON_UNSPECIFIED: WaitReason
WAIT_REASON_NO_WORKER_OF_MODEL: WaitReason
WAIT_REASON_WORKER_LOADING: WaitReason
WAIT_REASON_ENGINE_STALLED: WaitReason
WAIT_REASON_ENGINE_DEAD: WaitReason
WAIT_REASON_WORKER_OFFLINE: WaitReason
WAIT_REASON_RECOVERY_GAVE_UP: WaitReason
WAIT_REASON_DATABASE_AWAY: WaitReason
WAIT_REASON_TURN: WaitReason
WAIT_REASON_SUSPECTS_ALONE: WaitReason
WAIT_REASON_WORKER_DRAINING: WaitReason
WAIT_REASON_CANCELLING: WaitReason
WAIT_REASON_NOT_TAKEN: WaitReason
WAIT_REASON_RECOVERY_PAUSED: WaitReason
RUN_ORDER_UNSPECIFIED: RunOrder
RUN_ORDER_PREFIX: RunOrder
RUN_ORDER_INPUT: RunOrder
RESULT_ORDER_UNSPECIFIED: ResultOrder
RESULT_ORDER_INPUT: ResultOrder
RESULT_ORDER_FINISHED: ResultOrder
RESULT_FORMAT_UNSPECIFIED: ResultFormat
RESULT_FORMAT_MESSAGE: ResultFormat
RESULT_FORMAT_JSONL: ResultFormat
RESULT_FILTER_UNSPECIFIED: ResultFilter
RESULT_FILTER_SUCCEEDED: ResultFilter
RESULT_FILTER_FAILED: ResultFilter

class BatchCounts(_message.Message):
    __slots__ = ("total", "completed", "failed", "running")
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    COMPLETED_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    total: int
    completed: int
    failed: int
    running: int
    def __init__(self, total: _Optional[int] = ..., completed: _Optional[int] = ..., failed: _Optional[int] = ..., running: _Optional[int] = ...) -> None: ...

class TokenUsage(_message.Message):
    __slots__ = ("prompt_tokens", "completion_tokens", "cached_tokens", "reasoning_tokens")
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    REASONING_TOKENS_FIELD_NUMBER: _ClassVar[int]
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    reasoning_tokens: int
    def __init__(self, prompt_tokens: _Optional[int] = ..., completion_tokens: _Optional[int] = ..., cached_tokens: _Optional[int] = ..., reasoning_tokens: _Optional[int] = ...) -> None: ...

class Wait(_message.Message):
    __slots__ = ("reason", "message", "advice")
    REASON_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    ADVICE_FIELD_NUMBER: _ClassVar[int]
    reason: WaitReason
    message: str
    advice: str
    def __init__(self, reason: _Optional[_Union[WaitReason, str]] = ..., message: _Optional[str] = ..., advice: _Optional[str] = ...) -> None: ...

class Batch(_message.Message):
    __slots__ = ("id", "state", "counts", "usage", "metadata", "priority", "request_id", "models", "create_time", "start_time", "end_time", "expire_time", "tenant", "order", "estimated_end_time", "wait")
    class MetadataEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    ID_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    COUNTS_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    MODELS_FIELD_NUMBER: _ClassVar[int]
    CREATE_TIME_FIELD_NUMBER: _ClassVar[int]
    START_TIME_FIELD_NUMBER: _ClassVar[int]
    END_TIME_FIELD_NUMBER: _ClassVar[int]
    EXPIRE_TIME_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    ORDER_FIELD_NUMBER: _ClassVar[int]
    ESTIMATED_END_TIME_FIELD_NUMBER: _ClassVar[int]
    WAIT_FIELD_NUMBER: _ClassVar[int]
    id: str
    state: BatchState
    counts: BatchCounts
    usage: TokenUsage
    metadata: _containers.ScalarMap[str, str]
    priority: int
    request_id: str
    models: _containers.RepeatedScalarFieldContainer[str]
    create_time: _timestamp_pb2.Timestamp
    start_time: _timestamp_pb2.Timestamp
    end_time: _timestamp_pb2.Timestamp
    expire_time: _timestamp_pb2.Timestamp
    tenant: str
    order: RunOrder
    estimated_end_time: _timestamp_pb2.Timestamp
    wait: Wait
    def __init__(self, id: _Optional[str] = ..., state: _Optional[_Union[BatchState, str]] = ..., counts: _Optional[_Union[BatchCounts, _Mapping]] = ..., usage: _Optional[_Union[TokenUsage, _Mapping]] = ..., metadata: _Optional[_Mapping[str, str]] = ..., priority: _Optional[int] = ..., request_id: _Optional[str] = ..., models: _Optional[_Iterable[str]] = ..., create_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., start_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., end_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., expire_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., tenant: _Optional[str] = ..., order: _Optional[_Union[RunOrder, str]] = ..., estimated_end_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., wait: _Optional[_Union[Wait, _Mapping]] = ...) -> None: ...

class BatchOptions(_message.Message):
    __slots__ = ("request_id", "metadata", "priority", "completion_window", "order", "webhook", "require_live")
    class MetadataEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_WINDOW_FIELD_NUMBER: _ClassVar[int]
    ORDER_FIELD_NUMBER: _ClassVar[int]
    WEBHOOK_FIELD_NUMBER: _ClassVar[int]
    REQUIRE_LIVE_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    metadata: _containers.ScalarMap[str, str]
    priority: int
    completion_window: _duration_pb2.Duration
    order: RunOrder
    webhook: str
    require_live: bool
    def __init__(self, request_id: _Optional[str] = ..., metadata: _Optional[_Mapping[str, str]] = ..., priority: _Optional[int] = ..., completion_window: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., order: _Optional[_Union[RunOrder, str]] = ..., webhook: _Optional[str] = ..., require_live: _Optional[bool] = ...) -> None: ...

class InlineRequest(_message.Message):
    __slots__ = ("custom_id", "method", "url", "body", "body_json")
    CUSTOM_ID_FIELD_NUMBER: _ClassVar[int]
    METHOD_FIELD_NUMBER: _ClassVar[int]
    URL_FIELD_NUMBER: _ClassVar[int]
    BODY_FIELD_NUMBER: _ClassVar[int]
    BODY_JSON_FIELD_NUMBER: _ClassVar[int]
    custom_id: str
    method: str
    url: str
    body: _struct_pb2.Struct
    body_json: str
    def __init__(self, custom_id: _Optional[str] = ..., method: _Optional[str] = ..., url: _Optional[str] = ..., body: _Optional[_Union[_struct_pb2.Struct, _Mapping]] = ..., body_json: _Optional[str] = ...) -> None: ...

class CreateBatchRequest(_message.Message):
    __slots__ = ("options", "requests")
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    options: BatchOptions
    requests: _containers.RepeatedCompositeFieldContainer[InlineRequest]
    def __init__(self, options: _Optional[_Union[BatchOptions, _Mapping]] = ..., requests: _Optional[_Iterable[_Union[InlineRequest, _Mapping]]] = ...) -> None: ...

class CreateBatchResponse(_message.Message):
    __slots__ = ("batch",)
    BATCH_FIELD_NUMBER: _ClassVar[int]
    batch: Batch
    def __init__(self, batch: _Optional[_Union[Batch, _Mapping]] = ...) -> None: ...

class UploadBatchRequest(_message.Message):
    __slots__ = ("options", "data", "end")
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    options: BatchOptions
    data: bytes
    end: UploadEnd
    def __init__(self, options: _Optional[_Union[BatchOptions, _Mapping]] = ..., data: _Optional[bytes] = ..., end: _Optional[_Union[UploadEnd, _Mapping]] = ...) -> None: ...

class UploadEnd(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class UploadBatchResponse(_message.Message):
    __slots__ = ("batch",)
    BATCH_FIELD_NUMBER: _ClassVar[int]
    batch: Batch
    def __init__(self, batch: _Optional[_Union[Batch, _Mapping]] = ...) -> None: ...

class GetBatchRequest(_message.Message):
    __slots__ = ("batch_id",)
    BATCH_ID_FIELD_NUMBER: _ClassVar[int]
    batch_id: str
    def __init__(self, batch_id: _Optional[str] = ...) -> None: ...

class GetBatchResponse(_message.Message):
    __slots__ = ("batch",)
    BATCH_FIELD_NUMBER: _ClassVar[int]
    batch: Batch
    def __init__(self, batch: _Optional[_Union[Batch, _Mapping]] = ...) -> None: ...

class ListBatchesRequest(_message.Message):
    __slots__ = ("page_size", "page_token", "states", "tenant")
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    STATES_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    page_size: int
    page_token: str
    states: _containers.RepeatedScalarFieldContainer[BatchState]
    tenant: str
    def __init__(self, page_size: _Optional[int] = ..., page_token: _Optional[str] = ..., states: _Optional[_Iterable[_Union[BatchState, str]]] = ..., tenant: _Optional[str] = ...) -> None: ...

class ListBatchesResponse(_message.Message):
    __slots__ = ("batches", "next_page_token")
    BATCHES_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    batches: _containers.RepeatedCompositeFieldContainer[Batch]
    next_page_token: str
    def __init__(self, batches: _Optional[_Iterable[_Union[Batch, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class WatchBatchRequest(_message.Message):
    __slots__ = ("batch_id",)
    BATCH_ID_FIELD_NUMBER: _ClassVar[int]
    batch_id: str
    def __init__(self, batch_id: _Optional[str] = ...) -> None: ...

class WatchBatchResponse(_message.Message):
    __slots__ = ("batch",)
    BATCH_FIELD_NUMBER: _ClassVar[int]
    batch: Batch
    def __init__(self, batch: _Optional[_Union[Batch, _Mapping]] = ...) -> None: ...

class StreamResultsRequest(_message.Message):
    __slots__ = ("batch_id", "order", "follow", "resume_token", "format", "filter")
    BATCH_ID_FIELD_NUMBER: _ClassVar[int]
    ORDER_FIELD_NUMBER: _ClassVar[int]
    FOLLOW_FIELD_NUMBER: _ClassVar[int]
    RESUME_TOKEN_FIELD_NUMBER: _ClassVar[int]
    FORMAT_FIELD_NUMBER: _ClassVar[int]
    FILTER_FIELD_NUMBER: _ClassVar[int]
    batch_id: str
    order: ResultOrder
    follow: bool
    resume_token: str
    format: ResultFormat
    filter: ResultFilter
    def __init__(self, batch_id: _Optional[str] = ..., order: _Optional[_Union[ResultOrder, str]] = ..., follow: _Optional[bool] = ..., resume_token: _Optional[str] = ..., format: _Optional[_Union[ResultFormat, str]] = ..., filter: _Optional[_Union[ResultFilter, str]] = ...) -> None: ...

class StreamResultsResponse(_message.Message):
    __slots__ = ("results", "resume_token", "jsonl")
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    RESUME_TOKEN_FIELD_NUMBER: _ClassVar[int]
    JSONL_FIELD_NUMBER: _ClassVar[int]
    results: _containers.RepeatedCompositeFieldContainer[Result]
    resume_token: str
    jsonl: bytes
    def __init__(self, results: _Optional[_Iterable[_Union[Result, _Mapping]]] = ..., resume_token: _Optional[str] = ..., jsonl: _Optional[bytes] = ...) -> None: ...

class Result(_message.Message):
    __slots__ = ("custom_id", "index", "id", "response", "error", "finish_time")
    CUSTOM_ID_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    ID_FIELD_NUMBER: _ClassVar[int]
    RESPONSE_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    FINISH_TIME_FIELD_NUMBER: _ClassVar[int]
    custom_id: str
    index: int
    id: str
    response: Response
    error: RequestError
    finish_time: _timestamp_pb2.Timestamp
    def __init__(self, custom_id: _Optional[str] = ..., index: _Optional[int] = ..., id: _Optional[str] = ..., response: _Optional[_Union[Response, _Mapping]] = ..., error: _Optional[_Union[RequestError, _Mapping]] = ..., finish_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...

class Response(_message.Message):
    __slots__ = ("status_code", "body_json", "omitted_body_bytes", "line_token")
    STATUS_CODE_FIELD_NUMBER: _ClassVar[int]
    BODY_JSON_FIELD_NUMBER: _ClassVar[int]
    OMITTED_BODY_BYTES_FIELD_NUMBER: _ClassVar[int]
    LINE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    status_code: int
    body_json: str
    omitted_body_bytes: int
    line_token: str
    def __init__(self, status_code: _Optional[int] = ..., body_json: _Optional[str] = ..., omitted_body_bytes: _Optional[int] = ..., line_token: _Optional[str] = ...) -> None: ...

class RequestError(_message.Message):
    __slots__ = ("code", "message")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    code: str
    message: str
    def __init__(self, code: _Optional[str] = ..., message: _Optional[str] = ...) -> None: ...

class ListErrorsRequest(_message.Message):
    __slots__ = ("batch_id",)
    BATCH_ID_FIELD_NUMBER: _ClassVar[int]
    batch_id: str
    def __init__(self, batch_id: _Optional[str] = ...) -> None: ...

class ListErrorsResponse(_message.Message):
    __slots__ = ("kinds", "other_count", "is_partial")
    KINDS_FIELD_NUMBER: _ClassVar[int]
    OTHER_COUNT_FIELD_NUMBER: _ClassVar[int]
    IS_PARTIAL_FIELD_NUMBER: _ClassVar[int]
    kinds: _containers.RepeatedCompositeFieldContainer[ErrorKind]
    other_count: int
    is_partial: bool
    def __init__(self, kinds: _Optional[_Iterable[_Union[ErrorKind, _Mapping]]] = ..., other_count: _Optional[int] = ..., is_partial: _Optional[bool] = ...) -> None: ...

class ErrorKind(_message.Message):
    __slots__ = ("code", "status_code", "type", "message", "count", "example_custom_id", "example_message")
    CODE_FIELD_NUMBER: _ClassVar[int]
    STATUS_CODE_FIELD_NUMBER: _ClassVar[int]
    TYPE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    EXAMPLE_CUSTOM_ID_FIELD_NUMBER: _ClassVar[int]
    EXAMPLE_MESSAGE_FIELD_NUMBER: _ClassVar[int]
    code: str
    status_code: int
    type: str
    message: str
    count: int
    example_custom_id: str
    example_message: str
    def __init__(self, code: _Optional[str] = ..., status_code: _Optional[int] = ..., type: _Optional[str] = ..., message: _Optional[str] = ..., count: _Optional[int] = ..., example_custom_id: _Optional[str] = ..., example_message: _Optional[str] = ...) -> None: ...

class GetResultRequest(_message.Message):
    __slots__ = ("batch_id", "custom_id")
    BATCH_ID_FIELD_NUMBER: _ClassVar[int]
    CUSTOM_ID_FIELD_NUMBER: _ClassVar[int]
    batch_id: str
    custom_id: str
    def __init__(self, batch_id: _Optional[str] = ..., custom_id: _Optional[str] = ...) -> None: ...

class GetResultResponse(_message.Message):
    __slots__ = ("result",)
    RESULT_FIELD_NUMBER: _ClassVar[int]
    result: Result
    def __init__(self, result: _Optional[_Union[Result, _Mapping]] = ...) -> None: ...

class CancelBatchRequest(_message.Message):
    __slots__ = ("batch_id",)
    BATCH_ID_FIELD_NUMBER: _ClassVar[int]
    batch_id: str
    def __init__(self, batch_id: _Optional[str] = ...) -> None: ...

class CancelBatchResponse(_message.Message):
    __slots__ = ("batch",)
    BATCH_FIELD_NUMBER: _ClassVar[int]
    batch: Batch
    def __init__(self, batch: _Optional[_Union[Batch, _Mapping]] = ...) -> None: ...

class DeleteBatchRequest(_message.Message):
    __slots__ = ("batch_id",)
    BATCH_ID_FIELD_NUMBER: _ClassVar[int]
    batch_id: str
    def __init__(self, batch_id: _Optional[str] = ...) -> None: ...

class DeleteBatchResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RetryBatchRequest(_message.Message):
    __slots__ = ("batch_id", "request_id")
    BATCH_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    batch_id: str
    request_id: str
    def __init__(self, batch_id: _Optional[str] = ..., request_id: _Optional[str] = ...) -> None: ...

class RetryBatchResponse(_message.Message):
    __slots__ = ("batch",)
    BATCH_FIELD_NUMBER: _ClassVar[int]
    batch: Batch
    def __init__(self, batch: _Optional[_Union[Batch, _Mapping]] = ...) -> None: ...

class ListTenantsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListTenantsResponse(_message.Message):
    __slots__ = ("tenants",)
    TENANTS_FIELD_NUMBER: _ClassVar[int]
    tenants: _containers.RepeatedCompositeFieldContainer[Tenant]
    def __init__(self, tenants: _Optional[_Iterable[_Union[Tenant, _Mapping]]] = ...) -> None: ...

class Tenant(_message.Message):
    __slots__ = ("name", "weight", "share", "open_batches", "queued_requests", "queued_tokens", "usage", "limits")
    NAME_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    SHARE_FIELD_NUMBER: _ClassVar[int]
    OPEN_BATCHES_FIELD_NUMBER: _ClassVar[int]
    QUEUED_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    QUEUED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    name: str
    weight: float
    share: float
    open_batches: int
    queued_requests: int
    queued_tokens: int
    usage: TokenUsage
    limits: TenantLimits
    def __init__(self, name: _Optional[str] = ..., weight: _Optional[float] = ..., share: _Optional[float] = ..., open_batches: _Optional[int] = ..., queued_requests: _Optional[int] = ..., queued_tokens: _Optional[int] = ..., usage: _Optional[_Union[TokenUsage, _Mapping]] = ..., limits: _Optional[_Union[TenantLimits, _Mapping]] = ...) -> None: ...

class TenantLimits(_message.Message):
    __slots__ = ("open_batches", "queued_requests", "queued_tokens", "calls_per_s")
    OPEN_BATCHES_FIELD_NUMBER: _ClassVar[int]
    QUEUED_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    QUEUED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CALLS_PER_S_FIELD_NUMBER: _ClassVar[int]
    open_batches: int
    queued_requests: int
    queued_tokens: int
    calls_per_s: float
    def __init__(self, open_batches: _Optional[int] = ..., queued_requests: _Optional[int] = ..., queued_tokens: _Optional[int] = ..., calls_per_s: _Optional[float] = ...) -> None: ...

class GetServiceStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetServiceStatusResponse(_message.Message):
    __slots__ = ("accepting", "reason", "message", "metadata", "retry_delay", "models")
    class MetadataEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    ACCEPTING_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    RETRY_DELAY_FIELD_NUMBER: _ClassVar[int]
    MODELS_FIELD_NUMBER: _ClassVar[int]
    accepting: bool
    reason: str
    message: str
    metadata: _containers.ScalarMap[str, str]
    retry_delay: _duration_pb2.Duration
    models: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, accepting: _Optional[bool] = ..., reason: _Optional[str] = ..., message: _Optional[str] = ..., metadata: _Optional[_Mapping[str, str]] = ..., retry_delay: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., models: _Optional[_Iterable[str]] = ...) -> None: ...
