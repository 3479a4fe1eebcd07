"""The connections to the workers. Opened on first use, and only here."""

from collections.abc import AsyncIterator, Set
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import grpc
from grpc_health.v1 import health_pb2_grpc

from service.insight.channel_opener import ChannelOpener
from service.telemetry import logs
from vllm_batch.v1 import batch_service_pb2_grpc

if TYPE_CHECKING:
    from vllm_batch.v1.batch_service_pb2_grpc import BatchServiceAsyncStub

log = logs.get("channels")


@dataclass(eq=False)
class Connection:
    """An asyncio and a blocking channel to one worker, with the key files as they were when it was opened."""

    address: str
    version: object
    _aio: grpc.aio.Channel
    _blocking: grpc.Channel
    uses: int = 0

    @property
    def batches(self) -> "BatchServiceAsyncStub":
        """BatchService."""
        return batch_service_pb2_grpc.BatchServiceStub(self._aio)

    @property
    def blocking_batches(self) -> batch_service_pb2_grpc.BatchServiceStub:
        """BatchService, through gRPC's blocking API."""
        return batch_service_pb2_grpc.BatchServiceStub(self._blocking)

    @property
    def health(self) -> health_pb2_grpc.HealthStub:
        """The health service."""
        return health_pb2_grpc.HealthStub(self._aio)

    async def close(self) -> None:
        """Ends the calls under way."""
        await self._aio.close(None)
        self._blocking.close()


@dataclass
class Channels:
    """One connection per worker's address. When the key files change, the next call begins on a new one; the calls
    under way end on theirs.
    """

    calling: ChannelOpener
    _current: dict[str, Connection] = field(default_factory=dict)
    # Those from before the key files changed, as long as calls are under way on them.
    _replaced: set[Connection] = field(default_factory=set)

    @asynccontextmanager
    async def use(self, address: str) -> AsyncIterator[Connection]:
        """The connection to the worker at `address`, for calls that end within the block.

        Raises ValueError or OSError if it cannot be opened, and none is open that could still be used.
        """
        connection = self._connection(address)
        # Counted before anything is awaited: otherwise another caller could replace and close it.
        connection.uses += 1
        try:
            await self._close({each for each in self._replaced if not each.uses})
            yield connection
        finally:
            connection.uses -= 1
            await self._close({each for each in self._replaced if not each.uses})

    def is_current(self, connection: Connection) -> bool:
        """False: the key files have changed since it was opened, and new calls begin on another."""
        return self._connection(connection.address) is connection

    async def close(self, address: str) -> None:
        """Closes the connections to an address, which ends the calls under way."""
        current = self._current.pop(address, None)
        await self._close({each for each in (*self._replaced, current) if each is not None and each.address == address})

    async def close_all(self) -> None:
        """Closes all connections."""
        current, self._current = self._current, {}
        await self._close({*self._replaced, *current.values()})

    async def _close(self, connections: Set[Connection]) -> None:
        self._replaced -= connections
        for connection in connections:
            await connection.close()

    def _connection(self, address: str) -> Connection:
        before, version = self._current.get(address), self.calling.version()
        # Files are replaced one after the other: as long as one is missing or does not fit, the old ones serve.
        if before is not None and version in (before.version, None):
            return before
        try:
            connection = Connection(address, version, self.calling.open_aio(address), self.calling.open(address))
        except (OSError, ValueError) as error:
            if before is None:
                raise
            log.error("change_refused", address=address, cause=str(error))
            before.version = version
            return before
        self._current[address] = connection
        if before is not None:
            log.info("keys_changed", address=address)
            self._replaced.add(before)
        return connection
