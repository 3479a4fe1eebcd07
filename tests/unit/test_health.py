"""What a server says of its health, to those who ask and those who watch."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2

from service.health import NOT_SERVING, SERVICE_UNKNOWN, SERVING, Health


class Ended(Exception):
    pass


class Context:
    """What a call ends with."""

    code: grpc.StatusCode | None = None

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: object = ()) -> None:
        self.code = code
        raise Ended


def request(service: str = "s") -> Any:
    return health_pb2.HealthCheckRequest(service=service)


def watch(health: Health, service: str = "s") -> AsyncIterator[Any]:
    context: Any = Context()
    return health.Watch(request(service), context)


async def said(watching: AsyncIterator[Any]) -> int:
    return int((await asyncio.wait_for(anext(watching), 10)).status)


def test_nothing_serves_before_it_is_said() -> None:
    """From the first moment every name says NOT_SERVING, and a name that is none is NOT_FOUND or unknown."""

    async def run() -> None:
        health, context = Health(("", "s")), Context()
        assert (await health.Check(request(), context)).status == NOT_SERVING  # type: ignore[arg-type]
        listed = (await health.List(health_pb2.HealthListRequest(), context)).statuses  # type: ignore[arg-type]
        assert {name: answer.status for name, answer in listed.items()} == {"": NOT_SERVING, "s": NOT_SERVING}
        assert await said(watch(health, "other")) == SERVICE_UNKNOWN
        with pytest.raises(Ended):
            await health.Check(request("other"), context)  # type: ignore[arg-type]
        assert context.code is grpc.StatusCode.NOT_FOUND

    asyncio.run(run())


def test_a_watch_that_nobody_reads_holds_up_nobody() -> None:
    """A client that does not read its Watch keeps neither the others from theirs nor the server from changing."""

    async def run() -> None:
        health = Health(("s",))
        lazy, eager = watch(health), watch(health)
        assert (await said(lazy), await said(eager)) == (NOT_SERVING, NOT_SERVING)
        for status in (SERVING, NOT_SERVING) * 3:
            health.set("s", status)
            assert await said(eager) == status
        health.set("s", SERVING)
        assert await said(lazy) == SERVING

    asyncio.run(run())


def test_the_end() -> None:
    """A server that ends says NOT_SERVING to those who watch, then UNAVAILABLE, and nothing else any more."""

    async def run() -> None:
        health, context = Health(("s",)), Context()
        health.set("s", SERVING)
        watching: AsyncIterator[Any] = health.Watch(request(), context)  # type: ignore[arg-type]
        assert await said(watching) == SERVING
        health.end()
        health.set("s", SERVING)
        assert await said(watching) == NOT_SERVING
        with pytest.raises(Ended):
            await said(watching)
        assert context.code is grpc.StatusCode.UNAVAILABLE
        assert (await health.Check(request(), context)).status == NOT_SERVING  # type: ignore[arg-type]

    asyncio.run(run())
