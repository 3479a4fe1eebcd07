"""HostService: all hosts from Postgres, and orders about them."""

import asyncio

import grpc

from service.db import hosts, schema
from service.db.connection import Database
from service.db.hosts import Host
from service.errors import ApiError, Violation, invalid, not_found
from service.insight.host_messages import host_message
from service.insight.presence import Presence
from service.rpc import call_context, pages
from service.rpc.handlers import Context
from service.telemetry import logs
from vllm_batch.v1 import host_service_pb2 as pb
from vllm_batch.v1 import host_service_pb2_grpc

MAX_REASON = 512
# As in the function forget_host of the schema.
MIN_QUIET_S = 30.0

log = logs.get("hosts")


class HostServicer(host_service_pb2_grpc.HostServiceServicer):
    """A program that was not seen for `timeout_s` is gone. `presence`: what this process knows of the workers."""

    def __init__(self, database: Database, timeout_s: float, presence: Presence) -> None:
        self._database = database
        self._timeout_s = timeout_s
        self._presence = presence

    async def ListHosts(self, request: pb.ListHostsRequest, context: Context) -> pb.ListHostsResponse:
        """Lists hosts by name, the token being the last name of the page before."""
        size = pages.size(request.page_size)
        after = pages.after(request.page_token, "hosts", "page_token")
        if "\0" in request.name:
            raise invalid([Violation("name", "must not contain NUL")])
        found = await self._database.read(hosts.read, size + 1, after, request.name)
        more = len(found) > size
        network, unreached = self._presence.place.network, self._presence.unreached()
        return pb.ListHostsResponse(
            hosts=[host_message(host, self._timeout_s, schema.known(), network, unreached) for host in found[:size]],
            next_page_token=pages.token_after("hosts", found[size - 1].name) if more else "",
        )

    async def DrainHost(self, request: pb.DrainHostRequest, context: Context) -> pb.DrainHostResponse:
        """Stores the order, which the host's workers and all gateways follow."""
        if len(request.reason) > MAX_REASON or "\0" in request.reason:
            raise invalid([Violation("reason", f"must have at most {MAX_REASON} characters, and no NUL")])
        await self._known(request.name)
        await asyncio.shield(self._database.run(hosts.drain, request.name, request.reason))
        log.info("host_drained", host=request.name, reason=request.reason, by=_caller())
        return pb.DrainHostResponse()

    async def ResumeHost(self, request: pb.ResumeHostRequest, context: Context) -> pb.ResumeHostResponse:
        """Removes the order."""
        host = await self._known(request.name)
        if not await asyncio.shield(self._database.run(hosts.resume, host.name, f"resumed by {_caller()}")):
            raise _refused(f"host {host.name!r} is not drained")
        log.info("host_resumed", host=host.name, by=_caller())
        return pb.ResumeHostResponse()

    async def ForgetHost(self, request: pb.ForgetHostRequest, context: Context) -> pb.ForgetHostResponse:
        """Removes its rows, unless one of its programs may be alive."""
        host = await self._known(request.name)
        reason = f"forgotten by {_caller()}"
        if not await asyncio.shield(self._database.run(hosts.forget, host.name, self._timeout_s, reason)):
            last = min(host.programs, key=lambda each: each.age_s)
            if not host.alive(self._timeout_s):
                quiet_s = max(self._timeout_s, MIN_QUIET_S)
                raise _refused(
                    f"host {host.name!r} was last seen {last.age_s:.0f} s ago; wait until that is {quiet_s:.0f} s ago"
                )
            raise _refused(
                f"host {host.name!r} is alive: its {last.id.rpartition(':')[2]} was seen {last.age_s:.0f} s ago;"
                f" stop it first, and wait for {self._timeout_s:.0f} s"
            )
        log.info("host_forgotten", host=host.name, by=_caller())
        return pb.ForgetHostResponse()

    async def _known(self, name: str) -> Host:
        """The host. Raises INVALID_ARGUMENT without a name, NOT_FOUND if none of that name was ever seen."""
        if not name or "\0" in name:
            raise invalid([Violation("name", "is required and must not contain NUL")])
        found = await self._database.read(hosts.read, 1, "", name)
        if not found:
            raise not_found(f"host {name[:100]!r}")
        return found[0]


def _caller() -> str:
    return call_context.current().caller.name or "an operator"


def _refused(message: str) -> ApiError:
    return ApiError(grpc.StatusCode.FAILED_PRECONDITION, message)
