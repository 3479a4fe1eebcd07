"""The health service's answers to Check, List and Watch."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2

from service.rpc.health import NOT_SERVING, SERVICE_UNKNOWN, SERVING, HealthServicer


class Ended(Exception):
    pass


class Context:
    """Records the status code that a call was aborted with."""

    code: grpc.StatusCode | None = None

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: object = ()) -> None:
        self.code = code
        raise Ended


def request(service: str = "s") -> Any:
    return health_pb2.HealthCheckRequest(service=service)


def watch(health: HealthServicer, service: str = "s") -> AsyncIterator[Any]:
    context: Any = Context()
    return health.Watch(request(service), context)


async def said(watching: AsyncIterator[Any]) -> int:
    return int((await asyncio.wait_for(anext(watching), 10)).status)


def test_nothing_serves_before_it_is_said() -> None:
    """Before any status is set, every known name is NOT_SERVING; an unknown name is NOT_FOUND or SERVICE_UNKNOWN."""

    async def run() -> None:
        health, context = HealthServicer(("", "s")), Context()
        assert (await health.Check(request(), context)).status == NOT_SERVING  # type: ignore[arg-type]
        listed = (await health.List(health_pb2.HealthListRequest(), context)).statuses  # type: ignore[arg-type]
        assert {name: answer.status for name, answer in listed.items()} == {"": NOT_SERVING, "s": NOT_SERVING}
        assert await said(watch(health, "other")) == SERVICE_UNKNOWN
        with pytest.raises(Ended):
            await health.Check(request("other"), context)  # type: ignore[arg-type]
        assert context.code is grpc.StatusCode.NOT_FOUND

    asyncio.run(run())


def test_a_watch_that_nobody_reads_holds_up_nobody() -> None:
    """A client that does not read its Watch delays neither other watchers nor changes of the status."""

    async def run() -> None:
        health = HealthServicer(("s",))
        lazy, eager = watch(health), watch(health)
        assert (await said(lazy), await said(eager)) == (NOT_SERVING, NOT_SERVING)
        for status in (SERVING, NOT_SERVING) * 3:
            health.set("s", status)
            assert await said(eager) == status
        health.set("s", SERVING)
        assert await said(lazy) == SERVING

    asyncio.run(run())


def test_the_end() -> None:
    """An ending server sends watchers NOT_SERVING, ends their calls with UNAVAILABLE and ignores later changes."""

    async def run() -> None:
        health, context = HealthServicer(("s",)), Context()
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
