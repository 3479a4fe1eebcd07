"""A worker's heart and nothing else of it: `python -m benchmarks.lib.heart_alone DATABASE_URL SECONDS`.

Prints, as JSON, the processor time that it took per second, and its memory in MB.
"""

import json
import os
import sys
import time
from uuid import uuid4

import psutil

from service.config import Settings
from service.db.chunks import Holder
from service.db.connection import CALL_FACTOR, connect
from service.db.heartbeats import Beat
from service.telemetry import logs
from service.worker.heart import Heart
from service.worker.state import WorkerState


def main(url: str, seconds: float) -> None:
    """Beats as a worker does, with the default settings."""
    logs.configure("heart", "WARNING")
    settings = Settings(_env_file=None)  # type: ignore[call-arg]
    state = WorkerState("heart-alone", uuid4())
    heart = Heart(
        connection=connect(url, f"heart-{state.incarnation}", settings.database_timeout_s),
        holder=Holder(state.worker_id, state.incarnation, settings.lease_s),
        interval_s=settings.heartbeat_interval_s,
        timeout_s=CALL_FACTOR * settings.database_timeout_s,
        beat=lambda: Beat(state.worker_id, state.incarnation, "", state.phase, os.getpid()),
        held=list,
        on_leases_lost=lambda ids: None,
        on_identity_taken=lambda: None,
    )
    heart.start()
    heart.wait_for_identity(60)
    begin_s = time.process_time()
    time.sleep(seconds)
    took_s = time.process_time() - begin_s
    memory_mb = psutil.Process().memory_info().rss / 2**20
    heart.stop(10)
    sys.stdout.write(json.dumps({"core": took_s / seconds, "mb": memory_mb}) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
