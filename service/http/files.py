"""Files: sent in one call, listed, read from any byte on, deleted."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Annotated, Literal

from fastapi import APIRouter, Header, Query, Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from service.db import file_lists, files, output
from service.db.availability import DATABASE_ERRORS
from service.db.connection import Database
from service.db.file_lists import Entry, Kind
from service.db.files import PartGoneError
from service.db.limits import Limits
from service.errors import not_found
from service.http import content, errors, multipart, objects, ranges
from service.http.objects import DeletedFile, FileObject, Page
from service.http.storing import PartWriter
from service.rpc import call_context
from service.telemetry import logs

MAX_PAGE = 10_000
# Of a field that is not a file.
MAX_FIELD_BYTES = 1 << 10
EXPIRES = "expires_after[anchor]", "expires_after[seconds]"

FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"type": "string", "enum": ["batch"]},
                        EXPIRES[0]: {"type": "string", "enum": ["created_at"]},
                        EXPIRES[1]: {
                            "type": "integer",
                            "minimum": objects.MIN_LIFETIME_S,
                            "maximum": objects.MAX_LIFETIME_S,
                        },
                    },
                    "dependentRequired": {EXPIRES[0]: [EXPIRES[1]], EXPIRES[1]: [EXPIRES[0]]},
                }
            }
        },
    }
}
BYTES = {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}}

log = logs.get("files")


@dataclass(frozen=True)
class Keeping:
    """How long files are kept that say nothing about it, in seconds; None: until they are deleted. And how large."""

    lifetime_s: float | None
    file_bytes: int
    limits: Limits


def router(database: Database, keeping: Keeping) -> APIRouter:
    """The operations on files."""
    made = APIRouter(prefix="/v1/files", tags=["files"])

    @made.post("", name="CreateFile", openapi_extra=FORM)
    async def create(request: Request) -> FileObject:
        tenant = call_context.current().caller.tenant
        file_id, part_id = await database.run_idempotent(files.begin, tenant, keeping.limits)
        writer = PartWriter(database, part_id, keeping.file_bytes)
        try:
            form = await _receive(request, writer)
            await writer.end()
            lifetime_s = _lifetime_s(form, keeping.lifetime_s)
            file = part_id, _filename(form["file"]), writer.size, lifetime_s
            made = await database.retry_once(
                lambda is_again: database.run(files.finish, file_id, *file, keeping.limits, is_again)
            )
        except PartGoneError:
            made = None
        except BaseException:
            await asyncio.shield(_discard(database, file_id, writer))
            raise
        if made is None:
            raise not_found("the file, which took too long to arrive,")
        log.info("file_stored", file=objects.file_name("input", made.id), bytes=made.bytes)
        return objects.file_object(objects.entry_of(made))

    @made.get("", name="ListFiles")
    async def list_files(
        after: str | None = None,
        limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = MAX_PAGE,
        order: Literal["asc", "desc"] = "desc",
        purpose: str | None = None,
    ) -> Page[FileObject]:
        kinds: list[Kind] = []
        if purpose in (None, "batch"):
            kinds.append("input")
        if purpose in (None, "batch_output"):
            kinds += output.KINDS
        place = objects.file_of(after) if after else None
        if "output" in kinds:
            # Nobody waits for what others' batches have.
            await content.measure_ended(database, call_context.scope())
        found = await database.read(file_lists.page, call_context.scope(), kinds, place, limit + 1, order)
        if found is None:
            raise not_found(f"file {after!r}")
        data = [objects.file_object(entry) for entry in found[:limit]]
        return Page[FileObject](**objects.page(data, len(found) > limit))

    @made.get("/{file_id}", name="GetFile")
    async def get(file_id: str) -> FileObject:
        return objects.file_object(await _entry(database, file_id))

    @made.delete("/{file_id}", name="DeleteFile")
    async def delete(file_id: str) -> DeletedFile:
        kind, number = objects.file_of(file_id)
        await _entry(database, file_id)
        # What is not there any more by then is deleted.
        if kind == "input":
            await database.run_idempotent(files.discard, call_context.scope(), number, "kept")
        else:
            await database.run_idempotent(output.delete, number, kind)
        log.info("file_deleted", file=file_id)
        return DeletedFile(id=file_id)

    @made.get("/{file_id}/content", name="GetFileContent", response_class=Response, responses={200: BYTES, 206: BYTES})
    async def read(
        request: Request,
        file_id: str,
        range_: Annotated[str | None, Header(alias="range")] = None,
        if_range: Annotated[str | None, Header()] = None,
    ) -> Response:
        found = await _entry(database, file_id)
        # What is in a file never changes.
        tag = f'"{file_id}"'
        headers = {"accept-ranges": "bytes", "etag": tag}
        try:
            asked = ranges.asked(range_ if if_range in (None, tag) else None, found.bytes)
        except ranges.UnsatisfiableError:
            said = errors.body(f"the file has {found.bytes} bytes", 416, "range", "range_not_satisfiable")
            headers["content-range"] = f"bytes */{found.bytes}"
            return JSONResponse(said, 416, headers)
        first, end = asked or (0, found.bytes)
        headers["content-length"] = str(end - first)
        if asked:
            headers["content-range"] = f"bytes {first}-{end - 1}/{found.bytes}"
        if request.method == "HEAD":
            # Nothing is read that nobody gets.
            return Response(None, 206 if asked else 200, headers, "application/octet-stream")
        return StreamingResponse(
            _bytes(database, found, first, end), 206 if asked else 200, headers, "application/octet-stream"
        )

    return made


def _bytes(database: Database, found: Entry, first: int, end: int) -> AsyncGenerator[bytes]:
    if found.kind == "input":
        return content.of_input(database, found.number, first, end)
    return content.of_output(database, found.number, found.kind, first, end)


async def _entry(database: Database, file_id: str) -> Entry:
    """A file of the caller's. Raises NOT_FOUND."""
    kind, number = objects.file_of(file_id)
    if kind != "input":
        await content.measured(database, number, call_context.scope())
    found = await database.read(file_lists.one, call_context.scope(), kind, number)
    if found is None:
        raise not_found(f"file {file_id!r}")
    return found


async def _receive(request: Request, writer: PartWriter) -> dict[str, str]:
    """The fields of the form; of the file its name, while its bytes go to the writer. Raises INVALID_ARGUMENT."""
    form: dict[str, str] = {}
    async for field, data in multipart.fields(request):
        if field.name == "file" and field.filename is not None:
            if data is None:
                form["file"] = field.filename
            elif "file" in form:
                raise objects.wrong("file", "is given twice")
            else:
                await writer.add(data)
        elif field.name in ("purpose", *EXPIRES):
            form[field.name] = form.get(field.name, "") + (data or b"").decode("utf-8", "replace")
            if len(form[field.name]) > MAX_FIELD_BYTES:
                raise objects.wrong(field.name, "is too long")
        elif field.name == "file":
            raise objects.wrong("file", "must be a file: it has no filename")
        else:
            raise objects.wrong(field.name[:100] or "body", "is not a field of this form")
    if "file" not in form:
        raise objects.wrong("file", "is required")
    if form.get("purpose") != "batch":
        raise objects.wrong("purpose", "must be 'batch'")
    return form


def _lifetime_s(form: dict[str, str], otherwise_s: float | None) -> float | None:
    anchor, seconds = (form.get(name) for name in EXPIRES)
    if anchor is None and seconds is None:
        return otherwise_s
    if anchor != "created_at":
        raise objects.wrong(EXPIRES[0], "must be 'created_at'")
    digits = seconds or ""
    if not (digits.isascii() and digits.isdigit() and len(digits) < 10):
        raise objects.wrong(EXPIRES[1], "must be a whole number of seconds")
    if not objects.MIN_LIFETIME_S <= int(digits) <= objects.MAX_LIFETIME_S:
        raise objects.wrong(EXPIRES[1], f"must be from {objects.MIN_LIFETIME_S} to {objects.MAX_LIFETIME_S}")
    return float(digits)


def _filename(name: str) -> str:
    return name.replace("\0", "")[: objects.MAX_FILENAME]


async def _discard(database: Database, file_id: int, writer: PartWriter) -> None:
    """Removes what has arrived of a file that will not be complete."""
    with contextlib.suppress(Exception):
        await writer.settle()
    with contextlib.suppress(*DATABASE_ERRORS):
        await database.run(files.discard, None, file_id, "arriving")
