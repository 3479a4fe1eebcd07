"""The gateway process: `python -m service.gateway`."""

import asyncio
import sys
from collections.abc import Sequence
from typing import Any

import grpc

from service import config, machine, processes, programs, webhook_targets
from service.api import messages
from service.api.server_beat import ServerBeat
from service.clock import SystemClock
from service.config import Settings, process_name
from service.db.chunks import host_of
from service.db.connection import Database
from service.db.limits import Limits
from service.gateway.housekeeping import Housekeeping
from service.gateway.losses import LossReports
from service.gateway.metrics import FRESH_S, TIMEOUT_S, GatewayCollector
from service.gateway.servicer import GatewayServicer
from service.gateway.webhook_metrics import WebhookCollector
from service.gateway.webhook_servicer import WebhookServicer
from service.insight.channel_opener import ChannelOpener
from service.insight.channels import Channels
from service.insight.explainer import Explainer
from service.insight.host_servicer import HostServicer
from service.insight.presence import Presence
from service.rpc import access
from service.rpc import server as rpc_server
from service.rpc.services import BATCH_SERVICE, HOST_SERVICE, WEBHOOK_SERVICE
from service.telemetry import logs, metrics
from service.webhooks.deliverer import Deliverer, Signer
from vllm_batch.v1 import batch_service_pb2_grpc, host_service_pb2_grpc, webhook_service_pb2_grpc

# How long calls under way, mostly uploads, may take to finish. Less than supervisord waits for us to stop.
GRACE_S = 15.0
# To Postgres, at most: two for clients, one for heartbeats, one for housekeeping.
CONNECTIONS = 4
# For reading heartbeats, which takes milliseconds.
LOOK_TIMEOUT_S = 2.0
# How long to wait for what ends anyway.
END_TIMEOUT_S = 5.0

HELP = """\
Settings are read from the environment and from .env; conf/example.env lists them all. The main ones:
  BATCH_HOST          address to listen on (127.0.0.1); docs/security.md explains how to open it to other machines
  BATCH_GATEWAY_PORT  port of the API (50051)
  BATCH_HOME          where state, sockets and logs are kept (var/)
  DATABASE_URL        Postgres; the embedded one under BATCH_HOME by default

supervisord starts the gateway (scripts/start-all.sh). Workers are found through Postgres. The log is JSON lines on
stderr.
Exit status: 0 stopped as asked, 1 failed (the log says why), 2 invalid settings.
"""

log = logs.get("gateway")


async def serve(settings: Settings) -> int:
    """Serves until SIGTERM or SIGINT, or until a part of it fails. Returns the exit status."""
    stop = processes.told_to_end()
    url, timeout_s = settings.gateway_postgres_url, settings.database_timeout_s
    pool = Database(url, "gateway", timeout_s, CONNECTIONS, settings.synchronous_commit)
    database, keeping = pool.apart(CONNECTIONS - 2), pool.apart(1)
    # Reading heartbeats never waits for clients' reads, and tells soon that Postgres is away.
    looking = pool.apart(1, min(timeout_s, LOOK_TIMEOUT_S))

    async def accepting_changed(is_accepting: bool) -> None:
        await server.set_health(BATCH_SERVICE, is_accepting)

    channels, place = Channels(ChannelOpener(settings)), machine.here(settings.home)
    presence = Presence(
        looking,
        channels,
        SystemClock(),
        settings.heartbeat_timeout_s,
        accepting_changed,
        place,
        settings.advertised_loopback,
        host_of(settings.own_id("gateway")),
    )
    allowed = access.of(settings, SystemClock())
    limits = Limits(settings.max_open_batches, settings.max_queued_requests, allowed.quotas)
    explainer = Explainer(database, presence, SystemClock())
    networks = webhook_targets.networks(settings.webhook_networks)
    servicer = GatewayServicer(database, limits, presence, channels, explainer, networks)
    # On the connections of the calls: each statement is short, and what it misses comes again.
    deliverer = Deliverer(database, networks, Signer(allowed.quotas, SystemClock()), messages.batch_name)
    webhook_servicer = WebhookServicer(database, deliverer, networks, allowed.quotas)
    host_servicer = HostServicer(database, settings.heartbeat_timeout_s, presence)

    def add_services(grpc_server: grpc.aio.Server) -> None:
        batch_service_pb2_grpc.add_BatchServiceServicer_to_server(servicer, grpc_server)
        host_service_pb2_grpc.add_HostServiceServicer_to_server(host_servicer, grpc_server)
        webhook_service_pb2_grpc.add_WebhookServiceServicer_to_server(webhook_servicer, grpc_server)

    server = await rpc_server.serve(
        settings,
        settings.gateway_port,
        add_services,
        (BATCH_SERVICE, HOST_SERVICE, WEBHOOK_SERVICE),
        allowed,
        # For the watchdog, which does not know the ports of several gateways.
        socket=settings.probe_address(process_name()) if config.is_supervised() else "",
    )
    surveying = database.apart(1, TIMEOUT_S)
    metrics.serve(
        settings.metrics_host,
        settings.gateway_metrics_port,
        GatewayCollector(presence, surveying, settings.lease_s),
        WebhookCollector(deliverer, surveying, FRESH_S),
    )
    await server.set_health("", True)

    async def tell_schema() -> None:
        # Before that, in an upgrade, gateways of the version before serve more.
        await presence.has_schema.wait()
        for service in (HOST_SERVICE, WEBHOOK_SERVICE):
            await server.set_health(service, True)
        # Like the others it never ends by itself.
        await asyncio.Event().wait()

    log.info("gateway_serving", address=server.address)
    following = asyncio.create_task(presence.follow(), name="presence")
    keeper = Housekeeping(
        keeping, settings.retention_s, presence.is_unserved, settings.host_forgotten_s, allowed.quotas
    )
    housekeeping = asyncio.create_task(keeper.follow(), name="housekeeping")
    reports = LossReports(looking, SystemClock(), settings.own_id("gateway"), presence.now)
    reporting = asyncio.create_task(reports.follow(), name="losses")
    delivering = asyncio.create_task(deliverer.follow(), name="webhooks")
    beat = ServerBeat(database, settings.own_id("gateway"), "gateway", server.address, settings.heartbeat_interval_s)
    beating = asyncio.create_task(beat.follow(), name="beat")
    telling = asyncio.create_task(tell_schema(), name="schema")
    stopping = asyncio.create_task(stop.wait())
    lasting = (following, housekeeping, reporting, delivering, beating, telling)
    tasks: set[asyncio.Task[Any]] = {*lasting, stopping}
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    # They never end by themselves: without one of them the process would run, but be useless.
    failed = [task for task in lasting if programs.has_failed(task, log)]
    log.info("gateway_draining")
    for task in (housekeeping, reporting, delivering, beating, telling):
        task.cancel()
    servicer.end_streams()
    await server.end(GRACE_S)
    await beat.end()
    following.cancel()
    # A task that waits for something at this very moment may not hear that it is cancelled.
    await asyncio.wait({*lasting, asyncio.create_task(channels.close_all())}, timeout=END_TIMEOUT_S)
    log.info("gateway_ended")
    return 1 if failed else 0


def main(arguments: Sequence[str]) -> int:
    """Checks the settings, then serves."""
    description = "Runs the gateway: serves the BatchService API and forwards new batches to a live worker."
    settings = programs.read_settings(arguments, programs.parser("service.gateway", description, HELP))
    if settings is None:
        return 0
    programs.run("gateway", settings, serve)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
