"""Links to workers stay, however a worker or a proxy ends the calls on them."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from grpc_health.v1 import health_pb2

from service.clock import SystemClock
from service.insight import links
from service.insight.channels import Channels
from service.insight.links import Links, LostError
from service.insight.routing import LinkState
from tests.support.loops import in_loop

SERVING = health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)


class Worker:
    """Answers its first health stream, then cancels it; answers the next one."""

    def __init__(self) -> None:
        self.watches = 0
        self.address = "x"

    @asynccontextmanager
    async def use(self, address: str) -> AsyncIterator["Worker"]:
        yield self

    def is_current(self, worker: "Worker") -> bool:
        return True

    @property
    def health(self) -> "Worker":
        return self

    def Watch(self, request: object) -> "Watch":
        self.watches += 1
        return Watch(is_cancelled=self.watches == 1)

    async def close(self, address: str) -> None:
        pass


class Watch:
    def __init__(self, is_cancelled: bool) -> None:
        self.is_cancelled = is_cancelled
        self.answers = [SERVING]

    async def read(self) -> Any:
        if self.answers:
            return self.answers.pop()
        if self.is_cancelled:
            # As gRPC raises a status CANCELLED, whoever it comes from.
            raise asyncio.CancelledError
        await asyncio.Event().wait()

    def cancel(self) -> None:
        pass


@in_loop
async def test_a_stream_that_the_worker_cancels(monkeypatch: pytest.MonkeyPatch) -> None:
    """When a worker cancels its health stream, the link to it is lost, and opened again."""
    monkeypatch.setattr(links, "RETRY_INTERVAL_S", 0)
    seen: list[LinkState] = []
    is_back = asyncio.Event()

    def note() -> None:
        seen.append(to_it.contacts["x"].health)
        if seen.count(LinkState.SERVING) == 2:
            is_back.set()

    to_it = Links(Worker(), SystemClock(), note)  # type: ignore[arg-type]
    await to_it.keep({"x"})
    await is_back.wait()
    assert seen == [LinkState.SERVING, LinkState.UNREACHABLE, LinkState.SERVING]
    await to_it.close()


@in_loop
async def test_a_call_that_the_worker_cancels() -> None:
    """A call that is cancelled at the worker is lost, so that another one is tried; the client's own end is its end."""

    async def cancelled_there() -> None:
        raise asyncio.CancelledError

    to_it = Links(Worker(), SystemClock(), lambda: None)  # type: ignore[arg-type]
    with pytest.raises(LostError):
        await to_it.call("x", cancelled_there())
    mine = asyncio.create_task(to_it.call("x", asyncio.Event().wait()))
    await asyncio.sleep(0)
    mine.cancel()
    with pytest.raises(asyncio.CancelledError):
        await mine


class Opener:
    """Opens channels that only note whether they are closed, which lasts until it is allowed."""

    def __init__(self) -> None:
        self.files = 0
        self.may_close = asyncio.Event()

    def version(self) -> int:
        return self.files

    def open(self, address: str) -> "Opened":
        return Opened(self)

    def open_aio(self, address: str) -> "Opened":
        return Opened(self, is_aio=True)


class Opened:
    def __init__(self, opener: Opener, is_aio: bool = False) -> None:
        self.opener, self.is_aio, self.is_closed = opener, is_aio, False

    def close(self, grace_s: float | None = None) -> Any:
        self.is_closed = True
        return self.opener.may_close.wait() if self.is_aio else None


@in_loop
async def test_key_files_that_change_twice_at_once() -> None:
    """A call that waits for an earlier connection to be closed still has its own, whatever changes meanwhile."""
    opener = Opener()
    channels = Channels(opener)  # type: ignore[arg-type]
    found: list[bool] = []

    async def call() -> None:
        async with channels.use("x") as worker:
            found.append(worker._aio.is_closed)  # type: ignore[attr-defined]

    await call()
    calls = []
    for _ in range(2):
        opener.files += 1
        calls.append(asyncio.create_task(call()))
        await asyncio.sleep(0)
    opener.may_close.set()
    await asyncio.gather(*calls)
    assert found == [False] * 3
    assert not channels._replaced
