"""grpc.health.v1: what a server says of itself under each of its names, from before its port opens to its end."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from service.errors import ending

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVICE_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN

Context = grpc.aio.ServicerContext[Any, Any]


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """Check, List and Watch; every name says NOT_SERVING until it is set.

    In the place of grpcio's own, which has no List, in which a client that does not read its Watch holds up the
    others, and with which a server that ends waits for those who watch it.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._statuses = dict.fromkeys(names, NOT_SERVING)
        # Set once, at the next change; another takes its place then.
        self._changed = asyncio.Event()
        self._is_ending = False

    def set(self, name: str, status: int) -> None:
        """Says `status` under a name, also to those who watch it. Without effect after `end`."""
        if not self._is_ending:
            self._statuses[name] = status
            self._wake()

    def end(self) -> None:
        """Says NOT_SERVING under all names from now on, and ends the Watches with that."""
        self._statuses = dict.fromkeys(self._statuses, NOT_SERVING)
        self._is_ending = True
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def Check(self, request: Any, context: Context) -> Any:
        """The status under one name; NOT_FOUND for another."""
        if request.service not in self._statuses:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"no health is kept for {request.service[:100]!r}")
        return health_pb2.HealthCheckResponse(status=self._statuses[request.service])

    async def List(self, request: Any, context: Context) -> Any:
        """The status under every name."""
        answers = {name: health_pb2.HealthCheckResponse(status=status) for name, status in self._statuses.items()}
        return health_pb2.HealthListResponse(statuses=answers)

    async def Watch(self, request: Any, context: Context) -> AsyncIterator[Any]:
        """The status under one name now and after each change; UNAVAILABLE when the server ends."""
        sent: int | None = None
        while True:
            # Taken before the status is read, so that no change falls in between.
            changed = self._changed
            status = self._statuses.get(request.service, SERVICE_UNKNOWN)
            if status != sent:
                yield health_pb2.HealthCheckResponse(status=status)
                sent = status
            elif self._is_ending:
                error = ending()
                await context.abort(error.code, error.message, error.trailing_metadata)
            else:
                await changed.wait()
