"""What webhooks are sent to, and what not, with real sockets and certificates."""

import asyncio
import socket
import ssl
from collections.abc import Sequence
from pathlib import Path

import pytest
import trustme

from service import webhook_targets
from service.db.webhooks import Outcome
from service.webhooks import sender
from service.webhooks.sender import Sender
from tests.support.webhook_receiver import WebhookReceiver, receiving

LOOPBACK = webhook_targets.networks("127.0.0.0/8")
NOT_PUBLIC = "its address is not public, nor in BATCH_WEBHOOK_NETWORKS"


def sent(url: str, allowed: webhook_targets.Networks, *found: str) -> tuple[Outcome, int]:
    """What comes of sending to a URL whose host has these addresses, and how often they were looked up."""
    asked = 0

    async def resolve(host: str, port: int) -> Sequence[str]:
        nonlocal asked
        asked += 1
        return found if asked == 1 else ["127.0.0.1"]

    outcome = asyncio.run(
        Sender(allowed, resolve if found else sender.resolve).post(url, {"webhook-id": "evt_1"}, "{}")
    )
    return outcome, asked


@pytest.mark.parametrize(
    "found",
    [
        ["127.0.0.1"],
        ["10.1.2.3"],
        ["169.254.169.254"],
        ["::1"],
        ["fe80::1%eth0"],
        ["::ffff:127.0.0.1"],
        ["64:ff9b::7f00:1"],
        ["2002:7f00:1::"],
        ["100.64.0.1"],
        ["224.0.0.1"],
        ["1.1.1.1", "192.168.0.1"],
    ],
)
def test_names_of_addresses_that_are_not_public(found: list[str]) -> None:
    """A name that leads to a loopback, private, link-local or shared address gets nothing, nor if one of several is."""
    assert sent("https://example.com/", [], *found) == (Outcome(None, NOT_PUBLIC), 1)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", "10.0.0.1", "169.254.169.254", "[::ffff:7f00:1]"])
def test_this_host(host: str) -> None:
    """As they are resolved here: no connection arrives, whatever the address is called."""
    with receiving() as receiver:
        outcome, _ = sent(f"https://{host}:{receiver.server_port}/", [])
        assert outcome.status is None
        assert "not public" in outcome.error
        assert not receiver.received


def test_what_was_checked_is_what_is_called() -> None:
    """The name is looked up once: one that leads elsewhere a moment later gains nothing."""
    with receiving() as receiver:
        outcome, asked = sent(f"http://example.com:{receiver.server_port}/", LOOPBACK, "127.0.0.1")
        assert (outcome, asked) == (Outcome(204), 1)
        assert receiver.received[0].headers["host"] == f"example.com:{receiver.server_port}"


def test_http_only_where_it_is_allowed() -> None:
    """A public address is called by https alone, also when a network is allowed."""
    outcome, _ = sent("http://example.com/", LOOPBACK, "1.1.1.1")
    assert outcome == Outcome(None, "must begin with https:// outside BATCH_WEBHOOK_NETWORKS")
    assert sent("http://example.com/", [])[0] == Outcome(None, "the URL must begin with https://")


def test_redirects_are_not_followed() -> None:
    """A redirect is a failure: it could lead anywhere."""
    with receiving() as receiver:
        receiver.answer = lambda _: 307
        outcome, _ = sent(f"http://example.com:{receiver.server_port}/", LOOPBACK, "127.0.0.1")
        assert outcome == Outcome(307, "answered 307; redirects are not followed")
        assert len(receiver.received) == 1


def test_second_address_is_tried() -> None:
    """A host with several addresses is reached if one of them answers."""
    with receiving() as receiver:
        url = f"http://example.com:{receiver.server_port}/"
        assert sent(url, LOOPBACK, "127.0.0.9", "127.0.0.1")[0] == Outcome(204)


def test_silence_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """A target that accepts and never answers is left at the deadline."""
    monkeypatch.setattr(sender, "DEADLINE_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        outcome, _ = sent(f"http://example.com:{port}/", LOOPBACK, "127.0.0.1")
        assert outcome == Outcome(None, "no answer within 0 s")


@pytest.mark.parametrize(("name", "told"), [("hooks.test", ""), ("others.test", "cannot be reached")])
def test_certificates(name: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The certificate has to be for the name in the URL, whatever address that leads to."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("hooks.test").configure_cert(context)
    with receiving() as receiver:
        secure(receiver, context)
        outcome, _ = sent(f"https://{name}:{receiver.server_port}/", LOOPBACK, "127.0.0.1")
        assert told in outcome.error
        assert (outcome.status == 204) is not bool(told)


def secure(receiver: WebhookReceiver, context: ssl.SSLContext) -> None:
    receiver.socket = context.wrap_socket(receiver.socket, server_side=True)
