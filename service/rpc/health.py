"""grpc.health.v1: a server's status under each of its names, from before its port opens until it ends."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from service.errors import ending
from service.rpc.handlers import Context

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVICE_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


class HealthServicer(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """Check, List and Watch; every name is NOT_SERVING until it is set.

    Replaces grpcio's own: that has no List, a client that does not read its Watch blocks the others, and a server
    that shuts down waits for its watchers.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._statuses = dict.fromkeys(names, NOT_SERVING)
        # Set at the next change, and then replaced by a new event.
        self._changed = asyncio.Event()
        self._is_ending = False

    def set(self, name: str, status: int) -> None:
        """Sets the status of a name and sends it to its watchers. Has no effect after `end`."""
        if not self._is_ending:
            self._statuses[name] = status
            self._wake()

    def end(self) -> None:
        """Sets all names to NOT_SERVING for good; the Watches send that and end."""
        self._statuses = dict.fromkeys(self._statuses, NOT_SERVING)
        self._is_ending = True
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def Check(self, request: Any, context: Context) -> Any:
        """The status of one name; NOT_FOUND for an unknown one."""
        if request.service not in self._statuses:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"unknown service {request.service[:100]!r}")
        return health_pb2.HealthCheckResponse(status=self._statuses[request.service])

    async def List(self, request: Any, context: Context) -> Any:
        """The status of every name."""
        answers = {name: health_pb2.HealthCheckResponse(status=status) for name, status in self._statuses.items()}
        return health_pb2.HealthListResponse(statuses=answers)

    async def Watch(self, request: Any, context: Context) -> AsyncIterator[Any]:
        """The status of one name, now and after each change; UNAVAILABLE when the server ends."""
        sent: int | None = None
        while True:
            # Taken before the status is read, so that no change is missed.
            changed = self._changed
            status = self._statuses.get(request.service, SERVICE_UNKNOWN)
            if status != sent:
                yield health_pb2.HealthCheckResponse(status=status)
                sent = status
            elif self._is_ending:
                error = ending()
                await context.abort(error.code, error.details, error.trailing_metadata)
            else:
                await changed.wait()
