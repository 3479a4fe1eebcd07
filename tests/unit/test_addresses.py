"""Host addresses: IPv4, IPv6 and names; anything else is rejected with a reason."""

import ipaddress
import re
from concurrent import futures

import grpc
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from pydantic import ValidationError

from service import addresses, config
from service.config import Settings
from vllm_batch.channel import check_target

ADDRESSES = st.ip_addresses().map(str)
# What hosts are made of, in any order.
PIECES = st.sampled_from(
    [*"[]:./%@- \n0", "::", "::1", "fe80::1", "127.0.0.1", "%25", "eth0", "a", "é", "\0", "://", "dns", "0x7f", "443"]
)


@given(ADDRESSES, st.integers(1, 65_535))
def test_any_address_can_be_joined_with_a_port(host: str, port: int) -> None:
    """Every IP address is valid with and without brackets, and joining it with a port can be undone."""
    assert addresses.problem(host) == ""
    joined = addresses.joined(host, port)
    assert joined == addresses.joined(addresses.bare(joined.rpartition(":")[0]), port)
    assert ipaddress.ip_address(addresses.bare(joined.rpartition(":")[0])) == ipaddress.ip_address(host)
    assert joined.rpartition(":")[2] == str(port)
    # Only in brackets is it told from its port.
    check_target(joined)
    if ":" in host:
        assert addresses.problem(f"[{host}]") == ""


@given(ADDRESSES, st.integers(1, 65_535))
def test_an_address_with_a_port_is_none(host: str, port: int) -> None:
    """An address that includes a port is rejected, because ports have settings of their own."""
    for wrong in (f"[{host}]:{port}",) if ":" in host else (f"{host}:{port}",):
        assert "has a port" in addresses.problem(wrong)
        assert "URL" in addresses.problem(f"http://{wrong}/")


@given(st.lists(st.from_regex(r"[a-z0-9_]([a-z0-9_-]{0,20}[a-z0-9_])?", fullmatch=True), min_size=1, max_size=5))
def test_any_name_is_right(labels: list[str]) -> None:
    """Any name that DNS or containers allow is accepted, unless it ends in a number and so looks like IPv4."""
    host = ".".join(labels)
    assume(host not in ("dns", "unix", "unix-abstract", "vsock", "ipv4", "ipv6", "xds", "google-c2p"))
    is_number = labels[-1].isdigit() or re.fullmatch("0x[0-9a-f]*", labels[-1]) is not None
    assert bool(addresses.problem(host)) == (is_number and addresses.parsed(host) is None)
    if not is_number:
        check_target(addresses.joined(host, 1))


@example("dns")
@example("::%]")
@example("fe80::1%eth 0")
@example("fe80::1%eth0\n")
@given(st.text(max_size=40) | st.lists(PIECES, max_size=6).map("".join))
def test_any_text_is_a_host_or_told_why_not(text: str) -> None:
    """Any accepted text works as a client's target; any other is refused in a sentence that shows it."""
    if problem := addresses.problem(text):
        assert repr(text) in problem
        return
    check_target(addresses.joined(text, 65_535))


@pytest.mark.parametrize(
    "host", ["localhost", "gpu-1", "gpu_1.example.com", "a.b.", "::ffff:127.0.0.1", "fe80::1%eth0"]
)
def test_what_is_right(host: str) -> None:
    """Host names, IPv4-mapped addresses and IPv6 zones are accepted."""
    assert addresses.problem(host) == ""


@pytest.mark.parametrize(
    ("host", "told"),
    [
        ("256.1.1.1", "not an IPv4 address"),
        ("127.1", "not an IPv4 address"),
        ("0", "not an IPv4 address"),
        ("0x7f000001", "not an IPv4 address"),
        ("dns", "a scheme of gRPC"),
        ("Unix", "a scheme of gRPC"),
        ("1.2.3.4.5", "not an IPv4 address"),
        ("[127.0.0.1]", "not an IPv6 address"),
        ("::1]", "not an IPv6 address"),
        ("[::1", "not an IPv6 address"),
        ("1:2:3", "not an IPv6 address"),
        ("::g", "not an IPv6 address"),
        ("localhost:50051", "has a port"),
        ("[::1]:50051", "has a port"),
        ("dns:///localhost", "is a URL"),
        ("-a", "neither"),
        ("a b", "neither"),
        ("*", "neither"),
        ("a..b", "neither"),
        (" ", "neither"),
        ("x" * 64, "neither"),
        ("127.0.0.1,::1", "not an IPv6 address"),
        ("fe80::1%eth0/64", "not an IPv6 address"),
        ("fe80::1%", "not an IPv6 address"),
        ("fe80::1%eth 0", "has a zone"),
        ("[fe80::1%eth0\n]", "has a zone"),
        ("localhost,gpu-1", "neither"),
    ],
)
def test_what_is_wrong(host: str, told: str) -> None:
    """Both host settings reject anything that is not a host, and say why."""
    assert told in addresses.problem(host)
    for name in ("host", "metrics_host"):
        with pytest.raises(ValidationError, match=told):
            Settings(**{name: host})


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "::1", "[::1]", "::", "localhost"])
def test_this_machine_can_listen(host: str) -> None:
    """On its own addresses gRPC can listen, and a client that calls `own_address` or `advertised_address` connects."""
    if problem := addresses.cannot_listen(host):
        assert ":" in host, problem
        pytest.skip(problem)
    settings = Settings(host=host, allow_insecure=True)
    server = grpc.server(futures.ThreadPoolExecutor(1))
    port = server.add_insecure_port(addresses.joined(host, 0))
    server.start()
    try:
        for address in (settings.own_address(port), settings.advertised_address(port)):
            with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
                grpc.channel_ready_future(channel).result(timeout=20)
    finally:
        server.stop(None)


@pytest.mark.parametrize("host", ["192.0.2.7", "2001:db8::7", "no-such-host.invalid"])
def test_this_machine_cannot_listen(host: str) -> None:
    """An address of another machine or a name that does not resolve cannot be listened on."""
    assert host in addresses.cannot_listen(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "[::]", "0:0:0:0:0:0:0:0"])
def test_every_address_is_no_address_to_call(host: str) -> None:
    """A wildcard address is advertised by the host's name, and the host's own processes call it on loopback."""
    settings = Settings(host=host, allow_insecure=True)
    assert addresses.is_any(host)
    assert settings.own_address(1) in ("127.0.0.1:1", "[::1]:1")
    assert not addresses.is_any(settings.advertised_host)


def test_only_a_check_asks_the_resolver(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Only `--check` rejects a host that does not resolve, so that a worker can restart during a DNS outage."""
    monkeypatch.setenv("BATCH_HOST", "no-such-host.invalid")
    monkeypatch.setenv("BATCH_ALLOW_INSECURE", "true")
    assert config.load().host == "no-such-host.invalid"
    with pytest.raises(SystemExit) as caught:
        config.load(is_check=True)
    assert caught.value.code == 2
    assert "BATCH_HOST: no-such-host.invalid cannot be resolved" in capsys.readouterr().err
