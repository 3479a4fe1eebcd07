"""What the page asks about one batch, and does with it: the calls of BatchService, and a look at single lines."""

import contextlib
import uuid
from collections.abc import AsyncIterator, Mapping, Set
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from starlette.responses import StreamingResponse

from service.api import messages
from service.api.servicer import BatchServicer
from service.db import file_batches, files, requests, results
from service.db.connection import Database
from service.db.file_batches import FileBatch
from service.errors import not_found
from service.http import content
from service.rpc import call_context
from vllm_batch.v1 import batch_service_pb2 as pb

Filter = Literal["all", "succeeded", "failed"]
FILTERS: Mapping[Filter, "pb.ResultFilter"] = {
    "all": pb.RESULT_FILTER_UNSPECIFIED,
    "succeeded": pb.RESULT_FILTER_SUCCEEDED,
    "failed": pb.RESULT_FILTER_FAILED,
}
# Of a result in a list.
LISTED_CHARS = 400
# Of a request or a result that is looked at: a larger request is cut, of a larger result only its size is told.
SHOWN_CHARS = 200_000
SHOWN_BYTES = 1 << 20
# Of a wrong line, and how much of a file is read to find it.
LINE_CHARS = 2_000
SEARCHED_BYTES = 64 << 20
# Calls of BatchService, made in this process, ask nothing of gRPC.
NO_CONTEXT: Any = None


def router(database: Database, servicer: BatchServicer) -> APIRouter:
    """The page's operations on batches."""
    made = APIRouter(prefix="/page/api/batches/{batch_id}", include_in_schema=False)

    @made.get("/lines", name="/page/GetLines")
    async def lines(batch_id: str) -> list[dict[str, object]]:
        found = await file_batch(database, batch_id)
        errors = found.errors or []
        texts = await _lines(database, found.file_id, {int(error["line"]) for error in errors if error.get("line")})
        return [{**error, "text": texts.get(error.get("line") or 0)} for error in errors]

    @made.get("/errors", name="/page/ListErrors")
    async def errors(batch_id: str) -> dict[str, Any]:
        return as_json(await servicer.ListErrors(pb.ListErrorsRequest(batch_id=batch_id), NO_CONTEXT))

    @made.get("/results", name="/page/ListResults")
    async def listed(batch_id: str, filter: Filter = "all", after: str = "") -> dict[str, Any]:
        asked = pb.StreamResultsRequest(batch_id=batch_id, filter=FILTERS[filter], resume_token=after)
        async for response in servicer.StreamResults(asked, NO_CONTEXT):
            return {"results": [_listed(result) for result in response.results], "after": response.resume_token}
        return {"results": [], "after": ""}

    @made.get("/request", name="/page/GetRequest")
    async def request(batch_id: str, custom_id: Annotated[str, Query(max_length=4096)]) -> dict[str, Any]:
        number, scope = messages.batch_id(batch_id), call_context.scope()
        name = custom_id.replace("\0", "")
        found = await database.read(requests.read_one, number, name, SHOWN_CHARS, scope)
        if found is None:
            raise not_found(f"a request {name[:100]!r} in {batch_id[:100]}")
        result = await database.read(results.read_one, number, name, SHOWN_BYTES, scope)
        answer = None if result is None else as_json(messages.result_message(number, result))
        return {"request": vars(found), "result": answer}

    @made.get("/output", name="/page/GetOutput")
    async def output(batch_id: str, filter: Filter = "all") -> StreamingResponse:
        asked = pb.StreamResultsRequest(batch_id=batch_id, filter=FILTERS[filter], format=pb.RESULT_FORMAT_JSONL)
        # An error must come before the headers.
        await file_batch(database, batch_id)
        name = f"{batch_id}{'' if filter == 'all' else f'-{filter}'}.jsonl"
        headers = {"content-disposition": f'attachment; filename="{name}"', "x-content-type-options": "nosniff"}
        return StreamingResponse(_output(servicer, asked), headers=headers, media_type="application/jsonl")

    @made.post("/cancel", name="/page/CancelBatch")
    async def cancel(batch_id: str) -> dict[str, Any]:
        return as_json(await servicer.CancelBatch(pb.CancelBatchRequest(batch_id=batch_id), NO_CONTEXT))

    @made.delete("", name="/page/DeleteBatch")
    async def delete(batch_id: str) -> dict[str, Any]:
        return as_json(await servicer.DeleteBatch(pb.DeleteBatchRequest(batch_id=batch_id), NO_CONTEXT))

    @made.post("/retry", name="/page/RetryBatch")
    async def retry(batch_id: str) -> dict[str, Any]:
        asked = pb.RetryBatchRequest(batch_id=batch_id, request_id=str(uuid.uuid4()))
        return as_json(await servicer.RetryBatch(asked, NO_CONTEXT))

    return made


def as_json(message: Message) -> dict[str, Any]:
    """A message of the contract as the page reads it."""
    return MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)


def _listed(result: pb.Result) -> dict[str, Any]:
    """A result in a list: the beginning of what it says."""
    said = result.response.body_json or result.error.message
    return {
        "custom_id": result.custom_id,
        "index": result.index,
        "status_code": result.response.status_code,
        "code": result.error.code,
        "said": said[:LISTED_CHARS],
        "finish_time": result.finish_time.ToJsonString(),
    }


async def file_batch(database: Database, batch_id: str) -> FileBatch:
    """The batch with its file, if the caller may see it. Raises NOT_FOUND."""
    found = await database.read(file_batches.get, messages.batch_id(batch_id), call_context.scope())
    if found is None:
        raise not_found(f"batch {batch_id[:100]!r}")
    return found


async def _lines(database: Database, file_id: int | None, wanted: Set[int]) -> dict[int, str]:
    """The lines of a file with these numbers, from 1, as far as they are near enough to its begin."""
    found: dict[int, str] = {}
    if file_id is None or not wanted or await database.read(files.get, None, file_id) is None:
        # Of a file that was deleted or has expired the pieces are removed later.
        return found
    number, rest = 1, b""
    read = content.of_input(database, file_id, 0, SEARCHED_BYTES)
    async with contextlib.aclosing(read):
        with contextlib.suppress(content.GoneError):
            async for piece in read:
                *whole, rest = (rest + piece).split(b"\n")
                for line in whole:
                    if number in wanted:
                        found[number] = _text(line)
                    number += 1
                if number > max(wanted):
                    return found
    # The last line needs no end.
    if number in wanted and rest:
        found[number] = _text(rest)
    return found


def _text(line: bytes) -> str:
    return line.decode("utf-8", "replace")[:LINE_CHARS]


async def _output(servicer: BatchServicer, asked: pb.StreamResultsRequest) -> AsyncIterator[bytes]:
    async for response in servicer.StreamResults(asked, NO_CONTEXT):
        yield response.jsonl
