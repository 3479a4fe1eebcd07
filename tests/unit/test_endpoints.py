"""Where alerts and spans go, and certificates: what would fail only when it is used is refused before anything runs."""

import re
import sys
from pathlib import Path
from subprocess import run

import pytest
import sentry_sdk
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

from service import config, endpoints
from service.config import ROOT, Settings
from tests.support.certificates import Authority

PIECES = st.sampled_from(
    ["https", "http", "ftp", "://", ":", "key", "@", "sentry.io", "[::1", "[::1]", "/", "1", "x", " ", ""]
)


@given(st.lists(PIECES, max_size=9).map("".join))
def test_what_sentry_takes(dsn: str) -> None:
    """Exactly what its client takes passes, and no complaint has the DSN in it."""
    refusal = ""
    try:
        endpoints.check_sentry(dsn)
    except ValueError as error:
        refusal = str(error)
    try:
        taken = sentry_sdk.utils.Dsn(dsn).host
    except ValueError:
        taken = ""
    assert bool(refusal) is not bool(taken)
    assert "key" not in refusal


COLLECTORS = st.sampled_from(
    [
        *("http://", "https://", "grpc://", "dns:///", "unix:", "ftp://", "//", "h", "h.example", "127.0.0.1", "[::1]"),
        *("::1", ":", ":4317", ":0", ":99999", "/", "/v1", "?a", "#a", "@", "[", "]", "%", "é", " ", "\n"),
    ]
)


@given(st.lists(COLLECTORS, max_size=6).map("".join))
def test_any_collector(endpoint: str) -> None:
    """Any text is refused with a reason, or taken by OpenTelemetry's exporter."""
    refusal = ""
    try:
        endpoints.check_collector(endpoint)
    except ValueError as error:
        refusal = str(error)
    if refusal:
        assert re.match(r"is not an address|begins with|a user or password", refusal)
        return
    exporter = OTLPSpanExporter(endpoint=endpoint)
    exporter.shutdown()
    assert not re.search(r"\s", endpoint)
    assert re.search(r"[^/:]", exporter._endpoint)


@pytest.mark.parametrize(
    "endpoint",
    [
        "http://",
        "http://h:99999",
        "h:x",
        "http://[::1",
        "foo://h:1",
        "http:// h:1",
        "",
        ":4317",
        "http://u:p@h:1",
        "h:0",
        "dns:///",
        "dns:/// h:1",
        "unix://[",
        "h:4317/",
        "h?a",
        "unix:",
    ],
)
def test_what_is_no_collector(endpoint: str) -> None:
    """An address to which no span would ever go is refused."""
    with pytest.raises(ValueError, match=r"is not an address|begins with|a user or password"):
        endpoints.check_collector(endpoint)


@pytest.mark.parametrize(
    "endpoint",
    [
        "http://127.0.0.1:4317",
        "https://h:4317",
        "h:4317",
        "h",
        "grpc://h:1",
        "http://[::1]:4317",
        "dns:///h:1",
        "unix:/a/b",
        "unix-1:4317",
        "dns-1.example:4317",
    ],
)
def test_collectors(endpoint: str) -> None:
    """What OpenTelemetry's exporter takes and may reach passes."""
    endpoints.check_collector(endpoint)
    OTLPSpanExporter(endpoint=endpoint).shutdown()


@pytest.mark.parametrize("process", ["service.gateway", "service.http", "service.worker", "watchdog"])
def test_wrong_dsn_is_refused_by_every_process(process: str) -> None:
    """`--check` names SENTRY_DSN and not its value, before the watchdog is the first to stumble over it."""
    env = {"PATH": "", "BATCH_ENV_FILE": "/dev/null", "SENTRY_DSN": "https://hunter2@sentry.io/"}
    done = run(
        [sys.executable, "-m", process, "--check"], env=env, cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert "SENTRY_DSN: " in done.stderr
    assert "hunter2" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("retention_s", "inf"),
        ("retention_s", "1e12"),
        ("database_timeout_s", "0.0004"),
        ("max_queued_requests", str(1 << 63)),
        ("max_open_batches", str(1 << 63)),
        ("max_batch_bytes", str(1 << 70)),
    ],
)
def test_numbers_that_postgres_cannot_have(name: str, value: str) -> None:
    """What would be an error of a statement later, or no timeout at all, is refused."""
    with pytest.raises(ValueError, match=name):
        Settings.model_validate({name: value})


@pytest.mark.parametrize("text", ["", "\n", "two words", "name submit 0", "tök", "a\x00b"])
def test_file_without_a_token(text: str, tmp_path: Path) -> None:
    """A file that has no token, or more than that, is named without what is in it."""
    file = tmp_path / "token"
    file.touch(0o600)
    file.write_text(text)
    [wrong] = config.wrong_files(Settings(token_file=file))
    assert wrong.startswith(f"BATCH_TOKEN_FILE: {file} must contain a token")


def test_certificates_that_are_not_accepted(tmp_path: Path) -> None:
    """An expired certificate, another name and another authority, of server or client, are told before a start."""
    ours, other = Authority(tmp_path, "ours"), Authority(tmp_path, "other")
    server, client = ours.issue(), ours.issue()

    def wrong(**changed: object) -> str:
        given = {
            "server_cert": server[0],
            "server_key": server[1],
            "tls_ca": ours.file,
            "client_ca": ours.file,
            "tls_cert": client[0],
            "tls_key": client[1],
        }
        return "".join(config.wrong_certificates(Settings.model_validate(given | changed)))

    def pair(prefix: str, files: tuple[Path, Path]) -> dict[str, object]:
        return {f"{prefix}_cert": files[0], f"{prefix}_key": files[1]}

    assert wrong() == ""
    assert wrong(client_ca=None, tls_cert=None, tls_key=None) == ""
    assert "the server's certificate is refused: certificate has expired" in wrong(
        **pair("server", ours.issue(is_expired=True))
    )
    assert "the client's certificate is refused: certificate has expired" in wrong(
        **pair("tls", ours.issue(is_expired=True))
    )
    assert "the server's certificate is refused" in wrong(tls_ca=other.file)
    assert "the client's certificate is refused" in wrong(client_ca=other.file)
    assert "not valid for 'gpu-box'" in wrong(tls_server_name="gpu-box")
    assert "not valid for '127.0.0.2'" in wrong(host="127.0.0.2")
    # By which name it is called there depends on who calls.
    assert wrong(host="0.0.0.0", allow_insecure=True) == ""
