"""What webhooks decide without I/O: targets, retries, targets that rest, what is signed."""

import asyncio
import json
import re
import socket
import threading
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from uuid import UUID

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai import InvalidWebhookSignatureError, OpenAI

from service import config, tenants, webhook_targets
from service.auth import key_files
from service.clock import SystemClock
from service.config import Settings
from service.db import webhooks
from service.db.webhooks import Delivery
from service.tenants import Quotas, Webhook
from service.webhooks import deliverer, retries, sender, signing
from service.webhooks.retries import FAILURES, LONGEST_REST_S, PER_TARGET, REST_S, Breaker
from tests.support.webhook_receiver import SECRET

TARGET = ("default", "https://example.com")
PRIVATE = webhook_targets.networks("10.0.0.0/8, 127.0.0.0/8,fd00::/8")


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("https://example.com", ""),
        ("https://example.com:8443/a/b?c=d", ""),
        ("https://1.1.1.1/", ""),
        ("http://example.com/", "must begin with https://"),
        ("https://10.0.0.1/", "not public"),
        ("https://[::1]/", "not public"),
        ("https://[::ffff:192.168.0.1]/", "not public"),
        ("https://0x7f.1/", "is not an IPv4 address"),
        ("https://2130706433/", "is not an IPv4 address"),
        ("https://user:password@example.com/", "neither a user"),
        ("https://example.com/#part", "nor a fragment"),
        ("https://example.com:0/", "must be a URL"),
        ("https://example.com:99999/", "must be a URL"),
        ("https:///path", "must be a URL"),
        ("file:///etc/passwd", "must be a URL"),
        ("//example.com/", "must be a URL"),
        ("https://exa mple.com/", "printable ASCII"),
        ("https://example.com/\r\nHost: x", "printable ASCII"),
        ("https://bücher.example/", "printable ASCII"),
        ("https://example.com\\@10.0.0.1/", "printable ASCII"),
        ("https://example.com/" + "a" * 2048, "2048"),
    ],
)
def test_urls(url: str, told: str) -> None:
    """A URL is refused for what can be seen in it, and the text says why without a password in it."""
    found = webhook_targets.problem(url, [])
    assert told in found
    assert bool(found) is bool(told)
    assert "password" not in found


@pytest.mark.parametrize(
    "url", ["http://10.0.0.1/", "http://example.com/", "https://127.0.0.1:1/", "http://[fd00::1]/"]
)
def test_networks_that_are_allowed(url: str) -> None:
    """What the setting names may be a target, by http too; nothing else that is not public."""
    assert webhook_targets.problem(url, PRIVATE) == ""
    assert webhook_targets.problem("https://192.168.0.1/", PRIVATE)
    assert not webhook_targets.is_allowed("169.254.169.254", PRIVATE)
    with pytest.raises(ValueError, match=r"'10\.0\.0\.1/8' is not a network"):
        webhook_targets.networks("10.0.0.1/8")


# What other machines of a network, or this one, have, and what leads there by another way.
NOT_PUBLIC = [
    *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.168.0.0/16"),
    *("224.0.0.0/4", "240.0.0.0/4", "::/128", "::1/128", "fc00::/7", "fe80::/10", "ff00::/8", "::ffff:10.0.0.0/104"),
    *("64:ff9b::7f00:0/104", "64:ff9b::a9fe:0/112", "2002:a00::/24", "2002:c0a8::/32", "::10.0.0.0/104"),
]


@given(st.sampled_from(NOT_PUBLIC).flatmap(lambda network: st.ip_addresses(network=network)), st.integers(1, 65_535))
def test_no_address_that_is_not_public(address: Any, port: int) -> None:
    """No address of a private network is a target, however it is written, nor connected to once a name leads there."""
    assert not webhook_targets.is_allowed(str(address), [])
    hosts = [str(address)] if address.version == 4 else [f"[{address}]", f"[{address.exploded}]".upper()]
    for host in hosts:
        for url in (f"https://{host}", f"https://{host}:{port}/a?b", f"HTTPS://{host}/"):
            assert webhook_targets.problem(url, [])


URL_PIECES = st.sampled_from(
    [
        *("https://", "http://", "//", "HTTPS:", "a.example", "10.0.0.1", "127.1", "0x7f.1", "[::1]", "[fe80::1%25a]"),
        *(":", ":443", ":0", ":99999", "@", "/", "?", "#", "\\", "%", "%2f", ".", "..", "[", "]", "é", " ", "\n", "\0"),
    ]
)


@given(
    st.lists(URL_PIECES, max_size=7).map("".join)
    | st.lists(URL_PIECES, max_size=4).map(lambda parts: "https://a.example" + "".join(parts))
)
def test_any_url(url: str) -> None:
    """Any text is refused with a reason, or is a URL of which every reader has the same host, without a user."""
    if told := webhook_targets.problem(url, []):
        assert told[0].islower() or told[0] == "'", told
        return
    read = httpx.URL(url)
    parts = webhook_targets.split(url)
    assert (read.scheme, read.host, read.port) == ("https", parts.hostname, parts.port if parts.port != 443 else None)
    assert not read.userinfo
    assert not re.search(r"[\s\\]", url)
    assert webhook_targets.origin(url).lower() == f"https://{parts.netloc}".lower()


def test_origin() -> None:
    """Logs have no path: it may be a secret."""
    for url in ("https://a.example:1/b", "https://a.example:1?b=/c", "https://a.example:1"):
        assert webhook_targets.origin(url) == "https://a.example:1"


@given(st.integers(1, 10**6), st.floats(0, 1))
def test_delays(tries: int, chance: float) -> None:
    """Each delay is between half of and the whole of twice the one before, from 5 s to an hour."""
    longest = min(3600.0, 5.0 * 2 ** min(tries - 1, 30))
    assert longest / 2 <= retries.delay_s(tries, chance) <= longest


def test_a_day_of_tries() -> None:
    """Within the day there are many tries at first, then about one an hour."""
    time_s, tries = 0.0, 0
    while time_s < webhooks.PATIENCE_S:
        tries += 1
        time_s += retries.delay_s(tries, 0.5)
    assert 35 <= tries <= 45


def test_target_rests_after_failures_in_a_row() -> None:
    """Ten failures rest a target; then one delivery at a time probes it; a success ends it, a failure doubles it."""
    breaker = Breaker()
    for _ in range(FAILURES - 1):
        assert breaker.failed(TARGET, 0) is None
    assert not breaker.succeeded(TARGET)
    for _ in range(FAILURES - 1):
        assert breaker.failed(TARGET, 0) is None
    assert breaker.allowance(TARGET, 0) == PER_TARGET
    assert breaker.failed(TARGET, 0) == REST_S
    # What was under way does not count.
    assert breaker.failed(TARGET, 1) is None
    assert (breaker.allowance(TARGET, 59), breaker.resting(59)) == (0, [TARGET])
    assert (breaker.allowance(TARGET, 60), breaker.resting(60)) == (1, [])
    assert breaker.full([], 60) == []
    assert breaker.full([TARGET], 60) == [TARGET]
    assert breaker.failed(TARGET, 60) == 2 * REST_S
    assert breaker.full([], 100) == [TARGET]
    assert breaker.allowance(("other", TARGET[1]), 100) == PER_TARGET
    for time_s in range(1000, 20_000, 1000):
        breaker.failed(TARGET, time_s)
    assert breaker.failed(TARGET, 30_000) == LONGEST_REST_S
    assert breaker.succeeded(TARGET)
    assert breaker.allowance(TARGET, 30_000) == PER_TARGET


def test_targets_at_work_are_full() -> None:
    """A target has a few deliveries under way at once, however many wait."""
    breaker = Breaker()
    assert breaker.full([TARGET] * (PER_TARGET - 1), 0) == []
    assert breaker.full([TARGET] * PER_TARGET, 0) == [TARGET]


def test_a_tenant_whose_targets_do_not_answer_leaves_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many targets a tenant names, and although they are due longest, the events of others go on."""
    now = datetime.now(UTC)

    def due(tenant: str, number: int) -> Delivery:
        url = f"https://{number}.example/"
        return Delivery(
            UUID(int=number),
            *(number, number, tenant, "batch.completed", url, True, "pending", 0, None, "", now, None, now, None, None),
        )

    waiting = [*(due("many", number) for number in range(100)), due("one", 100)]
    under_way: list[int] = []

    def run(function: Any, *args: Any) -> asyncio.Future[Any]:
        found: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        if function is webhooks.due:
            _, limit, full, busy = args
            found.set_result(
                [
                    each
                    for each in waiting
                    if each.number not in under_way
                    and each.tenant not in busy
                    and (each.tenant, webhook_targets.origin(each.url or "")) not in full
                ][:limit]
            )
        else:
            under_way.extend(one.int for one in args[0])
            found.set_result([waiting[one.int] for one in args[0]])
        return found

    async def never(*_: object) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(deliverer.Deliverer, "_deliver", never)

    async def rounds() -> None:
        database = cast("Any", SimpleNamespace(run=run))
        delivering = deliverer.Deliverer(database, [], deliverer.Signer(Quotas, SystemClock()), str)
        while await delivering._round():
            pass
        for task in delivering._tasks:
            task.cancel()

    asyncio.run(rounds())
    assert under_way == [*range(deliverer.PER_TENANT), 100]


def test_remembered_targets_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody who invents targets does not fill the memory."""
    monkeypatch.setattr(retries, "TARGETS", 3)
    breaker = Breaker()
    for number in range(10):
        breaker.failed(("t", str(number)), 0)
    assert len(breaker._failing) == 3


def test_no_two_tries_overlap() -> None:
    """A lease outlasts a try, so that a batch's event is never sent twice at once."""
    assert webhooks.LEASE_S > deliverer.SIGN_S + sender.DEADLINE_S + 2 * deliverer.INTERVAL_S


def test_names_that_are_not_resolved_hold_up_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each try has a thread for its lookup, also while those of earlier ones wait for their name server."""
    end = threading.Event()

    def resolved(host: str, port: int, **_: object) -> list[object]:
        if host == "silent.example":
            end.wait()
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("192.0.2.1", port))]

    monkeypatch.setattr(socket, "getaddrinfo", resolved)
    # A lookup may take about three times as long as a try.
    tries = 3 * (deliverer.CONCURRENCY + deliverer.TESTS)

    async def run() -> None:
        silent = [asyncio.create_task(sender.resolve("silent.example", 443)) for _ in range(tries)]
        try:
            assert await asyncio.wait_for(sender.resolve("a.example", 443), 10) == ["192.0.2.1"]
        finally:
            end.set()
            await asyncio.gather(*silent)

    asyncio.run(run())


def test_a_secret_that_cannot_be_read_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that hangs fails the try, within the lease: other tenants' events do not wait for it."""
    monkeypatch.setattr(deliverer, "SIGN_S", 0.01)
    end = threading.Event()

    class Slow(deliverer.Signer):
        def signed(self, tenant: str, event: UUID, body: str) -> dict[str, str]:
            end.wait()
            return {}

    async def run() -> webhooks.Outcome:
        sending = deliverer.Deliverer(cast("Any", None), [], Slow(Quotas, SystemClock()), str)
        try:
            return await asyncio.wait_for(sending._send("a", UUID(int=1), "https://a.example", "{}"), 10)
        finally:
            end.set()

    assert "cannot be signed" in asyncio.run(run()).error


def test_signed_as_openai_does() -> None:
    """The openai package accepts an event signed with its secret among others, and no other secret or content."""
    event = UUID(int=5)
    name = signing.event_name(event)
    assert (signing.event_id(name), signing.event_id("evt_1"), signing.event_id("5")) == (event, None, None)
    now = datetime.now(UTC)
    body = signing.body(name, "batch.completed", "batch_1", now)
    other = "whsec_" + "bm90IHRoaXMgb25lLCBidXQgb2YgdGhlIHNhbWUgbGVuZ3Ro"
    headers = signing.headers([other, SECRET], name, body, now)
    client = OpenAI(api_key="none", webhook_secret=SECRET)
    assert client.webhooks.unwrap(body, headers).id == name
    assert json.loads(body)["created_at"] == int(now.timestamp())
    for wrong in (signing.headers([other], name, body, now), signing.headers([SECRET], "evt_2", body, now)):
        with pytest.raises(InvalidWebhookSignatureError):
            client.webhooks.unwrap(body, wrong | {"webhook-id": name})
    with pytest.raises(InvalidWebhookSignatureError):
        client.webhooks.unwrap(body + " ", headers)


def test_files_of_secrets(tmp_path: Path) -> None:
    """A file of secrets is private and has secrets as the Standard Webhooks have them; errors do not show them."""
    file = tmp_path / "secret"
    file.touch(0o600)
    for text in ("", "# none\n", "whsec_dG9vIHNob3J0\n", "c2VjcmV0IG9mIHRoZSB0ZXN0cywgbm90aGluZyBtb3Jl", f"{SECRET}!"):
        file.write_text(text)
        with pytest.raises(ValueError) as caught:  # noqa: PT011
            key_files.read_webhook_secrets(file)
        assert "dG9v" not in str(caught.value)
        assert "c2Vj" not in str(caught.value)
    file.write_text(f"{SECRET}\n")
    assert key_files.read_webhook_secrets(file) == (SECRET,)
    file.chmod(0o644)
    with pytest.raises(ValueError, match="0644"):
        key_files.read_webhook_secrets(file)


def test_webhooks_of_tenants(tmp_path: Path) -> None:
    """The file of tenants says where events go and what signs them, beside that file; wrong keys are named."""
    file = tmp_path / "tenants.toml"
    file.write_text('[tenants.a.webhook]\nurl = "https://example.com/"\nsecret_file = "a"\n[tenants.b]\nweight = 2\n')
    quotas = key_files.read_quotas(file)
    assert quotas.of("a").webhook == Webhook(str(tmp_path / "a"), "https://example.com/")
    assert quotas.of("b").webhook is quotas.of("c").webhook is None
    for text, told in (
        ('[tenants.a.webhook]\nurl = "https://example.com/"', "tenants.a.webhook.secret_file: field required"),
        (
            '[tenants.a.webhook]\nsecret_file = "a"\nsecret = "b"',
            "tenants.a.webhook.secret: there is no such key, only",
        ),
        ('[tenants.a.webhook]\nsecret_file = "a"\nurl = "example.com"', "tenants.a.webhook.url: must be a URL"),
        ('[webhook]\nsecret_file = "a"', "webhook: there is no such key, only weight"),
    ):
        with pytest.raises(ValueError, match=told):
            tenants.parse(text)


def test_check_tells_of_webhooks(tmp_path: Path) -> None:
    """`--check` names secrets that cannot be used and targets that would be refused; a process starts without them."""
    file = tmp_path / "tenants.toml"
    file.write_text('[tenants.a.webhook]\nurl = "http://10.0.0.1/"\nsecret_file = "a"\n')
    settings = Settings(tenants_file=file)
    assert config.wrong_files(settings) == []
    [told] = config.wrong_webhooks(settings)
    assert told.startswith("BATCH_TENANTS_FILE: tenants.a.webhook.secret_file: ")
    (tmp_path / "a").touch(0o600)
    (tmp_path / "a").write_text(SECRET)
    assert config.wrong_webhooks(settings) == ["BATCH_TENANTS_FILE: tenants.a.webhook.url: must begin with https://"]
    assert config.wrong_webhooks(Settings(tenants_file=file, webhook_networks="10.0.0.0/8")) == []
    with pytest.raises(ValueError, match="is not a network"):
        Settings(webhook_networks="somewhere")
