"""One of our processes with a part that raises an error: `BROKEN_PART=gateway.housekeeping python -m ...`."""

import asyncio
import os
import sys
from typing import Any


async def _fail(*_: Any) -> None:
    await asyncio.sleep(0.5)
    raise RuntimeError("a fault of ours")


async def _deaf(*_: Any) -> None:
    """Ignores cancellation, as a wait in asyncio may at the wrong moment."""
    while True:
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            continue


def main() -> int:
    """Breaks the part, then runs the process."""
    process, part = os.environ["BROKEN_PART"].split(".")
    if process == "gateway":
        from service.gateway import __main__ as gateway
        from service.gateway.housekeeping import Housekeeping
        from service.insight.presence import Presence

        failing, other = (Presence, Housekeeping) if part == "presence" else (Housekeeping, Presence)
        failing.follow, other.follow = _fail, _deaf  # type: ignore[method-assign]
        return gateway.main([])
    if process == "watchdog":
        from watchdog import __main__ as watchdog

        watchdog._tell_health = _fail
        return int(watchdog.main([]) or 0)
    from service.worker import lifecycle
    from service.worker.pulse import Pulse
    from service.worker.result_writer import ResultWriter

    (Pulse if part == "pulse" else ResultWriter).follow = _fail  # type: ignore[method-assign]
    return lifecycle.main([])


if __name__ == "__main__":
    sys.exit(main())
