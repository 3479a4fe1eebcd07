"""The client's channels: settings come from arguments or the environment, and tokens are not sent in plain text."""

from concurrent import futures
from pathlib import Path

import grpc
import pytest
from cryptography.hazmat.primitives import serialization

from tests.support.certificates import Authority
from vllm_batch.channel import check_target, open_channel

NAMES = ("TLS_CA", "TLS_CERT", "TLS_KEY", "TLS_SERVER_NAME", "TOKEN", "TOKEN_FILE", "ALLOW_INSECURE")


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(f"BATCH_{name}", raising=False)


@pytest.mark.parametrize("target", ["127.0.0.1:1", "localhost:1", "[::1]:1", "dns:///localhost:1", "unix:/tmp/x"])
def test_tokens_go_to_this_machine_without_tls(target: str) -> None:
    """A token may be sent without TLS to this machine, where nobody can eavesdrop."""
    open_channel(target, token="t").close()


@pytest.mark.parametrize("target", ["10.0.0.1:1", "example.com:1", "dns:///example.com:1", "127.0.0.1.example.com:1"])
def test_tokens_go_to_no_other_machine_without_tls(
    target: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A token goes to another machine only over TLS, unless the user explicitly allows plain text."""
    monkeypatch.setenv("BATCH_TOKEN", "t")
    with pytest.raises(ValueError, match="BATCH_TLS_CA"):
        open_channel(target)
    open_channel(target, tls_ca=str(Authority(tmp_path, "ca").file)).close()
    open_channel(target, token="").close()
    monkeypatch.setenv("BATCH_ALLOW_INSECURE", "true")
    open_channel(target).close()


def test_settings_that_do_not_fit_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An incomplete TLS configuration is an error and never falls back to plain text."""
    certificate, key = map(str, Authority(tmp_path, "ca").issue())
    with pytest.raises(ValueError, match="BATCH_TLS_CERT, BATCH_TLS_KEY"):
        open_channel("127.0.0.1:1", tls_cert=certificate)
    with pytest.raises(ValueError, match="BATCH_TLS_CA"):
        open_channel("127.0.0.1:1", tls_cert=certificate, tls_key=key)
    monkeypatch.setenv("BATCH_TLS_CA", str(tmp_path / "nothing"))
    with pytest.raises(FileNotFoundError):
        open_channel("127.0.0.1:1")
    with pytest.raises(TypeError):
        open_channel("127.0.0.1:1", tsl_ca="typing error")


@pytest.mark.parametrize(
    ("target", "why"),
    [
        ("", "give host:port"),
        ("host", "give host:port"),
        (":50051", "give host:port"),
        ("host:", "'' is no port"),
        ("host:0", "'0' is no port"),
        ("host:65536", "'65536' is no port"),
        ("host:-1", "'-1' is no port"),
        ("host:grpc", "'grpc' is no port"),
        ("host:١", "is no port"),
        ("host :1", "give host:port"),
        ("user@host:1", "give host:port"),
        ("host:1/path", "is no port"),
        ("http://host:1", "without http://"),
        ("grpc://host:1", "without grpc://"),
        ("::1:50051", r"is written \[address\]:port"),
        ("[::1]", r"is written \[address\]:port"),
        ("dns:///host", "give host:port"),
    ],
)
def test_what_is_no_address(target: str, why: str) -> None:
    """A malformed address is rejected at once, instead of after minutes of connection attempts by gRPC."""
    with pytest.raises(ValueError, match=f"is no address: .*{why}"):
        check_target(target)


@pytest.mark.parametrize(
    "target",
    [
        "127.0.0.1:1",
        "host_1.example.com:65535",
        "[fe80::1%eth0]:1",
        "dns:host:1",
        "dns://8.8.8.8/host:1",
        "ipv4:127.0.0.1:1",
        "ipv6:[::1]:1",
        "unix:///run/x",
        "unix-abstract:x",
    ],
)
def test_what_is_an_address(target: str) -> None:
    """Every form of address that gRPC accepts is accepted."""
    check_target(target)
    open_channel(target).close()


@pytest.mark.parametrize("variable", ["http_proxy", "https_proxy", "grpc_proxy"])
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]"])
def test_loopback_is_called_without_a_proxy(variable: str, host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """gRPC itself cannot reach this machine through a dead proxy; our channels bypass it on loopback."""
    for name in ("no_proxy", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, "http://127.0.0.1:9")
    server = grpc.server(futures.ThreadPoolExecutor(1))
    try:
        port = server.add_insecure_port(f"{host}:0")
    except RuntimeError:
        pytest.skip("no IPv6 here")
    server.start()
    try:
        with grpc.insecure_channel(f"{host}:{port}") as plain, pytest.raises(grpc.FutureTimeoutError):
            grpc.channel_ready_future(plain).result(timeout=1)
        with open_channel(f"{host}:{port}") as ours:
            grpc.channel_ready_future(ours).result(timeout=20)
    finally:
        server.stop(None)


@pytest.mark.parametrize("around", ["%s", " %s", "%s\n", "%s\r\n"])
def test_blanks_around_a_token_are_left_out(around: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line break behind a token, as secrets of other systems have, is no part of it, wherever the token is from."""
    monkeypatch.setenv("BATCH_TOKEN", around % "t")
    open_channel("127.0.0.1:1").close()
    open_channel("127.0.0.1:1", token=around % "t").close()


@pytest.mark.parametrize("token", ["a\nb", "é", "a\tb", "a\0b", "“t”"])
def test_what_is_no_token(token: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token that no header can have is refused at once and not shown, instead of failing in each call."""
    with pytest.raises(ValueError, match="printable ASCII") as raised:
        open_channel("127.0.0.1:1", token=token)
    assert token not in str(raised.value)
    (tmp_path / "token").write_text(token)
    monkeypatch.setenv("BATCH_TOKEN_FILE", str(tmp_path / "token"))
    with pytest.raises(ValueError, match="printable ASCII"):
        open_channel("127.0.0.1:1")


def test_files_that_are_no_certificates(tmp_path: Path) -> None:
    """Files that gRPC cannot use for TLS are refused by name at once, instead of a connection that never comes."""
    ours, other = Authority(tmp_path, "ca"), Authority(tmp_path, "other")
    ca, (certificate, key) = str(ours.file), map(str, ours.issue())
    foreign_key = str(other.issue("other")[1])
    text, encrypted = tmp_path / "text", tmp_path / "encrypted"
    text.write_text("no certificate")
    loaded = serialization.load_pem_private_key(Path(key).read_bytes(), None)
    form, kind = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    encrypted.write_bytes(loaded.private_bytes(form, kind, serialization.BestAvailableEncryption(b"secret")))
    open_channel("127.0.0.1:1", tls_ca=ca, tls_cert=certificate, tls_key=key).close()
    for files, why in (
        ((str(text), certificate, key), "BATCH_TLS_CA: .*text has no certificate"),
        ((key, certificate, key), "BATCH_TLS_CA: "),
        ((ca, str(text), key), "BATCH_TLS_CERT, BATCH_TLS_KEY: "),
        ((ca, certificate, str(text)), "BATCH_TLS_CERT, BATCH_TLS_KEY: "),
        ((ca, key, certificate), "BATCH_TLS_CERT, BATCH_TLS_KEY: "),
        ((ca, certificate, foreign_key), "BATCH_TLS_CERT, BATCH_TLS_KEY: "),
        ((ca, certificate, str(encrypted)), "is encrypted"),
    ):
        with pytest.raises(ValueError, match=why):
            open_channel("127.0.0.1:1", **dict(zip(("tls_ca", "tls_cert", "tls_key"), files, strict=True)))
