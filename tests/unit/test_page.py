"""What the page decides: whose requests are refused, what is sent again, what browsers may load."""

import asyncio
import re
from collections import Counter
from contextlib import AsyncExitStack, asynccontextmanager
from itertools import count
from types import SimpleNamespace
from typing import Any, cast

import pytest
from fastapi import Request
from fastapi.routing import APIRoute

from service.auth.callers import ANYBODY, Caller
from service.auth.roles import Role
from service.errors import ApiError
from service.http import browsers
from service.http.page import assets, batches, live, sessions
from service.rpc import call_context

NAMES = {"gpu-box"}


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1:50054",
        "127.0.0.1",
        "[::1]:50054",
        "192.0.2.7:80",
        "localhost:1",
        "gpu-box:50054",
        "GPU-BOX",
        "localhost.:1",
    ],
)
def test_host_of_this_machine(host: str) -> None:
    """Addresses and the machine's own names are taken."""
    assert browsers.wrong_host(host, NAMES) == ""


@pytest.mark.parametrize(
    "host", ["", "evil.example:50054", "127.0.0.1.evil.example", "gpu-box.evil.example", "[::1", "@"]
)
def test_host_of_somebody_else(host: str) -> None:
    """A name that another site has made to resolve to this machine is refused (DNS rebinding)."""
    assert browsers.wrong_host(host, NAMES)


@pytest.mark.parametrize(
    ("method", "headers", "is_foreign"),
    [
        ("POST", {}, False),
        ("GET", {"origin": "https://evil.example"}, False),
        ("POST", {"origin": "http://127.0.0.1:1", "host": "127.0.0.1:1"}, False),
        ("POST", {"origin": "http://127.0.0.1:2", "host": "127.0.0.1:1"}, True),
        ("POST", {"origin": "null", "host": "127.0.0.1:1"}, True),
        ("POST", {"origin": "http://[", "host": "127.0.0.1:1"}, True),
        ("POST", {"origin": "https://evil.example", "host": "127.0.0.1:1"}, True),
        ("POST", {"sec-fetch-site": "same-origin", "origin": "https://name", "host": "behind:1"}, False),
        ("POST", {"sec-fetch-site": "none"}, False),
        ("POST", {"sec-fetch-site": "cross-site", "origin": "http://127.0.0.1:1", "host": "127.0.0.1:1"}, True),
        ("GET", {"sec-fetch-site": "cross-site"}, True),
        ("GET", {"sec-fetch-site": "same-site"}, True),
    ],
)
def test_request_of_another_site(method: str, headers: dict[str, str], is_foreign: bool) -> None:
    """What a browser says comes from another site is refused; what is no browser is not."""
    assert bool(browsers.foreign(method, headers)) is is_foreign


def test_only_changes_are_sent() -> None:
    """Parts that are as before are not sent again, and those that are gone are named."""
    before = {"a": 1, "b": {"c": [1]}, "gone": 2}
    assert live.changed({}, before) == before
    assert live.changed(before, before) == {}
    assert live.changed(before, {"a": 1, "b": {"c": [2]}, "new": 3}) == {"b": {"c": [2]}, "new": 3, "gone": None}


def test_cookie_of_a_session() -> None:
    """The secret is found among the cookies of other programs on this host, whatever these look like."""
    assert sessions.secret_of({"cookie": "a=1; vllm_batch_session=s3cret; b=2"}) == "s3cret"
    for other in ('a={"b": 1}', "a b=1", "=", 'a="', "é"):
        assert sessions.secret_of({"cookie": f"{other}; vllm_batch_session=s3cret; {other}"}) == "s3cret"
    assert sessions.secret_of({"cookie": "a=1"}) == ""
    assert sessions.secret_of({}) == ""


def test_policy() -> None:
    """Nothing inline, nothing of other hosts, no markup made of text; and the files of the page ask for none of it."""
    for part in ("default-src 'none'", "script-src 'self'", "style-src 'self'", "frame-ancestors 'none'"):
        assert part in assets.POLICY
    assert "unsafe" not in assets.POLICY
    texts = {path.name: path.read_text() for path in assets.STATIC.iterdir() if path.suffix in assets.TYPES}
    assert {"index.html", "main.js", "page.css"} <= texts.keys()
    for name, text in texts.items():
        links = set(re.findall(r"https?://[^\s\"')]+", text)) - {"http://www.w3.org/2000/svg"}
        assert not links, name
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|\son\w+=|<style|style=", text
        )


def test_a_token_that_changes_while_the_page_is_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is sent from then on is what the token may see now: not what its role or tenant could when it signed in."""
    monkeypatch.setattr(live, "INTERVAL_S", 0)
    before, now = Caller("ann", "ann", Role.OPERATE), Caller("ann", "ann", Role.READ)
    ending, seen = asyncio.Event(), []

    async def parts(*_: str) -> dict[str, Any]:
        seen.append(call_context.current().caller)
        if len(seen) == 2:
            ending.set()
        return {}

    async def caller(*_: object) -> Caller:
        return now

    clock = SimpleNamespace(monotonic=count(0, 2 * live.CHECK_S).__next__)
    following = cast("live.Live", SimpleNamespace(parts=parts, clock=clock, ending=ending))
    [route] = live.router(following, cast("sessions.Sessions", SimpleNamespace(caller=caller))).routes
    assert isinstance(route, APIRoute)

    async def run() -> None:
        call_context.begin("/page/Follow", ()).caller = before
        async for _ in route.endpoint(Request({"type": "http", "headers": []}), "batches"):
            pass

    asyncio.run(run())
    assert seen == [now, now]


def test_lines_of_a_file_that_was_deleted() -> None:
    """Its pieces are removed later than the file, and nobody reads them any more."""

    def run(function: Any, *args: Any) -> asyncio.Future[Any]:
        found: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        found.set_result(None if function.__name__ == "get" else b"secret\n")
        return found

    database = cast("Any", SimpleNamespace(read=run, run=run))
    assert asyncio.run(batches._lines(database, 1, {1})) == {}


def test_pages_of_one_token_are_few() -> None:
    """Whoever opens as many as the server lets one has, leaves room for others; closed ones do not count."""
    following = cast("live.Live", SimpleNamespace(streams=Counter()))
    [route] = live.router(following, cast("sessions.Sessions", None)).routes
    assert isinstance(route, APIRoute)
    [depends] = route.dependencies
    assert depends.dependency is not None
    slot = asynccontextmanager(depends.dependency)

    async def run() -> None:
        call = call_context.begin("/page/Follow", ())
        async with AsyncExitStack() as mine:
            call.caller = Caller("ann", "ann", Role.READ)
            for _ in range(live.MAX_STREAMS_EACH):
                await mine.enter_async_context(slot())
            with pytest.raises(ApiError, match="ann has 50 pages open"):
                await mine.enter_async_context(slot())
            call.caller = Caller("bob", "bob", Role.READ)
            async with slot():
                assert following.streams.total() == live.MAX_STREAMS_EACH + 1
            # Where no token is required nobody can be told apart.
            call.caller = ANYBODY
            for _ in range(live.MAX_STREAMS - live.MAX_STREAMS_EACH):
                await mine.enter_async_context(slot())
            with pytest.raises(ApiError, match="200 pages are open"):
                await mine.enter_async_context(slot())
        assert not following.streams

    asyncio.run(run())
