"""What the page shows, sent as it changes: server-sent events, each with the parts that differ from the last ones."""

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import grpc
from fastapi import APIRouter, Depends, Query, Request
from fastapi.sse import EventSourceResponse, ServerSentEvent

from service.api.servicer import BatchServicer
from service.auth.roles import Role
from service.clock import Clock, is_set_within
from service.db import files
from service.db.availability import DATABASE_ERRORS, first_line
from service.db.connection import Database
from service.errors import ApiError
from service.http.page import fleet, hosts
from service.http.page.batches import NO_CONTEXT, as_json, file_batch
from service.http.page.sessions import Sessions
from service.insight.host_servicer import HostServicer
from service.insight.presence import Presence
from service.rpc import call_context
from vllm_batch.v1 import batch_service_pb2 as pb

View = Literal["batches", "batch", "workers", "tenants"]
States = Literal["", "open", "ended", "failed"]

INTERVAL_S = 1.0
# Who is not signed in any more sees nothing new from then on.
CHECK_S = 10.0
# How soon a browser comes back, in milliseconds.
RETRY_MS = 1000
# Streams that this process serves at once.
MAX_STREAMS = 200
# And of one token: nobody shuts others out.
MAX_STREAMS_EACH = 50
PAGE_SIZE = 50

_STATES: Mapping[States, "list[pb.BatchState]"] = {
    "": [],
    "open": [
        pb.BATCH_STATE_VALIDATING,
        pb.BATCH_STATE_IN_PROGRESS,
        pb.BATCH_STATE_FINALIZING,
        pb.BATCH_STATE_CANCELLING,
    ],
    "ended": [
        pb.BATCH_STATE_COMPLETED,
        pb.BATCH_STATE_FAILED,
        pb.BATCH_STATE_EXPIRED,
        pb.BATCH_STATE_CANCELLED,
    ],
    "failed": [pb.BATCH_STATE_FAILED, pb.BATCH_STATE_EXPIRED],
}


@dataclass
class Live:
    """Reads what is shown, once a second for each stream. `ending` ends all streams."""

    database: Database
    servicer: BatchServicer
    host_servicer: HostServicer
    presence: Presence
    clock: Clock
    ending: asyncio.Event
    # By the caller's name; all the same where no token is required.
    streams: Counter[str] = field(default_factory=Counter)

    async def parts(self, view: View, states: States, page: str, batch: str) -> dict[str, Any]:
        """All parts of a view by name. Raises what BatchService raises."""
        found: dict[str, Any] = {"service": fleet.accepting(self.presence)}
        if view == "batches":
            asked = pb.ListBatchesRequest(page_size=PAGE_SIZE, page_token=page)
            asked.states.extend(_STATES[states])
            listed = await self.servicer.ListBatches(asked, NO_CONTEXT)
            found["list"] = {"ids": [each.id for each in listed.batches], "next": listed.next_page_token}
            found |= {f"batch:{each.id}": as_json(each) for each in listed.batches}
        elif view == "batch":
            got = await self.servicer.GetBatch(pb.GetBatchRequest(batch_id=batch), NO_CONTEXT)
            found[f"batch:{got.batch.id}"] = as_json(got.batch)
            found["file"] = await self._file(batch)
        elif view == "workers":
            dogs, orders, events = await self.database.read(fleet.read)
            found["hosts"] = fleet.hosts(self.presence, self.clock, dogs, orders)
            found["events"] = [fleet.event_json(event) for event in events]
            # HostService answers operators alone.
            if call_context.current().caller.role is Role.OPERATE:
                found["host_list"] = await hosts.read(self.host_servicer)
        else:
            found["tenants"] = as_json(await self.servicer.ListTenants(pb.ListTenantsRequest(), NO_CONTEXT))["tenants"]
        return found

    async def _file(self, batch_id: str) -> dict[str, Any]:
        found = await file_batch(self.database, batch_id)
        file = None if found.file_id is None else await self.database.read(files.get, None, found.file_id)
        return {
            "endpoint": found.endpoint,
            "filename": None if file is None else file.filename,
            "bytes": None if file is None else file.bytes,
            "wrong_lines": len(found.errors or ()),
        }


def router(live: Live, sessions: Sessions) -> APIRouter:
    """The stream."""
    made = APIRouter(prefix="/page/api", include_in_schema=False)

    async def slot() -> AsyncIterator[None]:
        who, text = call_context.current().caller.name, ""
        if live.streams.total() >= MAX_STREAMS:
            text = f"{MAX_STREAMS} pages are open at this server"
        elif who and live.streams[who] >= MAX_STREAMS_EACH:
            text = f"{who} has {MAX_STREAMS_EACH} pages open at this server"
        if text:
            raise ApiError(grpc.StatusCode.RESOURCE_EXHAUSTED, text, "LIMIT_REACHED", retry_delay_s=10)
        live.streams[who] += 1
        try:
            yield
        finally:
            live.streams[who] -= 1
            # Names of tokens come and go.
            live.streams += Counter()

    @made.get("/live", name="/page/Follow", response_class=EventSourceResponse, dependencies=[Depends(slot)])
    async def follow(
        request: Request,
        view: View,
        states: States = "",
        page: Annotated[str, Query(max_length=100)] = "",
        batch: Annotated[str, Query(max_length=100)] = "",
    ) -> AsyncIterator[ServerSentEvent]:
        sent: dict[str, Any] = {}
        headers, checked_s = dict(request.headers), live.clock.monotonic()
        yield ServerSentEvent(comment="", retry=RETRY_MS)
        while not live.ending.is_set():
            try:
                if live.clock.monotonic() - checked_s > CHECK_S:
                    checked_s = live.clock.monotonic()
                    # A token may have another role or tenant by now.
                    call_context.current().caller = await sessions.caller("/page/Follow", headers)
                found = await live.parts(view, states, page, batch) | {"problem": ""}
            except ApiError as error:
                yield _event("refused", {"code": error.code.name, "message": error.message})
                return
            except DATABASE_ERRORS as error:
                found = sent | {"problem": f"Postgres cannot be reached: {first_line(error)}"}
            if changes := changed(sent, found):
                yield _event("parts", changes)
            sent = found
            await is_set_within(live.ending, INTERVAL_S)

    return made


def changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """The parts that differ, with None for those that are gone."""
    gone: dict[str, Any] = dict.fromkeys(before.keys() - now.keys())
    return gone | {name: part for name, part in now.items() if name not in before or before[name] != part}


def _event(name: str, data: Mapping[str, Any]) -> ServerSentEvent:
    return ServerSentEvent(event=name, raw_data=json.dumps(data, separators=(",", ":")))
