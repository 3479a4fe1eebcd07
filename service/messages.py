"""Between what is stored and the messages of the contract. Pure."""

import base64
from datetime import datetime

import grpc
from google.protobuf.timestamp_pb2 import Timestamp

from service.db.batches import Batch, DuplicateError, FullError, Options
from service.db.results import StoredResult
from service.errors import ApiError, Violation, invalid
from vllm_batch.v1 import batch_service_pb2 as pb

MAX_REQUEST_ID = 128
MAX_METADATA = 16
MAX_METADATA_KEY = 64
MAX_METADATA_VALUE = 512
MAX_WINDOW_S = 366 * 86_400.0

_PREFIX = "batch_"


def batch_id(text: str) -> int:
    """The number in a Batch.id. Raises NOT_FOUND for what no batch can be called."""
    digits = text.removeprefix(_PREFIX)
    if not text:
        raise invalid([Violation("batch_id", "is required")])
    if not text.startswith(_PREFIX) or not (digits.isascii() and digits.isdigit()) or len(digits) > 18:
        raise ApiError(grpc.StatusCode.NOT_FOUND, f"batch {text[:100]!r} does not exist")
    return int(digits)


def batch_name(number: int) -> str:
    """Batch.id of a stored batch."""
    return f"{_PREFIX}{number}"


def request_name(batch: int, index: int) -> str:
    """Result.id: the request as OpenAI's output names it, and the engine's logs."""
    return f"batch_req_{batch}_{index}"


def state_name(state: int) -> str:
    """The stored spelling of a BatchState."""
    return pb.BatchState.Name(state).removeprefix("BATCH_STATE_").lower()


def batch_message(batch: Batch) -> pb.Batch:
    """A batch as clients see it."""
    return pb.Batch(
        id=batch_name(batch.id),
        state=f"BATCH_STATE_{batch.state.upper()}",
        counts=pb.BatchCounts(total=batch.total, completed=batch.completed, failed=batch.failed),
        usage=pb.TokenUsage(prompt_tokens=batch.prompt_tokens, completion_tokens=batch.completion_tokens),
        metadata=batch.metadata,
        priority=batch.priority,
        request_id=batch.request_id or "",
        models=batch.models,
        create_time=_timestamp(batch.create_time),
        start_time=_timestamp(batch.start_time),
        end_time=_timestamp(batch.end_time),
        expire_time=_timestamp(batch.expire_time),
    )


def result_message(batch: int, result: StoredResult) -> pb.Result:
    """A result as clients see it."""
    message = pb.Result(
        custom_id=result.custom_id,
        index=result.index,
        id=request_name(batch, result.index),
        finish_time=Timestamp(seconds=result.finish_us // 1_000_000, nanos=result.finish_us % 1_000_000 * 1000),
    )
    if result.status_code is not None:
        message.response.status_code = result.status_code
        message.response.body_json = result.body or ""
    else:
        message.error.code = result.error_code or ""
        message.error.message = result.error_message or ""
    return message


def options(message: pb.BatchOptions) -> Options:
    """The options of a new batch. Raises INVALID_ARGUMENT naming each wrong field."""
    wrong = []
    if len(message.request_id) > MAX_REQUEST_ID or "\0" in message.request_id:
        wrong.append(Violation("options.request_id", f"at most {MAX_REQUEST_ID} characters, none of them NUL"))
    if len(message.metadata) > MAX_METADATA:
        wrong.append(Violation("options.metadata", f"has {len(message.metadata)} pairs, at most {MAX_METADATA}"))
    for key, value in message.metadata.items():
        if not 0 < len(key) <= MAX_METADATA_KEY or len(value) > MAX_METADATA_VALUE or "\0" in key + value:
            wrong.append(
                Violation(
                    f"options.metadata[{key[:MAX_METADATA_KEY]!r}]",
                    f"key of 1 to {MAX_METADATA_KEY} characters, value of at most {MAX_METADATA_VALUE}, without NUL",
                )
            )
    if not -100 <= message.priority <= 100:
        wrong.append(Violation("options.priority", f"is {message.priority}, must be from -100 to 100"))
    window_s = None
    if message.HasField("completion_window"):
        window_s = message.completion_window.seconds + message.completion_window.nanos / 1e9
        if not 0 < window_s <= MAX_WINDOW_S:
            wrong.append(Violation("options.completion_window", "must be over 0 and at most 366 days"))
    if wrong:
        raise invalid(wrong)
    return Options(message.request_id or None, dict(message.metadata), message.priority, window_s)


def creation_error(error: DuplicateError | FullError) -> ApiError:
    """Why a batch could not be created, for its client."""
    if isinstance(error, FullError):
        metadata = {"limit": str(error.limit), "value": str(error.value)}
        return ApiError(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error), "LIMIT_REACHED", metadata, retry_delay_s=60)
    name = batch_name(error.batch.id)
    message = f"request_id {error.batch.request_id!r} was used for {name} with other content or options"
    return ApiError(grpc.StatusCode.ALREADY_EXISTS, message, "REQUEST_ID_REUSED", {"batch_id": name})


def too_large(what: str, limit: int, value: int) -> ApiError:
    """RESOURCE_EXHAUSTED for a batch that can never be taken."""
    metadata = {"limit": str(limit), "value": str(value)}
    message = f"{what}: {value}, at most {limit} are allowed"
    return ApiError(grpc.StatusCode.RESOURCE_EXHAUSTED, message, "LIMIT_REACHED", metadata)


def page_size(size: int) -> int:
    """The size of a page: 50 for 0. Raises INVALID_ARGUMENT."""
    if not 0 <= size <= 1000:
        raise invalid([Violation("page_size", f"is {size}, must be from 0 to 1000")])
    return size or 50


def token(kind: str, position: int) -> str:
    """An opaque token for a position in a listing of some kind."""
    return base64.urlsafe_b64encode(f"{kind}:{position}".encode()).decode().rstrip("=")


def position(text: str, kind: str, field: str) -> int | None:
    """The position in a token; None for an empty one. Raises INVALID_ARGUMENT for a token of another kind."""
    if not text:
        return None
    try:
        found, number = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)).decode().split(":")
        if found == kind and 0 <= int(number) < 1 << 62:
            return int(number)
    except ValueError:
        pass
    raise invalid([Violation(field, "is not a token that this call has given")])


def _timestamp(time: datetime | None) -> Timestamp | None:
    if time is None:
        return None
    message = Timestamp()
    message.FromDatetime(time)
    return message
