"""Delivers the events of batches that have ended: at least once, each by one process at a time."""

import asyncio
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import UUID, uuid4

from prometheus_client import Counter

from service import failpoints, webhook_targets
from service.auth import key_files
from service.clock import Clock
from service.db import webhooks
from service.db.availability import DATABASE_ERRORS, AvailabilityLog
from service.db.connection import Database, check_schema
from service.db.webhooks import Delivery, Outcome
from service.telemetry import logs
from service.tenants import Quotas
from service.webhook_targets import Networks
from service.webhooks import retries, signing
from service.webhooks.retries import Breaker, Target

if TYPE_CHECKING:
    from service.webhooks.sender import Sender

# How soon an event is seen.
INTERVAL_S = 0.5
# Deliveries under way at once.
CONCURRENCY = 32
# Of one tenant, however many targets it names: if none of them answers, others' events go on.
PER_TENANT = 16
# Tests under way at once; others wait.
TESTS = 4
# For reading a tenant's secret.
SIGN_S = 5.0
# How long those may take that are under way when the process ends.
END_S = 4.0

TRIES = Counter("vllm_batch_webhook_tries", "Tries to deliver a webhook: delivered or failed.", ["outcome"])
for _outcome in ("delivered", "failed"):
    # Shown from the start: one that appears with its first value never grew, to Prometheus.
    TRIES.labels(_outcome)
GIVEN_UP = Counter("vllm_batch_webhooks_given_up", "Webhooks that were given up after a day.")

log = logs.get("webhooks")


def gave_up(delivery: Delivery, batch: str, cause: str) -> None:
    """Tells that an event is not tried any more."""
    GIVEN_UP.inc()
    log.error(
        "webhook_given_up",
        webhook=signing.event_name(delivery.id),
        batch=batch,
        target=_origin(delivery),
        tries=delivery.tries,
        cause=cause,
    )


@dataclass(frozen=True)
class Signer:
    """Signs what goes to tenants' targets, with the secrets that their files have at that moment."""

    quotas: Callable[[], Quotas]
    clock: Clock

    def signed(self, tenant: str, event: UUID, body: str) -> Mapping[str, str]:
        """The headers for a body. Raises ValueError or OSError if the tenant's secret cannot be used."""
        webhook = self.quotas().of(tenant).webhook
        if webhook is None:
            raise ValueError(f"tenant {tenant} has no webhook secret in BATCH_TENANTS_FILE")
        secrets = key_files.read_webhook_secrets(Path(webhook.secret_file))
        return signing.headers(secrets, signing.event_name(event), body, self.clock.now())


@dataclass
class Deliverer:
    """Sends to what `networks` and the Internet have. `name_of` gives a batch's id as clients know it."""

    database: Database
    networks: Networks
    signer: Signer
    name_of: Callable[[int], str]
    _breaker: Breaker = field(default_factory=Breaker)
    _urls: Mapping[str, str] = field(default_factory=dict)
    _tasks: dict[asyncio.Task[None], Target] = field(default_factory=dict)
    _testing: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(TESTS))

    async def follow(self) -> None:
        """Delivers for ever; what is under way when it is cancelled may end."""
        is_schema_there, availability = False, AvailabilityLog(log)
        try:
            while True:
                has_begun = False
                try:
                    if not is_schema_there:
                        await self.database.run(check_schema)
                        is_schema_there = True
                    has_begun = await self._round()
                    availability.back()
                except DATABASE_ERRORS as error:
                    availability.away(error)
                if has_begun:
                    # Targets that are full now are left out of the next look, which finds what waits behind them.
                    continue
                if self._tasks:
                    await asyncio.wait(self._tasks, timeout=INTERVAL_S, return_when=asyncio.FIRST_COMPLETED)
                else:
                    await asyncio.sleep(INTERVAL_S)
        finally:
            if self._tasks:
                await asyncio.wait(self._tasks, timeout=END_S)

    async def test(self, tenant: str, url: str) -> tuple[Outcome, str, float]:
        """Sends an event that says nothing, signed as the tenant's. Returns what came of it, its id, how long it took.

        It does not count for the target, and is not tried again.
        """
        event = uuid4()
        name = signing.event_name(event)
        body = signing.body(name, signing.TEST_TYPE, signing.TEST_BATCH, self.signer.clock.now())
        async with self._testing:
            begin_s = self._now_s()
            outcome = await self._send(tenant, event, url, body)
            took_s = self._now_s() - begin_s
        log.info("webhook_tested", target=webhook_targets.origin(url), status=outcome.status, cause=outcome.error)
        return outcome, name, took_s

    def resting(self) -> int:
        """How many targets rest. Thread-safe."""
        return len(self._breaker.resting(self._now_s()))

    async def _round(self) -> bool:
        """Begins what is due. True: it has begun something, and there may be more."""
        urls = _urls(self.signer.quotas())
        if urls != self._urls:
            await self.database.run(webhooks.readdress, urls)
            self._urls = urls
        free = CONCURRENCY - len(self._tasks)
        if free <= 0:
            return False
        full = self._breaker.full(self._tasks.values(), self._now_s())
        at_work = [tenant for tenant, _ in self._tasks.values()]
        busy = [tenant for tenant in {*at_work} if at_work.count(tenant) >= PER_TENANT]
        chosen = self._chosen(await self.database.run(webhooks.due, urls, free, full, busy))
        if not chosen:
            return False
        taken = await self.database.run(webhooks.claim, chosen)
        for claimed in taken:
            task = asyncio.create_task(self._deliver(claimed), name=f"webhook {claimed.number}")
            self._tasks[task] = _target(claimed)
            task.add_done_callback(self._ended)
        return bool(taken)

    def _chosen(self, found: list[Delivery]) -> list[UUID]:
        """As many of them as their targets and tenants may have."""
        busy, now_s, chosen = list(self._tasks.values()), self._now_s(), []
        for each in found:
            target = _target(each)
            of_tenant = sum(tenant == each.tenant for tenant, _ in busy)
            if of_tenant < PER_TENANT and busy.count(target) < self._breaker.allowance(target, now_s):
                busy.append(target)
                chosen.append(each.id)
        return chosen

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.pop(task, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            # Its lease ends, and it is tried again.
            log.error("webhook_not_recorded", cause=str(error), exc_info=error)

    async def _deliver(self, claimed: Delivery) -> None:
        """Sends a delivery and writes what came of it. If that cannot be written, it is sent again after its lease."""
        batch, begin_s = self.name_of(claimed.batch_id), self._now_s()
        failpoints.hit("webhook.before_send")
        body = signing.body(signing.event_name(claimed.id), claimed.type, batch, claimed.create_time)
        outcome = await self._send(claimed.tenant, claimed.id, claimed.url or "", body)
        failpoints.hit("webhook.before_record")
        delay_s = retries.delay_s(claimed.tries, random.random())
        recorded = await self.database.run(webhooks.record, claimed, outcome, delay_s)
        TRIES.labels("failed" if outcome.error else "delivered").inc()
        told = {"webhook": signing.event_name(claimed.id), "batch": batch, "target": _origin(claimed)}
        if not outcome.error:
            took_s = round(self._now_s() - begin_s, 3)
            log.info("webhook_delivered", **told, type=claimed.type, tries=claimed.tries, took_s=took_s)
        elif recorded is not None and recorded[0] == "given_up":
            gave_up(claimed, batch, outcome.error)
        else:
            log.warning("webhook_failed", **told, tries=claimed.tries, cause=outcome.error)
        await self._judge(claimed, outcome)

    async def _judge(self, claimed: Delivery, outcome: Outcome) -> None:
        """Lets a target rest that keeps failing."""
        target = _target(claimed)
        if not outcome.error:
            if self._breaker.succeeded(target):
                log.info("webhook_target_back", tenant=claimed.tenant, target=_origin(claimed))
            return
        rest_s = self._breaker.failed(target, self._now_s())
        if rest_s is not None:
            put_off = await self.database.run(webhooks.rest, *target, rest_s)
            log.warning(
                "webhook_target_rests", tenant=claimed.tenant, target=_origin(claimed), rest_s=rest_s, put_off=put_off
            )

    async def _send(self, tenant: str, event: UUID, url: str, body: str) -> Outcome:
        try:
            # In a thread: the file may be on a disk that hangs.
            async with asyncio.timeout(SIGN_S):
                headers = await asyncio.to_thread(self.signer.signed, tenant, event, body)
        except (OSError, ValueError) as error:
            # Where the file is concerns the operator, not whoever sees the outcome.
            log.error("webhook_secret_unusable", tenant=tenant, cause=str(error) or type(error).__name__)
            return Outcome(None, "cannot be signed: the tenant has no secret, or its file cannot be used")
        return await self._sender.post(url, headers, body)

    @cached_property
    def _sender(self) -> "Sender":
        # Most gateways deliver nothing, and start sooner without its libraries.
        from service.webhooks.sender import Sender

        return Sender(self.networks)

    def _now_s(self) -> float:
        return self.signer.clock.monotonic()


def _urls(quotas: Quotas) -> Mapping[str, str]:
    """The targets of tenants that have one."""
    found = {name: quota.webhook.url for name, quota in quotas.named.items() if quota.webhook is not None}
    return {name: url for name, url in found.items() if url is not None}


def _origin(delivery: Delivery) -> str:
    return webhook_targets.origin(delivery.url or "")


def _target(delivery: Delivery) -> Target:
    return delivery.tenant, _origin(delivery)
