"""The channels to the workers. Opened on first use, and only here."""

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import grpc
from grpc_health.v1 import health_pb2_grpc

from service.insight.channel_opener import ChannelOpener
from vllm_batch.v1 import batch_service_pb2_grpc

if TYPE_CHECKING:
    from vllm_batch.v1.batch_service_pb2_grpc import BatchServiceAsyncStub

# How long calls under way may take to finish on a channel whose keys were replaced.
RENEW_GRACE_S = 60.0


@dataclass
class Channels:
    """One asyncio and one blocking channel per worker's address; replaced when the key files change."""

    calling: ChannelOpener
    _version: object = None
    _channels: dict[str, grpc.aio.Channel] = field(default_factory=dict)
    _blocking: dict[str, grpc.Channel] = field(default_factory=dict)
    _closing: set["asyncio.Task[None]"] = field(default_factory=set)

    def batches(self, address: str) -> "BatchServiceAsyncStub":
        """BatchService of the worker at `address`."""
        return batch_service_pb2_grpc.BatchServiceStub(self._channel(address))

    def health(self, address: str) -> health_pb2_grpc.HealthStub:
        """The health service of the worker at `address`."""
        return health_pb2_grpc.HealthStub(self._channel(address))

    def blocking_batches(self, address: str) -> batch_service_pb2_grpc.BatchServiceStub:
        """BatchService of the worker at `address`, through gRPC's blocking API."""
        self._renew()
        if address not in self._blocking:
            self._blocking[address] = self.calling.open(address)
        return batch_service_pb2_grpc.BatchServiceStub(self._blocking[address])

    async def close(self, address: str) -> None:
        """Closes the channels to an address, which ends the calls under way."""
        if (channel := self._channels.pop(address, None)) is not None:
            await channel.close(None)
        if (blocking := self._blocking.pop(address, None)) is not None:
            blocking.close()

    async def close_all(self) -> None:
        """Closes all channels."""
        for address in {*self._channels, *self._blocking}:
            await self.close(address)

    def _channel(self, address: str) -> grpc.aio.Channel:
        self._renew()
        if address not in self._channels:
            self._channels[address] = self.calling.open_aio(address)
        return self._channels[address]

    def _renew(self) -> None:
        """Drops the channels if the key files have changed. Calls under way on them may still finish."""
        version = self.calling.version()
        if version == self._version:
            return
        self._version = version
        for channel in self._channels.values():
            task = asyncio.create_task(channel.close(RENEW_GRACE_S))
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)
        self._channels, self._blocking = {}, {}
