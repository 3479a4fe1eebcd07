"""Tells through Postgres what the guards conclude, and takes the orders that were left there.

For the page, which reaches Postgres but not the watchdogs of all hosts.
"""

import socket
from contextlib import suppress
from dataclasses import dataclass

from google.protobuf.json_format import MessageToDict

from service.db import recovery_board
from service.db.availability import DATABASE_ERRORS
from service.db.connection import Database
from service.db.recovery_board import Order
from service.telemetry import logs
from watchdog.guard import Guard
from watchdog.host import Host
from watchdog.record.audit_log import UnrecordedError
from watchdog.servicer import MAX_PAUSE, status_message

INTERVAL_S = 2.0

log = logs.get("board")


@dataclass
class Board:
    """The part of all boards that belongs to this host."""

    database: Database
    workers: Host
    gateways: Host
    max_restarts_per_hour: int

    def look(self) -> None:
        """Tells and takes once. While Postgres is away, neither."""
        guards = {**self.workers.by_worker, **self.gateways.by_worker}
        # The guards already report that Postgres is away.
        with suppress(*DATABASE_ERRORS):
            for order in self.database.call(recovery_board.waiting, sorted(guards)):
                self._take(order, guards[order.worker_id])
            self.database.call(
                recovery_board.put, socket.gethostname(), self._told(self.workers), self._told(self.gateways)
            )

    def _take(self, order: Order, guard: Guard) -> None:
        """Records an order. One that is recorded twice, because this process died in between, does no harm."""
        if order.kind != "paused" or order.left_s > 0:
            try:
                guard.order(order.kind, order.reason, min(max(0.0, order.left_s), MAX_PAUSE.total_seconds()))
            except UnrecordedError as error:
                log.warning("order_not_recorded", worker_id=order.worker_id, kind=order.kind, cause=str(error))
                return
        self.database.call(recovery_board.recorded, order.id)

    def _told(self, host: Host) -> dict[str, dict[str, object]]:
        limit = self.max_restarts_per_hour
        return {
            worker_id: MessageToDict(status_message(worker_id, guard.snapshot, limit), preserving_proto_field_name=True)
            for worker_id, guard in host.by_worker.items()
        }
