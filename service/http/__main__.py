"""OpenAI's door and the page: `python -m service.http`."""

import asyncio
import contextlib
import socket
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import tenacity
import uvicorn

from service import addresses, machine, processes, programs, webhook_targets
from service.api.server_beat import ServerBeat
from service.clock import SystemClock
from service.config import Settings, is_supervised, process_name
from service.db.connection import Database
from service.db.limits import Limits
from service.http import app, certified, tls
from service.http.files import Keeping
from service.http.measuring import Measuring
from service.http.metrics import TIMEOUT_S, HttpCollector
from service.http.page.sessions import Sessions
from service.http.page.wiring import Page
from service.insight.channel_opener import ChannelOpener
from service.insight.channels import Channels
from service.insight.presence import Presence
from service.rpc import access
from service.rpc import server as rpc_server
from service.rpc.access import Access
from service.telemetry import logs, metrics

# How long requests under way may take to finish. Less than supervisord waits for us to stop.
GRACE_S = 15
# To Postgres, at most.
CONNECTIONS = 2
# How long to wait for what ends anyway.
END_TIMEOUT_S = 5
# Longer than clients keep a connection that they do not use: otherwise one that they take may be closing.
KEEP_ALIVE_S = 75
# Connections that may wait to be accepted.
BACKLOG = 1024
# An earlier life of this process may still hold the port.
PORT_RETRY_S = 0.2
PORT_TIMEOUT_S = 30.0

HELP = """\
Settings are read from the environment and from .env; conf/example.env lists them all. The main ones:
  BATCH_HOST       address to listen on (127.0.0.1); docs/security.md explains how to open it to other machines
  BATCH_HTTP_PORT  port of the API (50054): base_url="http://127.0.0.1:50054/v1"
  BATCH_HOME       where state, sockets and logs are kept (var/)
  DATABASE_URL     Postgres; the embedded one under BATCH_HOME by default

supervisord starts it (scripts/start-all.sh). Any number of them may run on one Postgres. The log is JSON lines on
stderr.
Exit status: 0 stopped as asked, 1 failed (the log says why), 2 invalid settings.
"""

log = logs.get("http")


class _Server(uvicorn.Server):
    """uvicorn's, which ends when told by `should_exit` alone."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leaves signals to us."""
        yield


async def serve(settings: Settings) -> int:
    """Serves until SIGTERM or SIGINT, or until a part of it fails. Returns the exit status."""
    stop = processes.told_to_end()
    url, timeout_s = settings.gateway_postgres_url, settings.database_timeout_s
    database = Database(url, "http", timeout_s, CONNECTIONS, settings.synchronous_commit)
    measuring = Measuring(database.apart(1))
    surveying = database.apart(1, TIMEOUT_S)
    allowed = access.of(settings, SystemClock())
    limits = Limits(settings.max_open_batches, settings.max_queued_requests, allowed.quotas)
    page = _page(settings, database, allowed, limits)
    application = app.made(
        database,
        allowed,
        Keeping(settings.retention_s or None, settings.max_batch_bytes, limits),
        settings.heartbeat_timeout_s,
        webhook_targets.networks(settings.webhook_networks),
        page,
        {name.lower() for name in (settings.host, settings.advertised_host, socket.gethostname())},
        addresses.is_loopback(settings.host),
    )
    context = tls.context(settings)
    server = _Server(
        uvicorn.Config(
            application,
            http=certified.Protocol,
            loop="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            # Anybody who can connect could claim to be another client, or many.
            proxy_headers=False,
            # Not served here, and those connections would have none of our limits.
            ws="none",
            timeout_keep_alive=KEEP_ALIVE_S,
            ssl_context_factory=None if context is None else lambda *_: context,
            timeout_graceful_shutdown=GRACE_S,
        )
    )
    # For the watchdog: by the loop that serves clients, so that it answers as they do.
    health = await rpc_server.serve_health(settings.probe_address(process_name("http"))) if is_supervised() else None
    listening = await _listen(settings.host, settings.http_port)
    metrics.serve(settings.metrics_host, settings.http_metrics_port, HttpCollector(surveying))
    serving = asyncio.create_task(server.serve([listening]), name="server")
    following = asyncio.create_task(measuring.follow(), name="measuring")
    address = settings.advertised_address(settings.http_port)
    beat = ServerBeat(database, settings.own_id("http"), "http", address, settings.heartbeat_interval_s)
    beating = asyncio.create_task(beat.follow(), name="beat")
    watching = asyncio.create_task(page.follow(), name="page")
    if health is not None:
        await health.set_health("", True)
    log.info("http_serving", address=address)
    stopping = asyncio.create_task(stop.wait())
    lasting = (serving, following, beating, watching)
    tasks: set[asyncio.Task[Any]] = {*lasting, stopping}
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    # They never end by themselves.
    failed = [task for task in lasting if programs.has_failed(task, log)]
    log.info("http_draining")
    for task in (following, beating, watching):
        task.cancel()
    await beat.end()
    server.should_exit = True
    await asyncio.wait({asyncio.create_task(page.end())}, timeout=END_TIMEOUT_S)
    await asyncio.wait({serving}, timeout=GRACE_S + 1)
    if health is not None:
        await health.end(0)
    log.info("http_ended")
    return 1 if failed else 0


def _page(settings: Settings, database: Database, allowed: Access, limits: Limits) -> Page:
    looking = database.apart(1)

    async def changed(is_accepting: bool) -> None:
        """The page asks when it wants to know."""

    channels = Channels(ChannelOpener(settings))
    presence = Presence(looking, channels, SystemClock(), settings.heartbeat_timeout_s, changed, machine.here())
    sessions = Sessions(database, allowed)
    return Page(database, sessions, presence, channels, limits, SystemClock(), settings.heartbeat_timeout_s)


async def _listen(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises OSError if the port is not free for a while."""
    where = addresses.bare(host)
    family = socket.getaddrinfo(where, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
    # As gRPC does at `::`.
    is_both = family == socket.AF_INET6 and addresses.is_any(host)

    def bind() -> socket.socket:
        return socket.create_server((where, port), family=family, backlog=BACKLOG, dualstack_ipv6=is_both)

    def tell(state: tenacity.RetryCallState) -> None:
        if state.attempt_number == 1 and state.outcome is not None:
            log.warning("waiting_for_port", port=port, cause=str(state.outcome.exception()))

    retrying = tenacity.AsyncRetrying(
        retry=tenacity.retry_if_exception_type(OSError),
        wait=tenacity.wait_fixed(PORT_RETRY_S),
        stop=tenacity.stop_after_delay(PORT_TIMEOUT_S),
        before_sleep=tell,
        reraise=True,
    )
    async for attempt in retrying:
        with attempt:
            listening = bind()
    return listening


def main(arguments: Sequence[str]) -> int:
    """Checks the settings, then serves."""
    description = "Runs OpenAI's door: serves files, uploads, batches and models as OpenAI's API does."
    settings = programs.read_settings(arguments, programs.parser("service.http", description, HELP))
    if settings is None:
        return 0
    programs.run("http", settings, serve)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
