"""Housekeeping: ends batches whose time is over, and removes what was deleted or is old. One gateway at a time."""

import asyncio
from dataclasses import dataclass

import peewee

from service import logs, messages
from service.db import batches
from service.db.connection import Database, Unreachable, check_schema, lock_housekeeping

INTERVAL_S = 2.0
# Rows removed by one transaction: few enough that it is over in a moment.
SLICE = 5_000
# Ending a batch of a million requests writes a result for each.
EXPIRE_TIMEOUT_S = 600.0

log = logs.get("housekeeping")


@dataclass(frozen=True)
class Housekeeping:
    """Works on a connection of its own. `retention_s` 0: nothing is removed for its age."""

    database: Database
    retention_s: float

    async def follow(self) -> None:
        """Goes round for ever."""
        is_schema_there = False
        while True:
            try:
                if not is_schema_there:
                    await self.database.run(check_schema)
                    is_schema_there = True
                is_more = await self.database.run(self.once)
            except Unreachable as error:
                # The presence of the workers tells of a database that is away.
                log.debug("database_away", cause=str(error).strip())
                is_more = False
            await asyncio.sleep(0 if is_more else INTERVAL_S)

    def once(self, db: peewee.PostgresqlDatabase) -> bool:
        """One round. True: there is more to remove. Does nothing while another gateway is at it."""
        with db.atomic():
            if not lock_housekeeping(db):
                return False
            for batch_id in batches.expire(db, EXPIRE_TIMEOUT_S):
                log.info("batch_expired", batch=messages.batch_name(batch_id))
            batches.settle_cancelled(db)
            if self.retention_s:
                for batch_id in batches.delete_old(db, self.retention_s):
                    log.info("batch_removed_for_age", batch=messages.batch_name(batch_id))
        return batches.purge(db, SLICE)
