"""Converts between stored data and the messages of the contract. Pure."""

from collections.abc import Iterable, Mapping, Set

import grpc
from google.protobuf.timestamp_pb2 import Timestamp

from service import webhook_targets
from service.db.batches import Batch
from service.db.creation import DuplicateError, Options
from service.db.limits import FullError
from service.db.results import StoredResult, Which
from service.db.run_order import RunOrder
from service.db.usage import Usage
from service.errors import ApiError, Violation, invalid
from service.rpc import pages
from service.rpc.times import timestamp
from service.tenants import Quotas
from service.webhook_targets import Networks
from vllm_batch.channel import MAX_MESSAGE_BYTES
from vllm_batch.v1 import batch_service_pb2 as pb

# A larger body is omitted from messages: with its other fields the message would exceed gRPC's limit.
MAX_BODY_BYTES = MAX_MESSAGE_BYTES - (64 << 10)
MAX_REQUEST_ID = 128
MAX_METADATA = 16
MAX_METADATA_KEY = 64
MAX_METADATA_VALUE = 512
# Until something has left a full queue.
FULL_RETRY_S = 60.0
MAX_WINDOW_S = 366 * 86_400.0

_PREFIX = "batch_"
_WHICH: dict[int, Which] = {
    pb.RESULT_FILTER_UNSPECIFIED: "all",
    pb.RESULT_FILTER_SUCCEEDED: "succeeded",
    pb.RESULT_FILTER_FAILED: "failed",
}


def batch_id(text: str) -> int:
    """The number in a Batch.id. Raises INVALID_ARGUMENT if it is empty, NOT_FOUND if no batch can have it."""
    digits = text.removeprefix(_PREFIX)
    if not text:
        raise invalid([Violation("batch_id", "is required")])
    is_number = text.startswith(_PREFIX) and digits.isascii() and digits.isdigit() and len(digits) <= 19
    if not is_number or int(digits) >= 1 << 63:
        raise ApiError(grpc.StatusCode.NOT_FOUND, f"batch {text[:100]!r} does not exist")
    return int(digits)


def batch_name(number: int) -> str:
    """The Batch.id of a stored batch."""
    return f"{_PREFIX}{number}"


def request_name(batch: int, index: int) -> str:
    """The Result.id of a request, as in OpenAI's output and the engine's logs."""
    return f"batch_req_{batch}_{index}"


def which(asked: int) -> Which:
    """The results that a ResultFilter is for. Raises INVALID_ARGUMENT if it is unknown."""
    if asked not in _WHICH:
        raise invalid([Violation("filter", f"{asked} is no filter")])
    return _WHICH[asked]


def state_name(state: int) -> str:
    """The stored spelling of a BatchState."""
    return pb.BatchState.Name(state).removeprefix("BATCH_STATE_").lower()


def batch_message(batch: Batch) -> pb.Batch:
    """A batch as clients see it."""
    return pb.Batch(
        id=batch_name(batch.id),
        state=f"BATCH_STATE_{batch.state.upper()}",
        counts=pb.BatchCounts(total=batch.total, completed=batch.completed, failed=batch.failed),
        usage=pb.TokenUsage(
            prompt_tokens=batch.prompt_tokens,
            completion_tokens=batch.completion_tokens,
            cached_tokens=batch.cached_tokens,
            reasoning_tokens=batch.reasoning_tokens,
        ),
        metadata=batch.metadata,
        priority=batch.priority,
        request_id=batch.request_id or "",
        models=batch.models,
        create_time=timestamp(batch.create_time),
        start_time=timestamp(batch.start_time),
        end_time=timestamp(batch.end_time),
        expire_time=timestamp(batch.expire_time),
        tenant=batch.tenant,
        order=pb.RUN_ORDER_INPUT if batch.run_order == "input" else pb.RUN_ORDER_PREFIX,
    )


def database_away(batch: pb.Batch) -> pb.Batch:
    """A batch as last read, while Postgres cannot be reached."""
    message = pb.Batch()
    message.CopyFrom(batch)
    message.ClearField("estimated_end_time")
    message.wait.reason = pb.WAIT_REASON_DATABASE_AWAY
    message.wait.message = "Postgres cannot be reached; this is what was last read"
    message.wait.advice = "Check Postgres. Workers go on with what they have taken, and nothing is lost."
    return message


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
        if result.omitted_bytes:
            message.response.omitted_body_bytes = result.omitted_bytes
            message.response.line_token = pages.token("index", result.index - 1) if result.index else ""
    else:
        message.error.code = result.error_code or ""
        message.error.message = result.error_message or ""
    return message


def tenant_message(found: Usage, busy: Set[str], quotas: Quotas) -> pb.Tenant:
    """A tenant as clients see it, `busy` being those that have work now."""
    quota = quotas.of(found.tenant)
    beside = sum(quotas.of(name).weight for name in busy - {found.tenant})
    return pb.Tenant(
        name=found.tenant,
        weight=quota.weight,
        share=quota.weight / (quota.weight + beside),
        open_batches=found.open_batches,
        queued_requests=found.queued_requests,
        queued_tokens=found.queued_tokens,
        usage=pb.TokenUsage(prompt_tokens=found.prompt_tokens, completion_tokens=found.completion_tokens),
        limits=pb.TenantLimits(
            open_batches=quota.open_batches,
            queued_requests=quota.queued_requests,
            queued_tokens=quota.queued_tokens,
            calls_per_s=quota.calls_per_s,
        ),
    )


def options(message: pb.BatchOptions) -> Options:
    """The options of a new batch. Raises INVALID_ARGUMENT naming each wrong field."""
    wrong = []
    if len(message.request_id) > MAX_REQUEST_ID or "\0" in message.request_id:
        wrong.append(Violation("options.request_id", f"must have at most {MAX_REQUEST_ID} characters and no NUL"))
    wrong += wrong_metadata(message.metadata, "options.metadata")
    if not -100 <= message.priority <= 100:
        wrong.append(Violation("options.priority", f"is {message.priority}, must be from -100 to 100"))
    window_s = None
    if message.HasField("completion_window"):
        window_s = message.completion_window.seconds + message.completion_window.nanos / 1e9
        if not 0 < window_s <= MAX_WINDOW_S:
            wrong.append(Violation("options.completion_window", "must be more than 0 and at most 366 days"))
    if message.order not in pb.RunOrder.values():
        wrong.append(Violation("options.order", f"is {message.order}, which is no RunOrder"))
    if wrong:
        raise invalid(wrong)
    run_order: RunOrder = "input" if message.order == pb.RUN_ORDER_INPUT else "prefix"
    return Options(
        message.request_id or None,
        dict(message.metadata),
        message.priority,
        window_s,
        run_order=run_order,
        webhook_url=message.webhook or None,
        require_live=message.require_live,
    )


def wrong_webhook(url: str, tenant: str, quotas: Quotas, allowed: Networks, field: str) -> list[Violation]:
    """What is wrong with the target that a tenant's new batch names. The empty URL names none."""
    if not url:
        return []
    if problem := webhook_targets.problem(url, allowed):
        return [Violation(field, problem)]
    if quotas.of(tenant).webhook is None:
        return [Violation(field, f"tenant {tenant} has no webhook secret to sign with: see BATCH_TENANTS_FILE")]
    return []


def wrong_metadata(metadata: Mapping[str, str], field: str) -> list[Violation]:
    """What is wrong with the metadata of a batch."""
    wrong = []
    if len(metadata) > MAX_METADATA:
        wrong.append(Violation(field, f"has {len(metadata)} pairs, at most {MAX_METADATA} are allowed"))
    for key, value in metadata.items():
        if not 0 < len(key) <= MAX_METADATA_KEY or len(value) > MAX_METADATA_VALUE or _cannot_be_stored(key + value):
            wrong.append(
                Violation(
                    f"{field}[{key[:MAX_METADATA_KEY]!r}]",
                    f"key must have 1 to {MAX_METADATA_KEY} characters, value at most {MAX_METADATA_VALUE}; no NUL and"
                    " no half of a character",
                )
            )
    return wrong


def _cannot_be_stored(text: str) -> bool:
    """Whether Postgres cannot keep a text: NUL, or half of a surrogate pair, which JSON can have."""
    return "\0" in text or any("\ud800" <= each <= "\udfff" for each in text)


def creation_error(error: DuplicateError | FullError) -> ApiError:
    """The error that tells a client why its batch was not created."""
    if isinstance(error, FullError):
        metadata = {"limit": str(error.limit), "value": str(error.value), "left": str(error.left), "name": error.name}
        reason = "LIMIT_REACHED"
        if error.tenant:
            reason, metadata = "QUOTA_REACHED", metadata | {"tenant": error.tenant}
        delay_s = FULL_RETRY_S if error.may_pass else None
        return ApiError(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error), reason, metadata, delay_s)
    name = batch_name(error.batch.id)
    message = f"request_id {error.batch.request_id!r} is taken by {name}, which has different content or options"
    return ApiError(grpc.StatusCode.ALREADY_EXISTS, message, "REQUEST_ID_REUSED", {"batch_id": name})


def accepting(models: Iterable[str]) -> pb.GetServiceStatusResponse:
    """The status of a service that accepts new work for these models, given in any order and with repeats."""
    return pb.GetServiceStatusResponse(accepting=True, models=sorted(set(models)))


def not_accepting(refusal: ApiError) -> pb.GetServiceStatusResponse:
    """The status of a service that would refuse new work with this error."""
    status = pb.GetServiceStatusResponse(reason=refusal.reason, message=refusal.message, metadata=refusal.metadata)
    if refusal.retry_delay_s is not None:
        status.retry_delay.FromMilliseconds(round(refusal.retry_delay_s * 1000))
    return status


def too_large(what: str, limit: int, value: int) -> ApiError:
    """RESOURCE_EXHAUSTED for a batch that is too large to ever be accepted."""
    metadata = {"limit": str(limit), "value": str(value)}
    message = f"{what}: {value}, at most {limit} are allowed"
    return ApiError(grpc.StatusCode.RESOURCE_EXHAUSTED, message, "LIMIT_REACHED", metadata)
