"""Tokens, roles and the rate limit, decided without a socket or a clock."""

import os
import re
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import grpc
import pytest

from service import roles, tokens
from service.access import Access
from service.errors import ApiError
from service.rate_limit import MAX_CLIENTS, RateLimit
from service.roles import Role
from vllm_batch.v1 import batch_service_pb2, recovery_service_pb2

ROOT = Path(__file__).resolve().parents[2]
SERVICES = (
    batch_service_pb2.DESCRIPTOR.services_by_name["BatchService"],
    recovery_service_pb2.DESCRIPTOR.services_by_name["RecoveryService"],
)


class FakeClock:
    now_s = 0.0

    def monotonic(self) -> float:
        return self.now_s

    def now(self) -> datetime:
        return datetime.fromtimestamp(self.now_s, UTC)


def test_every_method_has_a_role() -> None:
    """Who adds a method to the contract says who may call it; what is said is of methods that there are."""
    methods = {f"/{service.full_name}/{method.name}" for service in SERVICES for method in service.methods}
    assert methods == set(roles.NEEDED)


def test_what_is_not_known_needs_the_highest_role() -> None:
    """A method that nobody has thought of is closed, as is one that only looks like health."""
    assert roles.needed("/vllm_batch.v1.BatchService/New") is Role.OPERATE
    assert roles.needed("/grpc.health.v1.HealthX/Check") is Role.OPERATE
    assert not roles.is_open("/grpc.health.v1.HealthX/Check")
    assert roles.is_open("/grpc.health.v1.Health/Watch")


def test_a_token_is_known_by_its_hash() -> None:
    """What the file holds identifies the token and does not contain it."""
    secret, token = tokens.new("alice", Role.SUBMIT)
    assert secret not in token.line()
    [parsed] = tokens.parse(f"# comment\n\n{token.line()}\n")
    assert parsed == token
    assert tokens.identify([parsed], [("x", "y"), ("authorization", f"Bearer {secret}")]) == token
    assert tokens.identify([parsed], [("authorization", f"bearer {secret}")]) == token


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
    """Anything but one known token, shown as it should be, is refused."""
    token = tokens.Token("alice", Role.READ, tokens.digest("SECRET"))
    with pytest.raises(ApiError) as caught:
        tokens.identify([token], metadata)
    assert (caught.value.code, caught.value.reason) == (grpc.StatusCode.UNAUTHENTICATED, reason)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("alice submit hunter2", "line 1"),
        ("\nalice admin " + "0" * 64, "line 2"),
        ("a read " + "0" * 64 + "\na read " + "1" * 64, "line 2: there is another token called a"),
    ],
)
def test_wrong_files_of_tokens(text: str, told: str) -> None:
    """A file that is wrong is refused whole; what was typed into it is not repeated: it may be the secret."""
    with pytest.raises(ValueError, match=told) as caught:
        tokens.parse(text)
    assert "hunter2" not in str(caught.value)


def test_new_token(tmp_path: Path) -> None:
    """The command prints a token once and keeps its hash, in a file for its owner alone."""
    file = tmp_path / "hashes"
    command = [sys.executable, "-m", "service.new_token", str(file)]

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


def test_rate_limit() -> None:
    """A burst is let through, then so many a second; each client has its own, and waiting as told is enough."""
    limit = RateLimit(10)
    assert [limit.take("a", 0) for _ in range(20)] == [0] * 20
    wait_s = limit.take("a", 0)
    assert wait_s == pytest.approx(0.1)
    assert limit.take("b", 0) == 0
    assert limit.take("a", wait_s - 0.01) > 0
    assert limit.take("a", wait_s) == 0
    assert limit.take("a", wait_s) > 0
    # However long the pause, no more than a burst; and a clock that goes back gives nothing.
    assert [limit.take("a", 1000) for _ in range(21)].count(0) == 20
    assert limit.take("a", 999) > 0


def test_rate_limit_forgets() -> None:
    """Addresses without number cost no memory without number; who has called lately is remembered."""
    limit = RateLimit(1)
    assert [limit.take("mine", 0) for _ in range(3)][-1] > 0
    for number in range(MAX_CLIENTS):
        limit.take(str(number), 0)
        if number % 100 == 0:
            assert limit.take("mine", 0) > 0
    assert len(limit._left) == MAX_CLIENTS


def test_access_counts_by_token_or_else_by_address() -> None:
    """The port that a client calls from makes no other client of it; health is never counted."""
    access = Access(None, RateLimit(0.5), FakeClock())
    method = "/vllm_batch.v1.BatchService/GetBatch"
    assert access.caller(method, []) == ""
    access.count(method, "", "ipv4:10.0.0.1:1000")
    with pytest.raises(ApiError) as caught:
        access.count(method, "", "ipv4:10.0.0.1:2000")
    assert caught.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert caught.value.retry_delay_s == pytest.approx(2)
    access.count(method, "", "ipv6:%5B::1%5D:2000")
    access.count(method, "alice", "ipv4:10.0.0.1:2000")
    for _ in range(10):
        access.count("/grpc.health.v1.Health/Check", "", "ipv4:10.0.0.1:2000")
