"""The API of the page: sessions, what other sites cannot do, live parts, orders that reach a watchdog."""

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import httpx
import psycopg2
import pytest

from service.auth import tokens
from service.auth.roles import Role
from service.db import recovery_orders, watchdogs
from service.db.connection import Database
from tests.support.batches import line
from tests.support.servers import Stack, new_stack
from tests.support.waiting import until
from watchdog.host import Host
from watchdog.orders import Orders
from watchdog.record.audit_log import UnrecordedError
from watchdog.self_report import Report

CSRF = "x-csrf-token"


@pytest.fixture(scope="module")
def guarded(postgres: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Stack, dict[str, str], Path]]:
    """OpenAI's door with the page, alone, with tokens: the secrets by name, and the file of tokens."""
    folder = tmp_path_factory.mktemp("page")
    made = {name: tokens.new(name, Role(name)) for name in ("read", "submit", "operate")}
    hashes = folder / "hashes"
    hashes.write_text("".join(f"{token.line()}\n" for _, token in made.values()))
    hashes.chmod(0o600)
    with new_stack(postgres, folder) as stack:
        stack.http(token_hashes=hashes)
        yield stack, {name: secret for name, (secret, _) in made.items()}, hashes


def browser(stack: Stack) -> httpx.Client:
    return httpx.Client(base_url=f"http://127.0.0.1:{stack.http_port}", timeout=30)


@contextmanager
def signed_in(stack: Stack, secret: str) -> Iterator[httpx.Client]:
    """A browser with a session, which sends the proof with each request."""
    with browser(stack) as client:
        assert client.post("/page/api/session", json={"token": secret}).status_code == 204
        client.headers[CSRF] = client.get("/page/api/session").json()["proof"]
        yield client


def first_parts(client: httpx.Client, **query: str) -> dict[str, Any]:
    with client.stream("GET", "/page/api/live", params=query) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        for text in answer.iter_lines():
            if text.startswith("data: "):
                found: dict[str, Any] = json.loads(text.removeprefix("data: "))
                return found
    raise AssertionError("the stream has ended")


def test_page_is_served_with_its_policy(door: Stack) -> None:
    """The page and its files come with a policy that allows nothing else; there are no others."""
    with browser(door) as client:
        for path in ("/", "/page/main.js", "/page/page.css"):
            answer = client.get(path)
            assert answer.status_code == 200
            assert "default-src 'none'" in answer.headers["content-security-policy"]
            assert answer.headers["x-content-type-options"] == "nosniff"
        for path in ("/page/../app.py", "/page/%2e%2e/door.py", "/page/nothing.js"):
            assert client.get(path).status_code == 404


def test_hosts(guarded: tuple[Stack, dict[str, str], Path]) -> None:
    """Operators see each host as HostService has it, and drain, resume and forget it; others do neither."""
    stack, secrets, _ = guarded
    name = socket.gethostname()
    with signed_in(stack, secrets["operate"]) as client:

        def host() -> dict[str, Any]:
            found = first_parts(client, view="workers")["host_list"]["hosts"]
            return next((one for one in found if one["name"] == name), {})

        until(host, "the server to report itself")
        assert host()["state"] == "HOST_STATE_ALIVE"
        assert [(one["name"], one["is_alive"]) for one in host()["programs"]] == [("http", True)]
        assert client.post("/page/api/hosts/drain", json={"name": name, "reason": "new disk"}).status_code == 200
        assert (host()["drain"]["reason"], host()["notes"]) == ("new disk", ["drained (new disk)"])
        refused = client.post("/page/api/hosts/forget", json={"name": name})
        assert refused.status_code == 400
        assert "is alive" in refused.json()["error"]["message"]
        assert client.post("/page/api/hosts/resume", json={"name": name}).status_code == 200
        assert "drain" not in host()
        assert client.post("/page/api/hosts/resume", json={"name": "nowhere"}).status_code == 404
        del client.headers[CSRF]
        assert client.post("/page/api/hosts/drain", json={"name": name}).status_code == 403
    with signed_in(stack, secrets["submit"]) as client:
        assert "host_list" not in first_parts(client, view="workers")
        for order in ("drain", "resume", "forget"):
            assert client.post(f"/page/api/hosts/{order}", json={"name": name}).status_code == 403


def test_session(guarded: tuple[Stack, dict[str, str], Path]) -> None:
    """A session does what the token's role allows, needs its proof for changes, and ends with the token."""
    stack, secrets, hashes = guarded
    with browser(stack) as client:
        assert client.get("/page/api/session").status_code == 401
        wrong = client.post("/page/api/session", json={"token": "vbt_wrong"})
        assert (wrong.status_code, wrong.headers.get("set-cookie")) == (401, None)
        assert client.get("/page/api/session", headers={"cookie": "vllm_batch_session=guessed"}).status_code == 401
    order = {"worker_id": "host:worker", "kind": "resumed", "reason": "because"}
    with signed_in(stack, secrets["submit"]) as client:
        assert client.get("/v1/batches").status_code == 401, "the cookie counts on the page alone"
        assert client.post("/page/api/orders", json=order).status_code == 403
        file = {"file": ("in.jsonl", line("a"))}
        assert client.post("/page/api/v1/files", data={"purpose": "batch"}, files=file).status_code == 200
        del client.headers[CSRF]
        refused = client.post("/page/api/v1/files", data={"purpose": "batch"}, files=file)
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "request_foreign")
        for secret in secrets.values():
            assert secret not in stack.servers[0].log.read_text()
    with signed_in(stack, secrets["operate"]) as client:
        assert client.post("/page/api/orders", json=order).status_code == 404
        assert "list" in first_parts(client, view="batches")
        hashes.write_text("".join(f"{text}\n" for text in hashes.read_text().splitlines() if "operate" not in text))
        until(lambda: client.get("/page/api/session").status_code == 401, "the session to end with its token")


def test_a_browser_behind_a_proxy(guarded: tuple[Stack, dict[str, str], Path]) -> None:
    """Where TLS ends at a proxy, the cookie still goes over TLS alone: the browser says how it loaded the page."""
    stack, secrets, _ = guarded
    with browser(stack) as client:
        for scheme in ("http", "https"):
            headers = {"origin": f"{scheme}://127.0.0.1:{stack.http_port}"}
            answer = client.post("/page/api/session", json={"token": secrets["read"]}, headers=headers)
            assert answer.status_code == 204
            assert ("Secure" in answer.headers["set-cookie"]) is (scheme == "https")


def test_guesses_are_limited(stack: Stack, tmp_path: Path) -> None:
    """Whose cookie is wrong, or who says in X-Forwarded-For to be another client each time, asks Postgres no more often
    than the rate limit allows."""
    _, token = tokens.new("read", Role.READ)
    (tmp_path / "hashes").write_text(f"{token.line()}\n")
    (tmp_path / "hashes").chmod(0o600)
    stack.http(token_hashes=tmp_path / "hashes", rate_limit_per_s=0.001)
    with browser(stack) as client:
        for number in range(100):
            headers = {"cookie": f"vllm_batch_session={number}", "x-forwarded-for": f"192.0.2.{number}"}
            answer = client.get("/page/api/session", headers=headers)
            if answer.status_code == 429:
                break
            assert answer.status_code == 401
        assert answer.json()["error"]["code"] == "rate_limited"
        assert "ipv4:127.0.0.1" in answer.json()["error"]["message"]
        # There are no web sockets: it is a request like others.
        headers = {"connection": "upgrade", "upgrade": "websocket", "sec-websocket-version": "13"}
        assert client.get("/healthz", headers=headers | {"sec-websocket-key": "a" * 24}).status_code == 200


def test_stored_sessions_have_no_secrets(guarded: tuple[Stack, dict[str, str], Path]) -> None:
    """Postgres has neither the cookie nor the token; signing out removes the session."""
    stack, secrets, _ = guarded
    with signed_in(stack, secrets["read"]) as client, psycopg2.connect(stack.database_url) as connection:
        cookie = client.cookies["vllm_batch_session"]
        cursor = connection.cursor()
        cursor.execute("SELECT count(*), string_agg(s::text, ' ') FROM page_sessions s")
        before, shown = cursor.fetchone() or (0, "")
        assert cookie not in shown
        assert cookie.encode().hex() not in shown
        assert secrets["read"] not in shown
        assert client.delete("/page/api/session").status_code == 204
        cursor.execute("SELECT count(*) FROM page_sessions")
        assert cursor.fetchone() == (before - 1,)


@pytest.mark.parametrize(
    ("headers", "method", "path"),
    [
        ({"host": "evil.example"}, "GET", "/page/api/session"),
        ({"host": "evil.example"}, "GET", "/v1/batches"),
        ({"host": "evil.example"}, "POST", "/v1/files"),
        ({"origin": "https://evil.example"}, "POST", "/v1/files"),
        ({"sec-fetch-site": "cross-site"}, "POST", "/v1/batches"),
        ({"sec-fetch-site": "cross-site"}, "GET", "/page/api/session"),
        ({"origin": "null", CSRF: "no-tokens"}, "DELETE", "/page/api/batches/batch_1"),
        ({}, "DELETE", "/page/api/batches/batch_1"),
    ],
)
def test_other_sites_are_refused(door: Stack, headers: dict[str, str], method: str, path: str) -> None:
    """Without tokens too, no other site reads or changes anything through a visitor's browser."""
    with browser(door) as client:
        answer = client.request(method, path, headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "request_foreign")


def test_live_parts(door: Stack) -> None:
    """Each view begins with all its parts; a batch that is not there is refused by name."""
    with browser(door) as client:
        client.headers[CSRF] = client.get("/page/api/session").json()["proof"]
        stored = client.post("/page/api/v1/files", data={"purpose": "batch"}, files={"file": ("a.jsonl", line("a"))})
        asked = {"endpoint": "/v1/chat/completions", "completion_window": "24h", "input_file_id": stored.json()["id"]}
        name = client.post("/page/api/v1/batches", json=asked).json()["id"]
        parts = first_parts(client, view="batches")
        assert name in parts["list"]["ids"]
        assert parts[f"batch:{name}"]["state"] == "BATCH_STATE_VALIDATING"
        assert parts["service"]["reason"] == "WORKER_OFFLINE"
        parts = first_parts(client, view="batch", batch=name)
        assert parts["file"]["filename"] == "a.jsonl"
        assert first_parts(client, view="batch", batch="batch_1")["code"] == "NOT_FOUND"
        assert {"hosts", "events"} <= first_parts(client, view="workers").keys()
        assert [tenant["name"] for tenant in first_parts(client, view="tenants")["tenants"]] == ["default"]


def test_orders_reach_a_watchdog_once(database: Database) -> None:
    """A watchdog takes the orders for its own workers, once it could record them, and with what is left of a pause."""
    guard, stranger = Mock(snapshot=None), "elsewhere:gateway"
    workers, gateways = Host(Mock(), Mock(), by_worker={"here:worker": guard}), Host(Mock(), Mock())
    orders = Orders(database, workers, gateways)
    assert not database.call(recovery_orders.leave, "here:worker", "paused", "nobody has told of it", 60)
    supervisor = Mock(states=dict)
    database.call(watchdogs.write, "here", 1, "", Report(supervisor, workers, gateways, 10, list).detail())
    theirs = Host(Mock(), Mock(), by_worker={stranger: Mock(snapshot=None)})
    database.call(watchdogs.write, "elsewhere", 1, "", Report(supervisor, gateways, theirs, 10, list).detail())
    assert database.call(recovery_orders.leave, "here:worker", "paused", "cable", 3600)
    assert database.call(recovery_orders.leave, stranger, "resumed", "theirs", 0)
    guard.order.side_effect = UnrecordedError
    orders.take()
    assert len(database.call(recovery_orders.waiting)) == 2
    guard.order.side_effect = None
    guard.order.reset_mock()
    orders.take()
    [(kind, reason, left_s), _] = guard.order.call_args
    assert (kind, reason) == ("paused", "cable")
    assert 3500 < left_s <= 3600
    orders.take()
    guard.order.assert_called_once()
    assert [order.worker_id for order in database.call(recovery_orders.waiting)] == [stranger]
    told = [
        (status["worker_id"], status["is_gateway"]) for dog in database.call(watchdogs.read) for status in dog.guards
    ]
    assert told == [(stranger, True), ("here:worker", False)]
