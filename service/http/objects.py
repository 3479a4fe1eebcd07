"""The objects of OpenAI's Files, Uploads, Batches and Models API, made of what is stored. Pure."""

import re
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from service.api import messages
from service.db import files
from service.db.file_batches import FileBatch
from service.db.file_lists import Entry, Kind
from service.db.files import File, Part
from service.db.output import KINDS
from service.errors import ApiError, Violation, invalid, not_found

T = TypeVar("T")

MIN_LIFETIME_S = 3600
MAX_LIFETIME_S = 2_592_000
MAX_FILENAME = 512
_DIGITS = re.compile(r"\d{1,18}", re.ASCII)
_WINDOW = re.compile(r"(\d{1,4})([hd])", re.ASCII)
_PREFIXES: dict[Kind, str] = {"output": "file-output-", "error": "file-error-", "input": "file-"}


class Asked(BaseModel):
    """A body of a request. As with OpenAI, a parameter that is not known is refused: it may be a misspelt one."""

    model_config = ConfigDict(extra="forbid")


class ExpiresAfter(Asked):
    """When a file expires."""

    anchor: Literal["created_at"]
    seconds: int = Field(ge=MIN_LIFETIME_S, le=MAX_LIFETIME_S, strict=True)


class FileObject(BaseModel):
    """A file."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int | None = None
    filename: str
    purpose: Literal["batch", "batch_output"]
    status: Literal["uploaded", "processed", "error"] = "processed"
    status_details: str | None = None


class DeletedFile(BaseModel):
    """A file that was deleted."""

    id: str
    object: Literal["file"] = "file"
    deleted: bool = True


class CreateUpload(Asked):
    """What is going to be uploaded in parts."""

    bytes: int = Field(ge=0, strict=True)
    filename: str = Field(max_length=MAX_FILENAME, pattern=r"^[^\x00]*$")
    mime_type: str
    purpose: Literal["batch"]
    expires_after: ExpiresAfter | None = None


class CompleteUpload(Asked):
    """The parts of an upload in their order."""

    part_ids: list[str] = Field(max_length=100_000)
    md5: str | None = None


class UploadObject(BaseModel):
    """An upload in parts."""

    id: str
    object: Literal["upload"] = "upload"
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: Literal["batch"] = "batch"
    status: Literal["pending", "completed", "cancelled", "expired"]
    file: FileObject | None = None


class PartObject(BaseModel):
    """A part of an upload."""

    id: str
    object: Literal["upload.part"] = "upload.part"
    created_at: int
    upload_id: str


class CreateBatch(Asked):
    """A batch to be made from a file."""

    input_file_id: str
    endpoint: str = Field(min_length=1, max_length=200, pattern=r"^[^\x00]*$")
    completion_window: str = Field(
        description="24h, or another number of hours (h) or days (d), up to 366d",
        json_schema_extra={"pattern": "^[0-9]{1,4}[hd]$"},
    )
    metadata: dict[str, str] | None = None
    output_expires_after: ExpiresAfter | None = None
    webhook: str | None = Field(
        default=None, description="Where the event of its end goes, instead of to the tenant's target"
    )


class BatchError(BaseModel):
    """What is wrong with a line of a file."""

    code: str | None = None
    line: int | None = None
    message: str | None = None
    param: str | None = None


class BatchErrors(BaseModel):
    """What is wrong with a file."""

    object: Literal["list"] = "list"
    data: list[BatchError]


class RequestCounts(BaseModel):
    """The requests of a batch by outcome."""

    total: int
    completed: int
    failed: int


class InputTokens(BaseModel):
    """Of the tokens of prompts."""

    cached_tokens: int = 0


class OutputTokens(BaseModel):
    """Of the tokens generated."""

    reasoning_tokens: int = 0


class Usage(BaseModel):
    """Tokens of a batch."""

    input_tokens: int
    input_tokens_details: InputTokens = InputTokens()
    output_tokens: int
    output_tokens_details: OutputTokens = OutputTokens()
    total_tokens: int


class BatchObject(BaseModel):
    """A batch."""

    id: str
    object: Literal["batch"] = "batch"
    endpoint: str
    model: str | None = None
    errors: BatchErrors | None = None
    input_file_id: str
    completion_window: str
    status: Literal[
        "validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"
    ]
    output_file_id: str | None = None
    error_file_id: str | None = None
    created_at: int
    in_progress_at: int | None = None
    expires_at: int | None = None
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    request_counts: RequestCounts
    usage: Usage
    metadata: dict[str, str] | None = None


class ModelObject(BaseModel):
    """A model that is served. When it was made is not known."""

    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "vllm"


class Wrong(BaseModel):
    """What went wrong."""

    message: str
    type: Literal["invalid_request_error", "permission_error", "rate_limit_error", "server_error"]
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The answer to a call that failed."""

    error: Wrong


class Page(BaseModel, Generic[T]):
    """A page of a list. The next one is `after` the last id."""

    object: Literal["list"] = "list"
    data: list[T]
    first_id: str | None = None
    last_id: str | None = None
    has_more: bool = False


class Models(BaseModel):
    """All models that are served."""

    object: Literal["list"] = "list"
    data: list[ModelObject]


def file_name(kind: Kind, number: int) -> str:
    """The id of a file: an input by its number, an output or error file by that of its batch."""
    return f"{_PREFIXES[kind]}{number}"


def file_of(name: str) -> tuple[Kind, int]:
    """The kind and number in the id of a file. Raises NOT_FOUND if no file can have it."""
    for kind, prefix in _PREFIXES.items():
        if name.startswith(prefix) and _DIGITS.fullmatch(digits := name.removeprefix(prefix)):
            return kind, int(digits)
    raise not_found(f"file {name[:100]!r}")


def number_of(name: str, prefix: Literal["upload_", "part_", "batch_"], what: str) -> int:
    """The number in an id. Raises NOT_FOUND if nothing can have it."""
    digits = name.removeprefix(prefix)
    if not name.startswith(prefix) or not _DIGITS.fullmatch(digits):
        raise not_found(f"{what} {name[:100]!r}")
    return int(digits)


def file_object(found: Entry) -> FileObject:
    """A file as clients see it."""
    return FileObject(
        id=file_name(found.kind, found.number),
        bytes=found.bytes,
        created_at=_seconds(found.create_time),
        expires_at=_maybe(found.expire_time),
        filename=found.filename,
        purpose="batch" if found.kind == "input" else "batch_output",
    )


def entry_of(file: File) -> Entry:
    """An uploaded file as an entry of a list."""
    return Entry("input", file.id, file.filename, file.bytes, file.create_time, file.expire_time)


def upload_object(upload: File) -> UploadObject:
    """An upload as clients see it."""
    state: Literal["pending", "completed", "cancelled"] = "cancelled"
    if upload.state in ("pending", "kept"):
        state = "pending" if upload.state == "pending" else "completed"
    return UploadObject(
        id=f"upload_{upload.id}",
        bytes=upload.bytes,
        created_at=_seconds(upload.create_time),
        expires_at=_seconds(upload.create_time + timedelta(seconds=files.UPLOAD_S)),
        filename=upload.filename,
        status=state,
        file=file_object(entry_of(upload)) if state == "completed" else None,
    )


def part_object(part: Part) -> PartObject:
    """A part as clients see it."""
    return PartObject(id=f"part_{part.id}", created_at=_seconds(part.create_time), upload_id=f"upload_{part.file_id}")


def batch_object(found: FileBatch) -> BatchObject:
    """A batch as clients see it. One that was made through gRPC has an input file that cannot be read."""
    batch = found.batch
    end = _maybe(batch.end_time)
    lines = files_of(found)
    errors = None
    if found.errors:
        errors = BatchErrors(data=[BatchError(**dict(error)) for error in found.errors])
    input_file = f"file-of-{messages.batch_name(batch.id)}" if found.file_id is None else f"file-{found.file_id}"
    return BatchObject(
        id=messages.batch_name(batch.id),
        endpoint=found.endpoint,
        model=batch.models[0] if len(batch.models) == 1 else None,
        errors=errors,
        input_file_id=input_file,
        completion_window=found.completion_window or _window(batch.create_time, batch.expire_time),
        status=batch.state,  # type: ignore[arg-type]
        output_file_id=lines["output"],
        error_file_id=lines["error"],
        created_at=_seconds(batch.create_time),
        in_progress_at=_maybe(found.begin_time),
        expires_at=_maybe(batch.expire_time),
        finalizing_at=end if batch.state == "completed" else None,
        completed_at=end if batch.state == "completed" else None,
        failed_at=end if batch.state == "failed" else None,
        expired_at=end if batch.state == "expired" else None,
        cancelling_at=_maybe(found.cancel_time),
        cancelled_at=end if batch.state == "cancelled" else None,
        request_counts=RequestCounts(total=batch.total, completed=batch.completed, failed=batch.failed),
        usage=Usage(
            input_tokens=batch.prompt_tokens,
            output_tokens=batch.completion_tokens,
            total_tokens=batch.prompt_tokens + batch.completion_tokens,
        ),
        metadata=dict(batch.metadata) or None,
    )


def files_of(found: FileBatch) -> Mapping[Kind, str | None]:
    """The ids of output and error file of a batch that has ended, of those that have lines."""
    batch = found.batch
    unanswered = batch.total - batch.completed - batch.failed if batch.state == "cancelled" else 0
    lines = {"output": batch.completed, "error": batch.failed + unanswered}
    return {kind: file_name(kind, batch.id) if batch.is_terminal and lines[kind] else None for kind in KINDS}


def window_s(text: str) -> float:
    """A completion window in seconds. Raises INVALID_ARGUMENT."""
    found = _WINDOW.fullmatch(text)
    seconds = int(found[1]) * (3600.0 if found[2] == "h" else 86_400.0) if found else 0.0
    if not 0 < seconds <= messages.MAX_WINDOW_S:
        what = "must be 24h, or another number of hours (h) or days (d) up to 366d"
        raise invalid([Violation("completion_window", what)])
    return seconds


def metadata_of(given: Mapping[str, str] | None) -> Mapping[str, str]:
    """Metadata that can be stored. Raises INVALID_ARGUMENT."""
    wrong = messages.wrong_metadata(given or {}, "metadata")
    if wrong:
        raise invalid(wrong)
    return dict(given or {})


def page(data: Sequence[Any], more: bool) -> dict[str, Any]:
    """What a Page is made of."""
    ids = [item.id for item in data]
    return {"data": data, "first_id": ids[0] if ids else None, "last_id": ids[-1] if ids else None, "has_more": more}


def wrong(param: str, what: str) -> ApiError:
    """INVALID_ARGUMENT for one parameter."""
    return invalid([Violation(param, what)])


def _window(create_time: datetime, expire_time: datetime | None) -> str:
    """Of a batch made through gRPC, where it is any time or none."""
    if expire_time is None:
        return "none"
    return f"{max(1, round((expire_time - create_time).total_seconds() / 3600))}h"


def _seconds(time: datetime) -> int:
    return int(time.timestamp())


def _maybe(time: datetime | None) -> int | None:
    return None if time is None else _seconds(time)
