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
        from service.api.server_beat import ServerBeat
        from service.gateway import __main__ as gateway
        from service.gateway.housekeeping import Housekeeping
        from service.gateway.losses import LossReports
        from service.insight.presence import Presence
        from service.rpc.server import Server
        from service.rpc.services import HOST_SERVICE

        if part == "schema":
            set_health = Server.set_health

            async def failing(server: Server, name: str, is_serving: bool) -> None:
                await (_fail() if name == HOST_SERVICE else set_health(server, name, is_serving))

            Server.set_health = failing  # type: ignore[method-assign]
            return gateway.main([])
        parts: dict[str, Any] = {
            "presence": Presence,
            "housekeeping": Housekeeping,
            "losses": LossReports,
            "beat": ServerBeat,
        }
        parts[part].follow = _fail
        if deaf := {"presence": Housekeeping, "housekeeping": Presence}.get(part):
            deaf.follow = _deaf  # type: ignore[attr-defined]
        return gateway.main([])
    if process == "http":
        from service.http import __main__ as http
        from service.http.measuring import Measuring

        Measuring.follow = _fail  # type: ignore[method-assign]
        return http.main([])
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
