"""What the page shows of hosts, workers and gateways, and the orders that it leaves for their watchdogs."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import peewee
from fastapi import APIRouter, Query
from pydantic import BaseModel, Field

from service.clock import Clock
from service.db import heartbeats, recoveries, recovery_orders, watchdogs
from service.db.chunks import host_of
from service.db.connection import Database
from service.db.recoveries import Event
from service.db.recovery_orders import MAX_PAUSE, Order
from service.db.watchdogs import SeenWatchdog
from service.errors import not_found
from service.http.page.signals import Sample, Signals
from service.insight.presence import Presence
from service.rpc import call_context
from service.telemetry import logs

EVENTS = 30

log = logs.get("page")


class GivenOrder(BaseModel):
    """An order for the watchdog of one worker or gateway."""

    worker_id: str = Field(min_length=1, max_length=512, pattern=r"^[^\x00]*$")
    kind: Literal["paused", "resumed", "budget_reset"]
    reason: str = Field(min_length=1, max_length=500, pattern=r"^[^\x00]*$")
    lasts_s: float = Field(default=0, ge=0, le=MAX_PAUSE.total_seconds())


def router(database: Database, signals: Signals) -> APIRouter:
    """The page's operations on hosts and workers."""
    made = APIRouter(prefix="/page/api", include_in_schema=False)

    @made.get("/signals", name="/page/GetSignals")
    async def samples() -> dict[str, list[Sample]]:
        return {worker_id: list(mine) for worker_id, mine in signals.samples.items()}

    @made.get("/events", name="/page/ListEvents")
    async def events(
        worker_id: Annotated[str, Query(max_length=512)] = "", before: Annotated[int | None, Query(ge=1)] = None
    ) -> list[dict[str, Any]]:
        who = worker_id.replace("\0", "") or None
        return [event_json(event) for event in await database.read(recoveries.list_page, who, before, EVENTS)]

    @made.post("/orders", name="/page/OrderRecovery", status_code=202)
    async def order(given: GivenOrder) -> dict[str, str]:
        by = call_context.current().caller.name
        reason = f"{given.reason} ({by}, on the page)" if by else f"{given.reason} (on the page)"
        if not await database.run(recovery_orders.leave, given.worker_id, given.kind, reason, given.lasts_s):
            raise not_found(f"a watchdog of {given.worker_id[:100]!r}")
        log.info("recovery_ordered", worker_id=given.worker_id, kind=given.kind)
        return {"status": "ordered"}

    return made


def read(db: peewee.PostgresqlDatabase) -> tuple[list[SeenWatchdog], list[Order], list[Event]]:
    """What Postgres has of all hosts."""
    return watchdogs.read(db), recovery_orders.waiting(db), recoveries.list_page(db, None, None, EVENTS)


def hosts(
    presence: Presence, clock: Clock, dogs: Sequence[SeenWatchdog], orders: Sequence[Order]
) -> list[dict[str, Any]]:
    """Each host with its watchdog, workers and gateways."""
    now, now_s = presence.now(), clock.monotonic()
    beats = {seen.beat.worker_id: seen for seen in now.beats}
    statuses = {str(status["worker_id"]): status for dog in dogs for status in dog.guards}
    ages = {dog.watchdog_id: dog.age_s for dog in dogs}
    ordered = {order.worker_id: order.kind for order in orders}
    names = sorted({*beats, *statuses})
    made: dict[str, dict[str, Any]] = {
        host: {"host": host, "watchdog_age_s": ages.get(host), "processes": []}
        for host in sorted(set(map(host_of, names)))
    }
    for name in names:
        seen, status = beats.get(name), statuses.get(name, {})
        process: dict[str, Any] = {
            "worker_id": name,
            "is_gateway": status.get("is_gateway", False),
            "ordered": ordered.get(name, ""),
            "status": status,
        }
        if seen is not None:
            contact = now.contact(seen)
            process |= {
                "phase": seen.beat.phase,
                "heartbeat_age_s": round(now.age_s(seen, now_s), 1),
                "life_s": round(seen.life_s + max(0.0, now_s - now.read_at_s)),
                "health": str(contact.health),
                "health_cause": contact.cause,
                "models": list(seen.beat.models),
                "address": seen.beat.address,
                "has_given_up": name in now.given_up,
                **heartbeats.failure(seen.beat),
            }
        made[host_of(name)]["processes"].append(process)
    return list(made.values())


def accepting(presence: Presence) -> dict[str, str]:
    """Why new work could not begin now; empty texts when it can."""
    refusal = presence.refusal()
    return {"reason": refusal.reason, "message": refusal.message} if refusal else {"reason": "", "message": ""}


def event_json(event: Event) -> dict[str, Any]:
    """An event of the audit log as the page reads it."""
    return {
        "id": event.id,
        "worker_id": event.worker_id,
        "kind": event.kind,
        "verdict": event.verdict,
        "reason": event.reason,
        "evidence": event.evidence,
        "outcome": event.outcome,
        "step": event.step,
        "timings": [[phase, seconds] for phase, seconds in event.timings.items()],
        "start_time": event.start_time.isoformat(),
        "end_time": event.end_time.isoformat() if event.end_time else None,
    }
