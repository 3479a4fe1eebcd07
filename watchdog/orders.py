"""Takes the orders that were left in Postgres for the guards of this host.

By the page, which reaches Postgres but not the watchdogs of all hosts.
"""

from contextlib import suppress
from dataclasses import dataclass

from service.db import recovery_orders
from service.db.availability import DATABASE_ERRORS
from service.db.connection import Database
from service.db.recovery_orders import MAX_PAUSE, Order
from service.telemetry import logs
from watchdog.guard import Guard
from watchdog.host import Host
from watchdog.record.audit_log import UnrecordedError

INTERVAL_S = 2.0

log = logs.get("orders")


@dataclass
class Orders:
    """Those for the workers and servers of this host."""

    database: Database
    workers: Host
    servers: Host

    def take(self) -> None:
        """Takes those that wait. While Postgres is away, none."""
        guards = {**self.workers.by_worker, **self.servers.by_worker}
        # The guards already report that Postgres is away.
        with suppress(*DATABASE_ERRORS):
            for order in self.database.call(recovery_orders.waiting, sorted(guards)):
                self._take(order, guards[order.worker_id])

    def _take(self, order: Order, guard: Guard) -> None:
        """Records an order. One that is recorded twice, because this process died in between, does no harm."""
        if order.kind != "paused" or order.left_s > 0:
            try:
                guard.order(order.kind, order.reason, min(max(0.0, order.left_s), MAX_PAUSE.total_seconds()))
            except UnrecordedError as error:
                log.warning("order_not_recorded", worker_id=order.worker_id, kind=order.kind, cause=str(error))
                return
        self.database.call(recovery_orders.recorded, order.id)
