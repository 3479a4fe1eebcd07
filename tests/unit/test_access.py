"""Tokens, roles and the rate limit, without sockets or clocks."""

import os
import re
import subprocess
import sys
import threading
from datetime import UTC, datetime
from pathlib import Path
from unittest.mock import AsyncMock

import grpc
import pytest

from service import machine
from service.auth import new_token, roles, tokens
from service.auth.callers import ANYBODY, NOBODY, Caller
from service.auth.roles import Role
from service.config import Settings
from service.db.connection import Database
from service.db.limits import Limits
from service.errors import ApiError
from service.http import app
from service.http.files import Keeping
from service.http.page.sessions import Sessions
from service.http.page.wiring import Page
from service.insight.channel_opener import ChannelOpener
from service.insight.channels import Channels
from service.insight.presence import Presence
from service.rpc.access import Access
from service.rpc.rate_limit import MAX_CLIENTS, RateLimit
from service.tenants import Quota, Quotas
from vllm_batch.v1 import batch_service_pb2, host_service_pb2, recovery_service_pb2, webhook_service_pb2

ROOT = Path(__file__).resolve().parents[2]
SERVICES = (
    batch_service_pb2.DESCRIPTOR.services_by_name["BatchService"],
    recovery_service_pb2.DESCRIPTOR.services_by_name["RecoveryService"],
    host_service_pb2.DESCRIPTOR.services_by_name["HostService"],
    webhook_service_pb2.DESCRIPTOR.services_by_name["WebhookService"],
)


class FakeClock:
    now_s = 0.0

    def monotonic(self) -> float:
        return self.now_s

    def now(self) -> datetime:
        return datetime.fromtimestamp(self.now_s, UTC)


def test_every_method_has_a_role() -> None:
    """Every method of the contract has a required role, and no role names a method that does not exist."""
    methods = {f"/{service.full_name}/{method.name}" for service in SERVICES for method in service.methods}
    limits, clock = Limits(1, 1), FakeClock()
    database, access = Database("postgresql:///none", "test"), Access(None, FakeClock())
    channels = Channels(ChannelOpener(Settings()))
    presence = Presence(database, channels, clock, 60, AsyncMock(), machine.here())
    page = Page(database, Sessions(database, access), presence, channels, limits, clock, 60)
    door = app.made(database, access, Keeping(None, 1, limits), 60, (), page, set(), is_local=True)
    assert len(door.operations) >= 29
    assert methods | door.operations == set(roles.NEEDED)


def test_what_is_not_known_needs_the_highest_role() -> None:
    """A method that is not listed needs the highest role; only real health methods are open, not lookalikes."""
    assert roles.needed("/vllm_batch.v1.BatchService/New") is Role.OPERATE
    assert roles.needed("/grpc.health.v1.HealthX/Check") is Role.OPERATE
    assert not roles.is_open("/grpc.health.v1.HealthX/Check")
    assert roles.is_open("/grpc.health.v1.Health/Watch")


def test_a_token_is_known_by_its_hash() -> None:
    """The hash in the token file identifies the token and does not reveal it."""
    secret, token = tokens.new("alice", Role.SUBMIT)
    assert secret not in token.line()
    [parsed] = tokens.parse(f"# comment\n\n{token.line()}\n")
    assert parsed == token
    assert tokens.identify([parsed], [("x", "y"), ("authorization", f"Bearer {secret}")]) == token
    assert tokens.identify([parsed], [("authorization", f"bearer {secret}")]) == token


def test_a_token_belongs_to_a_tenant() -> None:
    """Its own name unless another is given; several tokens may belong to one; only operators see all."""
    given = (("alice", "submit", ""), ("bob", "read", "lab"), ("carol", "submit", "lab"), ("dave", "operate", ""))
    lines = [tokens.new(name, Role(role), tenant)[1].line() for name, role, tenant in given]
    callers = [token.caller for token in tokens.parse("\n".join(lines))]
    assert [caller.tenant for caller in callers] == ["alice", "lab", "lab", "dave"]
    assert [caller.scope for caller in callers] == ["alice", "lab", "lab", None]
    assert (ANYBODY.tenant, ANYBODY.scope) == ("default", None)


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ([], "TOKEN_MISSING"),
        ([("x-token", "SECRET")], "TOKEN_MISSING"),
        ([("authorization", "Bearer")], "TOKEN_WRONG"),
        ([("authorization", "Basic SECRET")], "TOKEN_WRONG"),
        ([("authorization", "SECRET")], "TOKEN_WRONG"),
        ([("authorization", "Bearer SECRET SECRET")], "TOKEN_WRONG"),
        ([("authorization", "Bearer SECRET"), ("authorization", "Bearer SECRET")], "TOKEN_WRONG"),
        ([("authorization", "Bearer secret")], "TOKEN_WRONG"),
    ],
)
def test_what_is_no_token(metadata: list[tuple[str, str]], reason: str) -> None:
    """Metadata that is not exactly one known bearer token is rejected as UNAUTHENTICATED, with the reason."""
    token = tokens.Token("alice", Role.READ, tokens.digest("SECRET"))
    with pytest.raises(ApiError) as caught:
        tokens.identify([token], metadata)
    assert (caught.value.code, caught.value.reason) == (grpc.StatusCode.UNAUTHENTICATED, reason)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("alice submit hunter2", "line 1"),
        ("\nalice admin " + "0" * 64, "line 2"),
        ("a read " + "0" * 64 + "\na read " + "1" * 64, "line 2: another token has the name a"),
    ],
)
def test_wrong_files_of_tokens(text: str, told: str) -> None:
    """A malformed token file is rejected as a whole, naming the line but never quoting it: it may hold the secret."""
    with pytest.raises(ValueError, match=told) as caught:
        tokens.parse(text)
    assert "hunter2" not in str(caught.value)


def test_new_token(tmp_path: Path) -> None:
    """The command prints a token once, and stores only its hash in a file that only the owner can read."""
    file = tmp_path / "hashes"
    command = [sys.executable, "-m", "service.auth.new_token", str(file)]

    def run(name: str, role: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run([*command, name, role], cwd=ROOT, capture_output=True, text=True, timeout=60)

    alice, bob = run("alice", "submit"), run("bob", "operate")
    assert file.stat().st_mode & 0o777 == 0o600
    known = tokens.parse(file.read_text())
    assert [token.name for token in known] == ["alice", "bob"]
    for made, token in ((alice, known[0]), (bob, known[1])):
        secret = made.stdout.strip()
        assert re.fullmatch(r"vbt_[A-Za-z0-9_-]{43}", secret)
        assert tokens.identify(known, [("authorization", f"Bearer {secret}")]) == token
        assert secret not in file.read_text()
    again = run("alice", "read")
    assert (again.returncode, again.stdout) == (1, "")
    os.chmod(file, 0o644)
    assert "chmod 600" in run("carol", "read").stderr
    assert len(tokens.parse(file.read_text())) == 2


def test_two_new_tokens_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither is lost: commands that run at the same time wait for each other's line."""
    file, parse, begun = tmp_path / "hashes", tokens.parse, threading.Event()
    other = threading.Thread(target=new_token.main, args=([str(file), "bob", "read"],))

    def slowly(text: str) -> tuple[tokens.Token, ...]:
        if not begun.is_set():
            begun.set()
            other.start()
            # Without waiting it would be done by then.
            other.join(1)
        return parse(text)

    monkeypatch.setattr(tokens, "parse", slowly)
    assert new_token.main([str(file), "alice", "submit"]) == 0
    other.join()
    assert [token.name for token in parse(file.read_text())] == ["alice", "bob"]


def test_rate_limit() -> None:
    """Each client may send a burst and then a steady rate, and a retry after the suggested delay succeeds."""
    limit = RateLimit()
    assert [limit.take("a", 10, 0) for _ in range(20)] == [0] * 20
    wait_s = limit.take("a", 10, 0)
    assert wait_s == pytest.approx(0.1)
    assert limit.take("b", 10, 0) == 0
    assert limit.take("a", 10, wait_s - 0.01) > 0
    assert limit.take("a", 10, wait_s) == 0
    assert limit.take("a", 10, wait_s) > 0
    # However long the pause, no more than a burst; and a clock that goes back gives nothing.
    assert [limit.take("a", 10, 1000) for _ in range(21)].count(0) == 20
    assert limit.take("a", 10, 999) > 0


def test_rate_limit_forgets() -> None:
    """The rate limiter remembers a bounded number of clients and forgets the one that has been quiet longest."""
    limit = RateLimit()
    assert [limit.take("mine", 1, 0) for _ in range(3)][-1] > 0
    for number in range(MAX_CLIENTS):
        limit.take(str(number), 1, 0)
        if number % 100 == 0:
            assert limit.take("mine", 1, 0) > 0
    assert len(limit._left) == MAX_CLIENTS


def test_who_is_not_known_yet_is_of_no_tenant() -> None:
    """The calls of all who are signing in do not count as those of one tenant without a quota of its own."""
    access = Access(None, FakeClock(), 9, lambda: Quotas(otherwise=Quota(calls_per_s=0.5)))
    for number in range(9):
        access.count("/page/SignIn", NOBODY, f"ipv4:10.0.0.{number}:1000")
    known = Caller("other", "other", Role.READ)
    access.count("/page/GetSession", known, "ipv4:10.0.0.1:1000")
    with pytest.raises(ApiError, match="of tenant other"):
        access.count("/page/GetSession", known, "ipv4:10.0.0.1:1000")


def test_access_counts_by_token_or_else_by_address() -> None:
    """Calls count per token, or per address regardless of the port; health checks are never counted."""
    access = Access(None, FakeClock(), 0.5)
    method = "/vllm_batch.v1.BatchService/GetBatch"
    assert access.caller(method, []) == ANYBODY
    access.count(method, ANYBODY, "ipv4:10.0.0.1:1000")
    with pytest.raises(ApiError) as caught:
        access.count(method, ANYBODY, "ipv4:10.0.0.1:2000")
    assert caught.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert caught.value.retry_delay_s == pytest.approx(2)
    access.count(method, ANYBODY, "ipv6:%5B::1%5D:2000")
    access.count(method, Caller("alice", "alice", Role.READ), "ipv4:10.0.0.1:2000")
    for _ in range(10):
        access.count("/grpc.health.v1.Health/Check", ANYBODY, "ipv4:10.0.0.1:2000")
