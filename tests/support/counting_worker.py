"""The worker with a log of what its simulated engine begins: `BATCH_HOME/<process>.begun`, a request in each line."""

import os
import sys
from collections.abc import Coroutine, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from service.worker.engine.protocol import Answer
from service.worker.engine.simulated import SimulatedEngine
from service.worker.lifecycle import main

_run, _take = SimulatedEngine.run, SimulatedEngine._take
# Of this task. Those that prove that the engine works have no name.
_request = ContextVar("request", default="")


def run(
    engine: SimulatedEngine, url: str, body: str, headers: Mapping[str, str] | None = None
) -> Coroutine[Any, Any, Answer]:
    _request.set((headers or {}).get("x-request-id", ""))
    return _run(engine, url, body, headers)


def take(engine: SimulatedEngine, seconds: float) -> Coroutine[Any, Any, None]:
    # What waits for its turn before this may be given to other workers.
    if request := _request.get():
        with Path(os.environ["BATCH_HOME"], f"{os.environ['SUPERVISOR_PROCESS_NAME']}.begun").open("a") as log:
            log.write(f"{request}\n")
    return _take(engine, seconds)


if __name__ == "__main__":
    SimulatedEngine.run = run  # type: ignore[method-assign]
    SimulatedEngine._take = take  # type: ignore[method-assign]
    raise SystemExit(main(sys.argv[1:]))
