"""The file of tenants, and what follows of it without Postgres."""

import os
import textwrap
from pathlib import Path

import grpc
import pytest

from service import config, tenants
from service.api import messages
from service.auth import key_files, tokens
from service.auth.callers import Caller
from service.auth.roles import Role
from service.config import Settings
from service.db.usage import Usage
from service.errors import ApiError
from service.gateway.metrics import TENANTS, _Used
from service.rpc.access import Access
from service.tenants import Quota, Quotas
from tests.unit.test_access import FakeClock

METHOD = "/vllm_batch.v1.BatchService/GetBatch"


def test_own_values_come_before_those_for_all() -> None:
    """Each key applies to every tenant that has none of its own; `inf` frees one of a limit."""
    common = "open_batches = 10\ncalls_per_s = 5\n"
    own = '[tenants.a]\nweight = 3\nopen_batches = inf\n[tenants."b.c"]\nweight = 0.5\n'
    quotas = tenants.parse(common + own)
    assert quotas.of("a") == Quota(weight=3, calls_per_s=5)
    assert quotas.of("b.c") == Quota(weight=0.5, open_batches=10, calls_per_s=5)
    assert quotas.of("other") == Quota(open_batches=10, calls_per_s=5)
    assert Quotas().of("a") == Quota()


def test_example_of_the_page() -> None:
    """The file that docs/queue.md shows is one, and means what the page says of it."""
    text = (config.ROOT / "docs/queue.md").read_text()
    block = text.partition("a file in TOML, such as\n")[2].partition("\n| key |")[0]
    quotas = tenants.parse(textwrap.dedent(block))
    assert quotas.of("alice").queued_requests == 10_000_000
    assert (quotas.of("alice").open_batches, quotas.of("nightly").open_batches) == (200, None)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("weight = 0", "weight: "),
        ("weight = nan", "weight: "),
        ("open_batches = true", "open_batches: "),
        ("[tenants.a]\nqueued_requests = 0", "tenants.a.queued_requests: "),
        ("[tenants.a]\nqueued_tokens = 1.5", "tenants.a.queued_tokens: "),
        ("[tenants.a]\nqueued = 5", "tenants.a.queued: there is no such key, only weight, open_batches"),
        ("[tenants.'a b']", "tenants.a b: a name has"),
        ("calls_per_s = '5'", "calls_per_s: "),
        ("weight 3", "line 1"),
    ],
)
def test_wrong_files_name_the_key(text: str, told: str, tmp_path: Path) -> None:
    """Whoever makes a mistake in the file is told where, at the start and in the log."""
    file = tmp_path / "tenants.toml"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"tenants\.toml: ") as caught:
        key_files.read_quotas(file)
    assert told in str(caught.value)
    [line] = config.wrong_files(Settings(tenants_file=file))
    assert line.startswith("BATCH_TENANTS_FILE: ")


def test_file_is_read_again(tmp_path: Path) -> None:
    """A change applies at once; one that is wrong, or a file that is gone, changes nothing."""
    file = tmp_path / "tenants.toml"
    file.write_text("weight = 2")
    quotas = key_files.quotas(file)
    for text, weight in (("weight = 3", 3), ("weight = -1", 3), ("weight = 4", 4)):
        file.write_text(text)
        os.utime(file, ns=(0, weight * len(text)))
        assert quotas().of("a").weight == weight
    file.unlink()
    assert quotas().of("a").weight == 4
    assert key_files.quotas(None)() == Quotas()


def test_calls_of_a_tenant_count_together() -> None:
    """All callers of a tenant share its rate, whatever their own; other tenants have theirs."""
    quotas = Quotas(named={"a": Quota(calls_per_s=1)})
    access = Access(None, FakeClock(), 1000, lambda: quotas)
    one, two, other = (Caller(name, tenant, Role.READ) for name, tenant in (("x", "a"), ("y", "a"), ("z", "b")))
    access.count(METHOD, one, "ipv4:10.0.0.1:1")
    access.count(METHOD, two, "ipv4:10.0.0.2:1")
    with pytest.raises(ApiError) as caught:
        access.count(METHOD, one, "ipv4:10.0.0.1:1")
    error = caught.value
    assert (error.code, error.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "RATE_LIMITED")
    assert error.message == "too many calls of tenant a: at most 1 a second are allowed, 0 left"
    assert error.metadata == {"tenant": "a", "name": "calls_per_s", "limit": "1", "left": "0"}
    assert error.retry_delay_s == pytest.approx(1)
    for _ in range(100):
        access.count(METHOD, other, "ipv4:10.0.0.1:1")


def test_certificates_in_the_file() -> None:
    """A certificate's name stands for a token; only a gateway's may name the caller whose call it forwards."""
    text = f"ci submit certificate lab\ngate gateway certificate\nalice read {'0' * 64}\n"
    known = tokens.parse(text)
    assert "".join(f"{token.line()}\n" for token in known) == text
    assert tokens.identify(known, []) is None

    def caller(identities: list[bytes], *named: str) -> Caller:
        metadata = [(tokens.CALLER_HEADER, name) for name in named]
        return tokens.identify_certificate(known, identities, metadata).caller

    ci = Caller("ci", "lab", Role.SUBMIT)
    assert caller([b"x", b"ci"]) == caller([b"ci"], "alice") == caller([b"gate"], "ci") == ci
    for identities, named in (
        ([b"alice"], ()),
        ([b"gate"], ()),
        ([b"gate"], ("alice",)),
        ([b"gate"], ("gate",)),
        ([b"gate"], ("ci", "ci")),
        ([b"x"], ("ci",)),
        ([b"\xff"], ()),
        ([], ("ci",)),
    ):
        with pytest.raises(ApiError) as caught:
            caller(identities, *named)
        assert (caught.value.code, caught.value.reason) == (grpc.StatusCode.UNAUTHENTICATED, "TOKEN_MISSING")


def test_share() -> None:
    """A tenant's share is its weight among those that have work, and what it would be if it had none."""
    quotas = Quotas(named={"a": Quota(weight=3), "b": Quota(weight=1)})
    shares = [messages.tenant_message(Usage(name), {"a", "c"}, quotas).share for name in ("a", "b", "c")]
    assert shares == [0.75, 0.2, 0.25]


def samples(used: _Used) -> dict[str, float]:
    return {each.labels["tenant"]: each.value for each in used.metric().samples if each.labels["kind"] == "prompt"}


def test_labels_are_bounded() -> None:
    """However many tenants there are, those that use most have a label and the rest shares one that never falls."""
    used = _Used()
    found = [Usage(f"t{number:03}", prompt_tokens=number) for number in range(100)]
    used.take(found)
    shown = samples(used)
    assert len(shown) == TENANTS + 1
    assert shown["t099"] == 99
    assert shown["(other)"] == sum(range(100 - TENANTS))
    used.take([*found[1:], Usage("t000", prompt_tokens=10_000)])
    assert samples(used)["t000"] == 10_000
    assert samples(used)["(other)"] >= shown["(other)"]
