"""The guards of this host: one for each worker or gateway in supervisord's configuration."""

from collections.abc import Callable
from dataclasses import dataclass, field

from service.telemetry import logs
from watchdog.guard import Guard
from watchdog.supervisor import Supervisor, SupervisorAwayError
from watchdog.wiring import processes_of

STOP_TIMEOUT_S = 2.0

log = logs.get("guards")


@dataclass
class Host:
    """The guards by worker id. `make_guard` takes supervisord's name of the process.

    `find` returns those names by worker id, or raises SupervisorAwayError.
    """

    supervisor: Supervisor
    make_guard: Callable[[str], Guard]
    find: Callable[[Supervisor], dict[str, str]] = processes_of
    by_worker: dict[str, Guard] = field(default_factory=dict)

    def discover(self) -> None:
        """Starts guards for new processes and stops those of removed ones. Does nothing while supervisord is away."""
        try:
            found = self.find(self.supervisor)
        except SupervisorAwayError as error:
            log.warning("workers_not_found", cause=str(error))
            return
        for worker_id in self.by_worker.keys() - found.keys():
            log.info("worker_gone", worker_id=worker_id)
            self._without(worker_id).stop(STOP_TIMEOUT_S)
        for worker_id in found.keys() - self.by_worker.keys():
            log.info("worker_found", worker_id=worker_id)
            guard = self.make_guard(found[worker_id])
            # Fails where no thread can be had: then it is found again the next time.
            guard.start()
            self.by_worker = {**self.by_worker, worker_id: guard}

    def has_given_up(self) -> bool:
        """True when an operator has to look at one of the processes."""
        return any(guard.snapshot.gave_up for guard in self.by_worker.values() if guard.snapshot is not None)

    def stop(self) -> None:
        """Stops all guards, waiting up to STOP_TIMEOUT_S for each."""
        for guard in self.by_worker.values():
            guard.stop(0)
        for guard in self.by_worker.values():
            guard.stop(STOP_TIMEOUT_S)

    def _without(self, worker_id: str) -> Guard:
        guard = self.by_worker[worker_id]
        self.by_worker = {other: kept for other, kept in self.by_worker.items() if other != worker_id}
        return guard
