"""How gateways and the page connect to workers: with TLS if they use it, and always with the current key files."""

from dataclasses import dataclass

import grpc

from service.auth import key_files
from service.config import Settings
from service.rpc import server as rpc_server
from vllm_batch.channel import open_aio_channel, open_channel


@dataclass(frozen=True)
class ChannelOpener:
    """Opens channels. A channel keeps the keys that it was opened with."""

    settings: Settings

    def version(self) -> object:
        """A value that changes when a key file does."""
        settings = self.settings
        paths = (settings.tls_ca, settings.tls_cert, settings.tls_key)
        return key_files.signature([path for path in paths if path is not None])

    def open(self, address: str) -> grpc.Channel:
        """A blocking channel, for threads."""
        return open_channel(address, options=rpc_server.CHANNEL_OPTIONS, **self._security())

    def open_aio(self, address: str) -> grpc.aio.Channel:
        """An asyncio channel."""
        return open_aio_channel(address, options=rpc_server.CHANNEL_OPTIONS, **self._security())

    def _security(self) -> dict[str, str]:
        """The TLS settings, and no token: the gateway forwards its callers' tokens."""
        given = {name.removeprefix("BATCH_").lower(): value for name, value in self.settings.client_environment.items()}
        return {name: value for name, value in given.items() if name.startswith("tls_")} | {"token": ""}
