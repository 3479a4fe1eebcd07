"""Batches: made of a file at once, whether or not a worker lives; read, listed and cancelled."""

from typing import Annotated

from fastapi import APIRouter, Header, Query

from service.api import messages, named_models
from service.api.uploads import BOM
from service.db import endings, file_batches, files
from service.db.batches import StateError
from service.db.connection import Database
from service.db.file_batches import FileBatch, Spec
from service.db.limits import Limits
from service.errors import invalid, not_found
from service.http import objects
from service.http.objects import BatchObject, CreateBatch, Page
from service.rpc import call_context
from service.telemetry import logs
from service.webhook_targets import Networks

MAX_PAGE = 100
DEFAULT_PAGE = 20

log = logs.get("batches")


def router(database: Database, limits: Limits, webhook_networks: Networks) -> APIRouter:
    """The operations on batches."""
    made = APIRouter(prefix="/v1/batches", tags=["batches"])

    @made.post("", name="CreateBatch")
    async def create(
        asked: CreateBatch, retry: Annotated[str | None, Header(alias="x-stainless-retry-count")] = None
    ) -> BatchObject:
        call = call_context.current()
        window_s = objects.window_s(asked.completion_window)
        metadata = objects.metadata_of(asked.metadata)
        wrong = messages.wrong_webhook(
            asked.webhook or "", call.caller.tenant, limits.quotas(), webhook_networks, "webhook"
        )
        if wrong:
            raise invalid(wrong)
        kind, file_id = objects.file_of(asked.input_file_id)
        if kind != "input":
            raise objects.wrong("input_file_id", "must be a file with the purpose 'batch'")
        head = await database.read(files.read_piece, file_id, 0)
        named = named_models.of_line(head.removeprefix(BOM).lstrip().partition(b"\n")[0])
        # What Postgres cannot keep no model is called: the check says so.
        models = [named] if named and "\0" not in named else []
        spec = Spec(
            call.caller.tenant,
            call.caller.scope,
            call.caller.name,
            file_id,
            asked.endpoint,
            asked.completion_window,
            window_s,
            metadata,
            float(asked.output_expires_after.seconds) if asked.output_expires_after else None,
            models,
            call.id,
            call.traceparent,
            asked.webhook or None,
        )
        # SDKs count how often they have sent a request before.
        is_repeated = retry is not None and retry.isdecimal() and int(retry[:9]) > 0
        found = await database.retry_once(
            lambda is_again: database.run(file_batches.create, spec, limits, is_repeated or is_again)
        )
        if found is None:
            raise not_found(f"file {asked.input_file_id!r}")
        batch, is_new = found
        name = messages.batch_name(batch.batch.id)
        log.info("batch_created" if is_new else "batch_created_before", batch=name, file=asked.input_file_id)
        return objects.batch_object(batch)

    @made.get("", name="ListBatches")
    async def list_batches(
        after: str | None = None, limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = DEFAULT_PAGE
    ) -> Page[BatchObject]:
        before = objects.number_of(after, "batch_", "batch") if after else None
        found = await database.read(file_batches.list_page, before, limit + 1, call_context.scope())
        data = [objects.batch_object(batch) for batch in found[:limit]]
        return Page[BatchObject](**objects.page(data, len(found) > limit))

    @made.get("/{batch_id}", name="GetBatch")
    async def get(batch_id: str) -> BatchObject:
        return objects.batch_object(await _batch(database, batch_id))

    @made.post("/{batch_id}/cancel", name="CancelBatch")
    async def cancel(batch_id: str) -> BatchObject:
        number = objects.number_of(batch_id, "batch_", "batch")
        await _batch(database, batch_id)
        try:
            await database.run_idempotent(endings.cancel, number, call_context.scope())
        except StateError as error:
            raise objects.wrong("batch_id", f"{batch_id} {error}: it cannot be cancelled any more") from None
        found = await _batch(database, batch_id)
        log.info("batch_cancelled", batch=batch_id, state=found.batch.state)
        return objects.batch_object(found)

    return made


async def _batch(database: Database, batch_id: str) -> FileBatch:
    """A batch of the caller's. Raises NOT_FOUND."""
    number = objects.number_of(batch_id, "batch_", "batch")
    found = await database.read(file_batches.get, number, call_context.scope())
    if found is None:
        raise not_found(f"batch {batch_id!r}")
    return found
