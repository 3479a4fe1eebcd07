"""The watchdog's observer of a worker that cannot be probed, on whatever parts a test gives it."""

from service.clock import Clock
from service.db.connection import Database
from service.machine import Place
from watchdog.observe.observer import Observer
from watchdog.observe.stall_detector import StallDetector
from watchdog.supervisor import Supervisor


def observer_of(worker_id: str, supervisor: Supervisor, database: Database, clock: Clock, place: Place) -> Observer:
    """An observer of the program worker:worker."""
    return Observer(
        name="worker:worker",
        worker_id=worker_id,
        supervisor=supervisor,
        database=database,
        address=None,
        socket_address="unix:/nowhere.sock",
        place=place,
        silence_s=15,
        probe_timeout_s=1,
        database_timeout_s=60,
        clock=clock,
        stalls=StallDetector(clock),
        on_change=lambda: None,
        ask_interval_s=1.5,
    )
