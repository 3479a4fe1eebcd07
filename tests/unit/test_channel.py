"""Channels of the client: settings from arguments or the environment, tokens kept from strangers."""

from pathlib import Path

import pytest

from tests.certificates import Authority
from vllm_batch.channel import open_channel

NAMES = ("TLS_CA", "TLS_CERT", "TLS_KEY", "TLS_SERVER_NAME", "TOKEN", "TOKEN_FILE", "ALLOW_INSECURE")


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(f"BATCH_{name}", raising=False)


@pytest.mark.parametrize("target", ["127.0.0.1:1", "localhost:1", "[::1]:1", "dns:///localhost:1", "unix:/tmp/x"])
def test_tokens_go_to_this_machine_without_tls(target: str) -> None:
    """On loopback nobody listens in who may not."""
    open_channel(target, token="t").close()


@pytest.mark.parametrize("target", ["10.0.0.1:1", "example.com:1", "dns:///example.com:1", "127.0.0.1.example.com:1"])
def test_tokens_go_to_no_other_machine_without_tls(
    target: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A token on the wire in plain text is a token given away; who wants that says so."""
    monkeypatch.setenv("BATCH_TOKEN", "t")
    with pytest.raises(ValueError, match="BATCH_TLS_CA"):
        open_channel(target)
    open_channel(target, tls_ca=str(Authority(tmp_path, "ca").file)).close()
    open_channel(target, token="").close()
    monkeypatch.setenv("BATCH_ALLOW_INSECURE", "true")
    open_channel(target).close()


def test_settings_that_do_not_fit_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of what TLS needs is an error, not a connection without it."""
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
