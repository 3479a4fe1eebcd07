"""How the gateway calls workers: with TLS when they serve with it, and always with the newest files of keys."""

from dataclasses import dataclass

import grpc

from service import key_files, rpc
from service.config import Settings
from vllm_batch.channel import open_aio_channel, open_channel


@dataclass(frozen=True)
class Calling:
    """Opens channels. An open channel keeps the keys that it was opened with."""

    settings: Settings

    def version(self) -> object:
        """Another one when a file of keys has changed."""
        settings = self.settings
        paths = (settings.tls_ca, settings.tls_cert, settings.tls_key)
        return key_files.signature([path for path in paths if path is not None])

    def open(self, address: str) -> grpc.Channel:
        """A channel for threads."""
        return open_channel(address, options=rpc.CHANNEL_OPTIONS, **self._security())

    def open_aio(self, address: str) -> grpc.aio.Channel:
        """A channel for asyncio."""
        return open_aio_channel(address, options=rpc.CHANNEL_OPTIONS, **self._security())

    def _security(self) -> dict[str, str]:
        """Without a token of its own: callers' tokens are passed on."""
        given = {name.removeprefix("BATCH_").lower(): value for name, value in self.settings.client_environment.items()}
        return {name: value for name, value in given.items() if name.startswith("tls_")} | {"token": ""}
