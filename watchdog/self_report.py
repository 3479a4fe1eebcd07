"""What a watchdog reports about its host to all others: programs, statuses of its guards, GPUs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from google.protobuf.json_format import MessageToDict

from watchdog.act.gpu import Device
from watchdog.host import Host
from watchdog.servicer import status_message
from watchdog.supervisor import Supervisor, SupervisorAwayError


@dataclass
class Report:
    """`devices` returns the GPUs; it is called once, because it may take seconds and they do not change."""

    supervisor: Supervisor
    workers: Host
    servers: Host
    budget_limit: int
    devices: Callable[[], Sequence[Device]]
    # Where this host is: its network, as service/machine.py has it, and the address that it announces.
    network: str = ""
    address: str = ""
    _devices: Sequence[Device] | None = field(default=None)

    def detail(self) -> Mapping[str, Any]:
        """As it stands, for JSON. Without the programs while supervisord does not answer."""
        if self._devices is None:
            self._devices = self.devices()
        gpus = [{"name": device.name, "memory_bytes": device.memory_bytes} for device in self._devices]
        guards = [*self._guards(self.workers, is_gateway=False), *self._guards(self.servers, is_gateway=True)]
        where = {"network": self.network, "address": self.address}
        return {"programs": self._programs(), "guards": guards, "gpus": gpus, **where}

    def _programs(self) -> list[tuple[str, str]]:
        try:
            return sorted(self.supervisor.states().items())
        except SupervisorAwayError:
            return []

    def _guards(self, host: Host, *, is_gateway: bool) -> list[dict[str, Any]]:
        """The statuses as RecoveryService has them."""
        messages = [status_message(name, guard.snapshot, self.budget_limit) for name, guard in host.by_worker.items()]
        return [
            {**MessageToDict(message, preserving_proto_field_name=True), "is_gateway": is_gateway}
            for message in messages
        ]
