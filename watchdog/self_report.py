"""What a watchdog reports about its host to all others: programs, verdicts, budgets, GPUs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from watchdog.act.gpu import Device
from watchdog.host import Host
from watchdog.supervisor import Supervisor, SupervisorAwayError

# A reason may contain a whole traceback's last line.
MAX_REASON = 500


@dataclass
class Report:
    """`devices` returns the GPUs; it is called once, because it may take seconds and they do not change."""

    supervisor: Supervisor
    hosts: Sequence[Host]
    budget_limit: int
    devices: Callable[[], Sequence[Device]]
    _devices: Sequence[Device] | None = field(default=None)

    def detail(self) -> Mapping[str, Any]:
        """As it stands, for JSON. Without the programs while supervisord does not answer."""
        if self._devices is None:
            self._devices = self.devices()
        gpus = [{"name": device.name, "memory_bytes": device.memory_bytes} for device in self._devices]
        return {"programs": self._programs(), "guards": self._guards(), "gpus": gpus}

    def _programs(self) -> list[tuple[str, str]]:
        try:
            return sorted(self.supervisor.states().items())
        except SupervisorAwayError:
            return []

    def _guards(self) -> list[dict[str, Any]]:
        guards = [guard for host in self.hosts for guard in host.by_worker.values()]
        return [
            {
                "worker_id": snapshot.worker_id,
                "verdict": str(snapshot.decision.verdict),
                "reason": snapshot.decision.reason[:MAX_REASON],
                "budget_left": snapshot.budget_left,
                "budget_limit": self.budget_limit,
                "gave_up": snapshot.gave_up,
            }
            for guard in guards
            if (snapshot := guard.snapshot) is not None
        ]
