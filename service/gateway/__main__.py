"""The gateway process: `python -m service.gateway`. `--check` only checks the settings."""

import argparse
import asyncio
import signal
import sys
from collections.abc import Sequence
from typing import Any

from service import access, config, logs, metrics, processes, rpc, tracing
from service.clock import SystemClock
from service.config import Settings
from service.db.batches import Limits
from service.db.connection import Database
from service.gateway.calling import Calling
from service.gateway.channels import Channels
from service.gateway.housekeeping import Housekeeping
from service.gateway.metrics import TIMEOUT_S, GatewayCollector
from service.gateway.presence import Presence
from service.gateway.service import GatewayServicer
from vllm_batch.v1 import batch_service_pb2_grpc

SERVICE = "vllm_batch.v1.BatchService"
# How long calls that are under way may take to end: uploads, mostly. Within the wait of those who stop us.
GRACE_S = 15.0

log = logs.get("gateway")


async def serve(settings: Settings) -> None:
    """Serves until told to stop."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    url = settings.gateway_postgres_url
    database = Database(url, "gateway", settings.database_timeout_s, connections=16)
    # Apart, so that a look at the heartbeats never waits for clients' reads.
    looking = Database(url, "gateway-presence", settings.database_timeout_s, connections=1)

    async def accepting_changed(is_accepting: bool) -> None:
        await server.set_health(SERVICE, is_accepting)

    channels = Channels(Calling(settings))
    presence = Presence(looking, channels, SystemClock(), settings.heartbeat_timeout_s, accepting_changed)
    limits = Limits(settings.max_open_batches, settings.max_queued_requests)
    servicer = GatewayServicer(database, limits, presence, channels)
    keeping = Database(url, "gateway-housekeeping", settings.database_timeout_s, connections=1)
    server = await rpc.serve(
        settings,
        settings.gateway_port,
        lambda grpc_server: batch_service_pb2_grpc.add_BatchServiceServicer_to_server(servicer, grpc_server),
        (SERVICE,),
        access.of(settings, SystemClock()),
    )
    surveying = Database(url, "gateway-metrics", TIMEOUT_S, connections=1)
    metrics.serve(
        settings.metrics_host, settings.gateway_metrics_port, GatewayCollector(presence, surveying, settings.lease_s)
    )
    await server.set_health("", True)
    log.info("gateway_serving", address=server.address)
    following = asyncio.create_task(presence.follow())
    housekeeping = asyncio.create_task(Housekeeping(keeping, settings.retention_s).follow())
    stopping = asyncio.create_task(stop.wait())
    tasks: set[asyncio.Task[Any]] = {following, housekeeping, stopping}
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    log.info("gateway_draining")
    housekeeping.cancel()
    servicer.end_streams()
    await server.end(GRACE_S)
    following.cancel()
    await asyncio.wait({following, housekeeping})
    await channels.close_all()
    for task in (following, housekeeping):
        if not task.cancelled():
            task.result()
    log.info("gateway_ended")


def main(arguments: Sequence[str]) -> int:
    """Checks the settings, then serves."""
    parser = argparse.ArgumentParser(prog="python -m service.gateway", description=__doc__)
    parser.add_argument("--check", action="store_true", help="check the settings and end")
    options = parser.parse_args(arguments)
    settings = config.load()
    if options.check:
        return 0
    processes.die_with_parent()
    processes.allow_many_files()
    logs.configure("gateway", settings.log_level)
    tracing.configure("gateway", settings.otlp_endpoint)
    asyncio.run(serve(settings))
    tracing.close()
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
