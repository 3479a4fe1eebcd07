"""Uploads: a file in parts, which may arrive in any order and at once."""

import asyncio
import contextlib
import hashlib

from fastapi import APIRouter, Request

from service.db import files
from service.db.availability import DATABASE_ERRORS
from service.db.connection import Database
from service.db.files import File, PartGoneError, PartsError
from service.errors import ApiError, not_found
from service.http import multipart, objects
from service.http.files import Keeping
from service.http.objects import CompleteUpload, CreateUpload, PartObject, UploadObject
from service.http.storing import PartWriter
from service.rpc import call_context
from service.telemetry import logs

MAX_PART_BYTES = 64 << 20
MAX_BYTES = 8 << 30

FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["data"],
                    "properties": {"data": {"type": "string", "format": "binary"}},
                }
            }
        },
    }
}

log = logs.get("uploads")


def router(database: Database, keeping: Keeping) -> APIRouter:
    """The operations on uploads."""
    made = APIRouter(prefix="/v1/uploads", tags=["uploads"])

    @made.post("", name="CreateUpload")
    async def create(asked: CreateUpload) -> UploadObject:
        most = min(MAX_BYTES, keeping.file_bytes)
        if asked.bytes > most:
            raise objects.wrong("bytes", f"is {asked.bytes}, at most {most} are allowed")
        lifetime_s = float(asked.expires_after.seconds) if asked.expires_after else keeping.lifetime_s
        given = call_context.current().caller.tenant, asked.filename, asked.bytes, lifetime_s, keeping.limits
        upload = await database.run_idempotent(files.begin_upload, *given)
        return objects.upload_object(upload)

    @made.post("/{upload_id}/parts", name="AddUploadPart", openapi_extra=FORM)
    async def add(upload_id: str, request: Request) -> PartObject:
        number = objects.number_of(upload_id, "upload_", "upload")
        try:
            part_id = await database.run_idempotent(files.begin_part, call_context.scope(), number)
        except PartsError as error:
            raise objects.wrong("data", str(error)) from None
        if part_id is None:
            raise not_found(f"pending upload {upload_id!r}")
        writer = PartWriter(database, part_id, MAX_PART_BYTES, "part")
        try:
            has_data = is_complete = False
            async for field, data in multipart.fields(request):
                if field.name != "data":
                    raise objects.wrong(field.name[:100] or "body", "is not a field of this form")
                if is_complete:
                    raise objects.wrong("data", "is given twice")
                has_data, is_complete = True, data is None
                if data is not None:
                    await writer.add(data)
            if not has_data:
                raise objects.wrong("data", "is required")
            await writer.end()
            part = await database.run_idempotent(files.finish_part, part_id, writer.size)
        except PartGoneError:
            raise not_found(f"pending upload {upload_id!r}") from None
        except BaseException as error:
            await asyncio.shield(_break_off(database, part_id, writer))
            if isinstance(error, PartsError):
                raise objects.wrong("data", str(error)) from None
            raise
        return objects.part_object(part)

    @made.post("/{upload_id}/complete", name="CompleteUpload")
    async def complete(upload_id: str, asked: CompleteUpload) -> UploadObject:
        number = objects.number_of(upload_id, "upload_", "upload")
        try:
            part_ids = [objects.number_of(part, "part_", "part") for part in asked.part_ids]
        except ApiError as error:
            raise objects.wrong("part_ids", error.message) from None
        # Looked for only where it matters: a file that fails its checksum.
        was_complete = (
            asked.md5 is not None and await database.read(files.get, call_context.scope(), number) is not None
        )
        try:
            upload = await database.run_idempotent(files.complete, call_context.scope(), number, part_ids)
        except PartsError as error:
            raise objects.wrong("part_ids", str(error)) from None
        if upload is None:
            raise not_found(f"upload {upload_id!r}")
        if asked.md5 is not None:
            await _check_md5(database, upload, asked.md5, was_complete)
        log.info("upload_completed", upload=upload_id, bytes=upload.bytes, parts=len(part_ids))
        return objects.upload_object(upload)

    @made.post("/{upload_id}/cancel", name="CancelUpload")
    async def cancel(upload_id: str) -> UploadObject:
        number = objects.number_of(upload_id, "upload_", "upload")
        scope = call_context.scope()
        upload = await database.retry_once(
            lambda is_again: database.run(files.discard, scope, number, "pending", *(["gone"] if is_again else []))
        )
        if upload is None:
            raise not_found(f"pending upload {upload_id!r}")
        return objects.upload_object(upload)

    return made


async def _break_off(database: Database, part_id: int, writer: PartWriter) -> None:
    """What was stored of a part that will not be complete goes with its upload; until then it counts."""
    with contextlib.suppress(Exception):
        await writer.settle()
    with contextlib.suppress(PartGoneError, *DATABASE_ERRORS):
        await database.run(files.finish_part, part_id, writer.size)


async def _check_md5(database: Database, upload: File, wanted: str, was_complete: bool) -> None:
    """Deletes a file with another checksum than the client's, unless somebody may have been told of the file before.

    Raises INVALID_ARGUMENT, or NOT_FOUND.
    """
    checksum, at = hashlib.md5(usedforsecurity=False), 0
    while piece := await database.read(files.read_piece, upload.id, at):
        await asyncio.to_thread(checksum.update, piece)
        at += len(piece)
    if at < upload.bytes:
        raise not_found(f"file {objects.file_name('input', upload.id)!r}, which was deleted meanwhile,")
    if checksum.hexdigest() != wanted.lower():
        if not was_complete:
            await database.run_idempotent(files.discard, upload.tenant, upload.id, "kept")
        raise objects.wrong("md5", f"does not fit: what has arrived has {checksum.hexdigest()}")
