"""Housekeeping: ends, counts and removes batches, files and webhooks that are due, reports batches that no worker
serves, keeps the queue in order; one gateway at a time."""

import asyncio
from collections.abc import Callable, Set
from dataclasses import dataclass, field

import peewee

from service.api import messages
from service.clock import Clock, SystemClock
from service.db import endings, file_lists, files, hosts, turns, unserved, usage, webhooks
from service.db.availability import DATABASE_ERRORS, AvailabilityLog
from service.db.connection import Database, check_schema, lock_housekeeping
from service.gateway.unserved_log import UnservedLog
from service.telemetry import logs
from service.tenants import Quotas
from service.webhooks import deliverer

INTERVAL_S = 2.0
HOSTS_INTERVAL_S = 60.0
# Hosts forgotten per transaction.
FORGOTTEN = 100
# Looking after the queue reads all open batches.
QUEUE_INTERVAL_S = 5.0
# Rows removed per transaction and table: few enough to keep transactions short.
SLICE = 5_000
# Pieces of files, of which each is 1 MiB.
SLICE_PIECES = 64
# Ended batches per transaction whose tokens are added to their tenants'.
COUNTED = 1_000
# Expiring a batch of a million requests writes a result for each.
EXPIRE_TIMEOUT_S = 600.0

log = logs.get("housekeeping")


@dataclass(frozen=True)
class Housekeeping:
    """Uses a connection of its own. `retention_s` 0: no batch is removed for its age. `quotas` has tenants' weights.

    `is_unserved` tells whether no worker serves some models. A host of which nothing was seen for `host_forgotten_s` is
    forgotten.
    """

    database: Database
    retention_s: float
    is_unserved: Callable[[Set[str]], bool]
    host_forgotten_s: float
    quotas: Callable[[], Quotas] = Quotas
    clock: Clock = field(default_factory=SystemClock)
    _unserved: UnservedLog = field(default_factory=UnservedLog)

    async def follow(self) -> None:
        """Runs rounds for ever."""
        is_schema_there, availability = False, AvailabilityLog(log)
        loop, queue_at_s, hosts_at_s = asyncio.get_running_loop(), 0.0, 0.0
        while True:
            try:
                if not is_schema_there:
                    await self.database.run(check_schema)
                    is_schema_there = True
                is_more = await self.database.run(self.once)
                if loop.time() >= queue_at_s:
                    await self.database.run(self.look_after_queue)
                    queue_at_s = loop.time() + QUEUE_INTERVAL_S
                if loop.time() >= hosts_at_s:
                    await self.database.run(self.forget_hosts)
                    hosts_at_s = loop.time() + HOSTS_INTERVAL_S
                availability.back()
            except DATABASE_ERRORS as error:
                availability.away(error)
                is_more = False
            await asyncio.sleep(0 if is_more else INTERVAL_S)

    def once(self, db: peewee.PostgresqlDatabase) -> bool:
        """One round. True: there is more to do. Does nothing while another gateway does it."""
        with db.atomic():
            if not lock_housekeeping(db):
                return False
            expired = endings.expire(db, EXPIRE_TIMEOUT_S)
        for batch_id in expired:
            log.info("batch_expired", batch=messages.batch_name(batch_id))
        with db.atomic():
            if not lock_housekeeping(db):
                return bool(expired)
            endings.settle_cancelled(db)
            self._unserved.note(unserved.find(db, self.is_unserved), self.clock.monotonic())
            counted = usage.count_ended(db, COUNTED)
            if self.retention_s:
                for batch_id in endings.delete_old(db, self.retention_s):
                    log.info("batch_removed_for_age", batch=messages.batch_name(batch_id))
            for given_up in webhooks.give_up(db):
                deliverer.gave_up(given_up, messages.batch_name(given_up.batch_id), given_up.last_error)
            webhooks.delete_unaddressed(db)
            if self.retention_s:
                webhooks.delete_old(db, self.retention_s)
            if expired_files := files.expire(db):
                log.info("files_expired", files=expired_files)
            file_lists.forget(db)
        is_more = endings.purge(db, SLICE) or bool(expired)
        return files.purge(db, SLICE_PIECES) or is_more or counted == COUNTED

    def look_after_queue(self, db: peewee.PostgresqlDatabase) -> None:
        """Sets weights, mends the queue, decides what is pulled forward. Does nothing while another gateway does it."""
        quotas = self.quotas()
        with db.atomic():
            if not lock_housekeeping(db):
                return
            turns.set_weights(db, {name: quota.weight for name, quota in quotas.named.items()}, quotas.otherwise.weight)
            turns.mend(db)
            for batch_id in turns.pull_forward(db):
                log.info("batch_pulled_forward", batch=messages.batch_name(batch_id))

    def forget_hosts(self, db: peewee.PostgresqlDatabase) -> None:
        """Forgets hosts that are long gone. Does nothing while another gateway does it."""
        with db.atomic():
            if not lock_housekeeping(db):
                return
            if names := hosts.forget_old(db, self.host_forgotten_s, FORGOTTEN):
                log.info("hosts_forgotten", hosts=names)
