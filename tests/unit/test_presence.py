"""What a server that is no worker reads of workers, and how often."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from uuid import uuid4

import pytest

from service import machine
from service.db.availability import DatabaseAwayError
from service.db.connection import check_schema
from service.db.heartbeats import Beat, SeenBeat
from service.errors import ApiError
from service.insight import presence as presence_module
from service.insight.presence import RARELY_S, Presence
from service.insight.routing import Contact, Freshness, LinkState


@dataclass
class Postgres:
    """Answers each reading with the same, and notes whether it was of everything. Its time is what a test says."""

    now_s: float = 0.0
    found: Freshness = field(default_factory=Freshness)
    readings: list[bool] = field(default_factory=list)

    def run(self, function: Callable[..., Any], *given: Any) -> asyncio.Future[Any]:
        answer = asyncio.get_running_loop().create_future()
        if len(given) == 2:
            self.readings.append(given[1] is None)
        answer.set_result(self.found)
        return answer

    read = run

    def monotonic(self) -> float:
        return self.now_s


async def ignore(_: bool) -> None:
    return None


@pytest.mark.parametrize(("is_accepting", "is_all"), [(True, [True, False, False, True]), (False, [True] * 4)])
def test_what_changes_rarely_is_read_rarely(is_accepting: bool, is_all: list[bool]) -> None:
    """While work is accepted each look reads the heartbeats, and the rest every RARELY_S; while it is not, all."""
    stub = Postgres()
    there: Any = stub
    presence = Presence(there, there, there, 60.0, ignore, machine.here())
    presence._is_accepting = is_accepting

    async def look() -> None:
        for stub.now_s in (0.0, 1.0, RARELY_S - 1, RARELY_S):
            await presence.look()

    asyncio.run(look())
    assert stub.readings == is_all


def test_a_reading_that_hangs_tells_an_outage(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reading that waits for a frozen Postgres, or to connect to one, is not waited for: Postgres is away."""
    monkeypatch.setattr(presence_module, "AWAY_S", 0.0)
    there: Any = Postgres()
    there.read = lambda *_: asyncio.get_running_loop().create_future()
    presence = Presence(there, there, there, 60.0, ignore, machine.here())

    async def look() -> None:
        looking = asyncio.ensure_future(presence.look())
        async with asyncio.timeout(30):
            await presence._judge_now.wait()
        looking.cancel()

    asyncio.run(look())
    assert "did not answer" in presence.freshness.failure


class Connecting:
    """Channels to workers that never answer."""

    @asynccontextmanager
    async def use(self, address: str) -> AsyncIterator[None]:
        yield await asyncio.get_running_loop().create_future()

    async def close(self, address: str) -> None:
        pass


@pytest.mark.parametrize("health", LinkState)
def test_which_link_outlives_the_heartbeat(health: LinkState) -> None:
    """The link to a worker whose heartbeat is too old is kept while it is SERVING, until the heartbeat is forgotten. No
    new work goes there."""
    stub = Postgres()
    there: Any = stub
    channels: Any = Connecting()
    presence = Presence(there, channels, there, 60.0, ignore, machine.here())
    seen = SeenBeat(Beat("a:worker", uuid4(), "127.0.0.1:1", "ready", 1, place=machine.here()), 1.0)

    async def look() -> None:
        stub.found = Freshness([seen])
        await presence.look()
        presence._links.contacts["127.0.0.1:1"] = Contact(health)
        stub.found = Freshness([replace(seen, age_s=61.0)])
        await presence.look()
        assert ("127.0.0.1:1" in presence.now().contacts) is (health is LinkState.SERVING)
        with pytest.raises(ApiError):
            presence.live()
        stub.found = Freshness()
        await presence.look()
        assert not presence.now().contacts
        await presence._links.close()

    asyncio.run(look())


def test_the_schema_is_there_once_it_was_found() -> None:
    """A gateway of a new version, which others may wait for, has its schema only once that is migrated."""
    stub, pending = Postgres(), True

    def run(function: Callable[..., Any], *given: Any) -> asyncio.Future[Any]:
        if function is check_schema and pending:
            raise DatabaseAwayError("migration 0028 is pending")
        return Postgres.run(stub, function, *given)

    there: Any = stub
    stub.run = run  # type: ignore[method-assign]

    async def look() -> None:
        nonlocal pending
        presence = Presence(there, there, there, 60.0, ignore, machine.here())
        await presence.look()
        assert not presence.has_schema.is_set()
        pending = False
        await presence.look()
        assert presence.has_schema.is_set()

    asyncio.run(look())
