"""The gateway's link to each worker: a health Watch, held open, and a regular Check that the worker still answers.

A process that dies breaks its Watch at once; a frozen one stops answering the transport's pings; one whose event loop
is blocked keeps both alive and answers nothing: the Check detects that.
"""

import asyncio
from collections.abc import Awaitable, Callable, Set
from dataclasses import dataclass, field
from typing import Any, TypeVar

import grpc
from grpc_health.v1 import health_pb2

from service.clock import Clock
from service.insight.channels import Channels, Connection
from service.insight.routing import Contact, LinkState
from service.rpc.services import BATCH_SERVICE
from service.telemetry import logs

# A blocked worker is noticed after their sum at the latest.
CHECK_INTERVAL_S = 2.0
CHECK_TIMEOUT_S = 3.5
# Of a call that nobody here has cancelled: the worker has, as it ends, or a proxy.
CANCELLED = "the call was cancelled there"
# After a link broke, in addition to the channel's own backoff.
RETRY_INTERVAL_S = 0.2

T = TypeVar("T")

log = logs.get("links")


class LostError(Exception):
    """The link to the worker was lost during a call."""


@dataclass
class Links:
    """One link per address. `on_change` is called after each change of a contact."""

    channels: Channels
    clock: Clock
    on_change: Callable[[], None]
    contacts: dict[str, Contact] = field(default_factory=dict)
    _tasks: dict[str, "asyncio.Task[None]"] = field(default_factory=dict)
    _until_lost: dict[str, set["asyncio.Future[Any]"]] = field(default_factory=dict)

    async def keep(self, addresses: Set[str]) -> None:
        """Opens and closes links until there is one to each of these addresses and to no other."""
        for address in addresses - self._tasks.keys():
            self._tasks[address] = asyncio.create_task(self._follow(address))
        for address in self._tasks.keys() - addresses:
            await self._drop(address)

    async def close(self) -> None:
        """Ends all links."""
        await self.keep(frozenset())

    async def call(self, address: str, call: Awaitable[T]) -> T:
        """Awaits a call to a worker. Raises what the call raises, or LostError as soon as the link is lost."""
        task = asyncio.ensure_future(call)
        under_way = self._until_lost.setdefault(address, set())
        under_way.add(task)
        try:
            return await task
        except asyncio.CancelledError:
            # Cancelled by `_set`, because the client is gone, or by the worker's side: gRPC does not tell them apart.
            if task not in under_way:
                raise LostError(self.contacts.get(address, Contact()).cause) from None
            if not _is_cancelled():
                raise LostError(CANCELLED) from None
            raise
        finally:
            under_way.discard(task)
            task.cancel()

    async def _drop(self, address: str) -> None:
        task = self._tasks.pop(address)
        task.cancel()
        await asyncio.wait({task})
        self._set(address, LinkState.UNREACHABLE, "its heartbeat is stale")
        await self.channels.close(address)
        self.contacts.pop(address, None)
        self._until_lost.pop(address, None)

    async def _follow(self, address: str) -> None:
        """Keeps the link up, for ever."""
        while True:
            try:
                async with self.channels.use(address) as worker:
                    await self._watch(worker)
                    if not self.channels.is_current(worker):
                        # The link moves to the next connection, and counts as up until that one breaks.
                        continue
                cause = "its health stream ended"
            except asyncio.CancelledError:
                if _is_cancelled():
                    raise
                cause = CANCELLED
            except Exception as error:  # noqa: BLE001 - whatever broke the link, it is opened again
                cause = (error.details() or "") if isinstance(error, grpc.RpcError) else repr(error)
            self._set(address, LinkState.UNREACHABLE, cause)
            await asyncio.sleep(RETRY_INTERVAL_S)

    async def _watch(self, worker: Connection) -> None:
        """Follows one Watch to its end, or until new calls begin on another connection.

        Raises RpcError if it breaks or a Check gets no answer.
        """
        stub = worker.health
        request = health_pb2.HealthCheckRequest(service=BATCH_SERVICE)
        watch: Any = stub.Watch(request)
        reading: asyncio.Future[Any] | None = None
        try:
            while self.channels.is_current(worker):
                reading = reading or asyncio.ensure_future(watch.read())
                done, _ = await asyncio.wait({reading}, timeout=CHECK_INTERVAL_S)
                if done:
                    response, reading = reading.result(), None
                    if response is grpc.aio.EOF:
                        return
                else:
                    response = await stub.Check(request, timeout=CHECK_TIMEOUT_S)
                is_serving = response.status == health_pb2.HealthCheckResponse.SERVING
                self._set(worker.address, LinkState.SERVING if is_serving else LinkState.NOT_SERVING)
        finally:
            watch.cancel()
            if reading is not None:
                reading.cancel()
                await asyncio.gather(reading, return_exceptions=True)

    def _set(self, address: str, health: LinkState, cause: str = "") -> None:
        if self.contacts.get(address, Contact()).health is health:
            return
        log.info("worker_contact", address=address, health=health, cause=cause)
        self.contacts[address] = Contact(health, self.clock.monotonic(), cause)
        if health is LinkState.UNREACHABLE:
            under_way = self._until_lost.get(address, set())
            while under_way:
                under_way.pop().cancel()
        self.on_change()


def _is_cancelled() -> bool:
    """True if the running task was cancelled, rather than a call that it waits for."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
