"""Settings: defaults match the documentation, all errors are reported at once, secrets are never shown."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from psycopg2.extensions import parse_dsn

from service import addresses, config
from service.config import Settings
from tests.support.certificates import Authority
from vllm_batch.channel import check_target

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("BATCH_") or name in ("DATABASE_URL", "SENTRY_DSN"):
            monkeypatch.delenv(name)
    monkeypatch.setitem(Settings.model_config, "env_file", None)


def test_defaults() -> None:
    """Without any settings, everything listens on loopback, lives under var/ and has the documented intervals."""
    settings = Settings()
    assert (settings.host, settings.home) == ("127.0.0.1", ROOT / "var")
    assert (settings.gateway_port, settings.worker_port, settings.watchdog_port) == (50051, 50052, 50053)
    assert settings.http_port == 50054
    assert (settings.heartbeat_interval_s, settings.heartbeat_timeout_s) == (5, 60)
    assert (settings.check_interval_s, settings.max_restarts_per_hour) == (30, 10)
    assert settings.engine == "vllm"
    assert settings.postgres_url == f"postgresql:///batch?host={ROOT}/var/run/pg&user=postgres"


def test_all_wrong_settings_are_reported_together(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three mistakes in the settings are reported together."""
    monkeypatch.setenv("BATCH_GATEWAY_PORT", "99999")
    monkeypatch.setenv("BATCH_ENGINE", "gpt")
    monkeypatch.setenv("BATCH_HEARTBEET_TIMEOUT_S", "3")
    with pytest.raises(SystemExit) as caught:
        config.load()
    assert caught.value.code == 2
    told = capsys.readouterr().err
    assert all(name in told for name in ("BATCH_GATEWAY_PORT", "BATCH_ENGINE", "BATCH_HEARTBEET_TIMEOUT_S"))


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"BATCH_HEARTBEAT_TIMEOUT_S": "8"}, "BATCH_HEARTBEAT_TIMEOUT_S must be at least twice"),
        ({"BATCH_LEASE_S": "8"}, "BATCH_LEASE_S must be at least twice"),
        ({"BATCH_LEASE_S": "120", "BATCH_HOST_FORGOTTEN_S": "100"}, "BATCH_HOST_FORGOTTEN_S must be at least"),
        (
            {"BATCH_HEARTBEAT_TIMEOUT_S": "90", "BATCH_HOST_FORGOTTEN_S": "80"},
            "BATCH_HOST_FORGOTTEN_S must be at least",
        ),
        ({"BATCH_WORKER_PORT": "50051"}, "must differ"),
        ({"BATCH_ENGINE_ARGS": "'open"}, "BATCH_ENGINE_ARGS cannot be split"),
        ({"BATCH_HOME": "/" + "x" * 100}, "BATCH_HOME is too long"),
        ({"BATCH_HOST": "0.0.0.0"}, "BATCH_ALLOW_INSECURE=true"),
        ({"BATCH_HOST": "10.1.2.3"}, "can be reached from other machines"),
        ({"BATCH_HOST": "::"}, "can be reached from other machines"),
        ({"BATCH_HOST": "localhost.example.com"}, "can be reached from other machines"),
        ({"BATCH_HOST": "0.0.0.0", "BATCH_TOKEN_HASHES": "/dev/null"}, "set BATCH_SERVER_CERT and BATCH_TOKEN_HASHES"),
        (
            {"BATCH_HOST": "0.0.0.0", "BATCH_SERVER_CERT": "c", "BATCH_SERVER_KEY": "k", "BATCH_TLS_CA": "a"},
            "set BATCH_SERVER_CERT and BATCH_TOKEN_HASHES",
        ),
        ({"BATCH_SERVER_CERT": "/c"}, "BATCH_SERVER_CERT and BATCH_SERVER_KEY go together"),
        ({"BATCH_TLS_KEY": "/c"}, "BATCH_TLS_CERT and BATCH_TLS_KEY go together"),
        ({"BATCH_CLIENT_CA": "/c"}, "BATCH_CLIENT_CA needs BATCH_SERVER_CERT"),
        ({"BATCH_SERVER_CERT": "/c", "BATCH_SERVER_KEY": "/k"}, "BATCH_TLS_CA is needed"),
        ({"BATCH_TLS_CA": "/nothing/here"}, "BATCH_TLS_CA: [Errno 2]"),
        ({"BATCH_TLS_CA": "/dev/null"}, "BATCH_TLS_CA: /dev/null contains no PEM certificate"),
    ],
)
def test_settings_that_do_not_fit_together(
    given: dict[str, str], told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A value that is valid alone but conflicts with another, or names an unusable file, is rejected with a remedy."""
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit):
        config.load()
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.0.1", "::1", "[::1]", "localhost"])
def test_loopback_needs_no_security(host: str) -> None:
    """On loopback no security settings are required."""
    assert Settings(host=host).host == host


@pytest.mark.parametrize(
    ("home", "told"),
    [
        ("/" + "x" * 79, "80 bytes, and at most 79 can be"),
        ("/" + "é" * 40, "81 bytes, and at most 79 can be"),
        ("/a,b", "comma"),
        ("/a\nb", "control characters"),
        ("/a\x1b[31m", "control characters"),
        ("/a\udcff", "not UTF-8"),
    ],
)
def test_home_that_cannot_be(home: str, told: str) -> None:
    """A BATCH_HOME that sockets or Postgres clients cannot use is rejected, with its length limit in bytes."""
    with pytest.raises(ValueError, match=told):
        Settings(home=home)


@given(st.text(max_size=60) | st.text("a/%&'\"; ?#é,.", max_size=79) | st.binary(max_size=60).map(os.fsdecode))
def test_any_home(name: str) -> None:
    """For any path, Postgres' URL and all socket addresses lead to that folder, or it is refused with a reason."""
    told = ""
    try:
        settings = Settings(home=f"/{name}")
    except ValueError as error:
        told = str(error)
    if told:
        reasons = {
            "control characters": not name.isprintable(),
            "too long for a Unix socket": len(os.fsencode(os.path.abspath(f"/{name}"))) > 79,
            "has a comma": "," in name,
            "null": "\0" in name,
        }
        assert any(reason in told for reason, holds in reasons.items() if holds)
        return
    home = os.path.abspath(f"/{name}").lstrip("/")
    assert settings.home == Path(f"/{home}")
    run = f"/{home}/run".replace("//", "/")
    assert parse_dsn(settings.postgres_url)["host"] == f"{run}/pg"
    assert unquote(settings.probe_address("worker")) == f"unix:{run}/worker.sock"
    assert settings.supervisor_url == f"unix://{run}/supervisor.sock"


FIELDS = sorted(config.variable(name) for name in Settings.model_fields)
SECRETS = {"DATABASE_URL", "BATCH_GATEWAY_DATABASE_URL", "SENTRY_DSN"}
# No variable has NUL; other bytes that are no UTF-8 come as halves of characters.
VALUES = st.one_of(
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20),
    st.binary(max_size=10).map(lambda value: os.fsdecode(value.replace(b"\0", b""))),
    st.integers().map(str),
    st.floats().map(str),
    st.sampled_from(
        [
            *("true", "off", "None", "null", "1_000", " 5 ", "0x10", "\u0663", "9" * 5000, "1e400", "nan", "-0", "5s"),
            *(
                "/",
                "//",
                ".",
                "~",
                "a/../..",
                "/dev/null",
                "/nothing",
                "x" * 5000,
                "'",
                '"',
                "\n",
                "a,b",
                ",",
                "worker",
            ),
            *("0.0.0.0", "::", "[::1]", "fe80::1%", "simulated", "DEBUG", "10.0.0.0/8", "postgresql://u:hunter2@h/d"),
            *("https://hunter2@h/1", "http://h:4317", "unix:", "tcp://10.0.0.1:80", "service=hunter2"),
        ]
    ),
)


@given(st.dictionaries(st.sampled_from(FIELDS), VALUES, min_size=1, max_size=4))
@example({"BATCH_HOST": "postgresql://u:hunter2@h/d"})
@example({"BATCH_PROGRAMS": "worker,postgresql://u:hunter2@h/d"})
@example({"BATCH_WEBHOOK_NETWORKS": "postgresql://u:hunter2@h/d"})
@example({"BATCH_TLS_CA": "postgresql://u:hunter2@h/d"})
def test_any_values(values: dict[str, str]) -> None:
    """Any values are taken, and then all that follows from them can be asked, or are refused in words, not shown."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in values.items():
            patch.setenv(name, value)
        settings, judgement = config.examine()
        told = "\n".join(judgement.wrong)
        if judgement.wrong:
            assert all("BATCH_" in line or line.partition(":")[0] in values for line in judgement.wrong)
            for name in SECRETS & values.keys():
                others = "".join(value for other, value in values.items() if other != name)
                assert len(values[name]) < 7 or values[name] in others or values[name] not in told
            assert not re.search("://.*hunter2", told)
            return
        assert settings is not None
        given = {name: str(value) for name, value in settings}
        assert "hunter2" not in "".join(value for name, value in given.items() if config.variable(name) in SECRETS)
        assert settings.runs <= {*config.PROGRAMS}
        assert settings.fingerprint == config.fingerprint_now()
        assert parse_dsn(settings.postgres_url) or settings.database_url
        assert addresses.problem(settings.own_host) == addresses.problem(settings.host) == ""
        assert settings.client_environment["no_grpc_proxy"]
        check_target(settings.own_address(settings.gateway_port))


def test_home_that_can_be() -> None:
    """A home of 79 bytes is short enough for every socket in it, and special characters in it are taken literally."""
    assert Settings(home="/" + "é" * 39).home.name == "é" * 39
    home = "/100%41 a&b?c#d 'e' \"f\" ünï"
    settings = Settings(home=home)
    assert parse_dsn(settings.postgres_url)["host"] == f"{home}/run/pg"
    assert Settings(home="/a,b", database_url="postgresql://h/d").home == Path("/a,b")


def test_open_to_others_with_tls_and_tokens_or_by_one_word(tmp_path: Path) -> None:
    """Other machines may connect with TLS and tokens, or when the operator explicitly allows insecure access."""
    authority = Authority(tmp_path, "ca")
    (certificate, key), hashes = authority.issue(), tmp_path / "hashes"
    hashes.touch(0o600)
    safe = {"server_cert": certificate, "server_key": key, "tls_ca": authority.file, "token_hashes": hashes}
    settings = Settings(host="0.0.0.0", **safe)
    assert config.wrong_files(settings) == []
    assert settings.own_host == "127.0.0.1"
    assert Settings(host="0.0.0.0", allow_insecure=True).server_cert is None


def test_files_of_keys_are_private_and_belong_together(tmp_path: Path) -> None:
    """A key or token file that others can read, or a key of another certificate, is reported."""
    authority = Authority(tmp_path, "ca")
    (certificate, key), (_, other_key), hashes = authority.issue(), authority.issue(), tmp_path / "hashes"
    hashes.touch(0o640)
    given = {"server_cert": certificate, "tls_ca": authority.file, "token_hashes": hashes}
    [pair, mode] = config.wrong_files(Settings(server_key=other_key, **given))[::-1]
    assert "BATCH_SERVER_KEY" in pair
    assert "not a certificate and its key" in pair
    assert "BATCH_TOKEN_HASHES" in mode
    assert "chmod 600" in mode
    hashes.chmod(0o600)
    key.chmod(0o604)
    [wrong] = config.wrong_files(Settings(server_key=key, **given))
    assert "BATCH_SERVER_KEY" in wrong
    assert "chmod 600" in wrong


def test_secrets_are_not_shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A password in a database URL appears neither in the settings' repr nor in error messages."""
    monkeypatch.setenv("DATABASE_URL", "postgresql://me:hunter2@db/x")
    monkeypatch.setenv("BATCH_GATEWAY_PORT", "hunter2")
    with pytest.raises(SystemExit):
        config.load()
    monkeypatch.setenv("BATCH_GATEWAY_PORT", "1234")
    monkeypatch.setenv("BATCH_GATEWAY_DATABASE_URL", "postgresql://gateway:hunter2@db/x")
    assert "hunter2" not in repr(Settings()) + capsys.readouterr().err
    assert "hunter2" in Settings().postgres_url
    assert "gateway:hunter2" in Settings().gateway_postgres_url


@pytest.mark.parametrize("module", ["service.gateway", "service.worker"])
def test_check_only_checks(module: str) -> None:
    """`--check` reports wrong settings and exits without starting anything."""
    env = {"PATH": os.environ["PATH"], "BATCH_ENV_FILE": "/dev/null"}
    arguments = [sys.executable, "-m", module, "--check"]
    good = subprocess.run(arguments, env=env, cwd=ROOT, timeout=60)
    bad = subprocess.run(arguments, env=env | {"BATCH_ENGINE": "x"}, cwd=ROOT, timeout=60, capture_output=True)
    assert (good.returncode, bad.returncode) == (0, 2)
    assert b"BATCH_ENGINE" in bad.stderr


@pytest.mark.parametrize(
    ("given", "direct"),
    [
        ({}, "127.0.0.1"),
        ({"no_proxy": "gpu-1,10.0.0.0/8"}, "gpu-1,10.0.0.0/8,127.0.0.1"),
        ({"no_proxy": "gpu-1", "no_grpc_proxy": "gpu-2"}, "gpu-2,127.0.0.1"),
        ({"no_proxy": "gpu-1", "no_grpc_proxy": ""}, "127.0.0.1"),
    ],
)
def test_scripts_keep_what_needs_no_proxy(given: dict[str, str], direct: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scripts call this host without a proxy, and other hosts as the user's variables say."""
    for name in ("no_proxy", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert Settings().client_environment["no_grpc_proxy"] == direct


def test_a_worker_on_every_address_is_known_by_its_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker on a wildcard address advertises its host's name, and loopback only if that name does not resolve."""
    monkeypatch.setattr("socket.gethostname", lambda: "localhost")
    assert Settings(host="0.0.0.0", allow_insecure=True).advertised_host == "localhost"
    assert Settings(host="127.0.0.1").advertised_host == "127.0.0.1"
    monkeypatch.setattr("socket.gethostname", lambda: "no-such-host.invalid")
    assert Settings(host="0.0.0.0", allow_insecure=True).advertised_host == "127.0.0.1"


def test_what_only_this_host_reaches(monkeypatch: pytest.MonkeyPatch) -> None:
    """An address on loopback, and a name that stands for one here, as Debian's own name does; not a name that stands
    for another as well, or under which this host listens on every address."""
    found = {"debian": ["127.0.1.1"], "both": ["127.0.1.1", "10.0.0.1"], "gpu-1": ["10.0.0.1"]}

    def resolve(name: str, *_: object, **__: object) -> list[tuple[object, ...]]:
        if name not in found:
            raise socket.gaierror
        return [(0, 0, 0, "", (address, 0)) for address in found[name]]

    monkeypatch.setattr("socket.getaddrinfo", resolve)
    monkeypatch.setattr("socket.gethostname", lambda: "debian")

    def told(host: str) -> str:
        return Settings(host=host, allow_insecure=True).advertised_loopback

    assert [told(host) for host in ("127.0.0.1", "[::1]", "localhost")] == ["127.0.0.1", "::1", "localhost"]
    assert told("debian") == "debian, which is 127.0.1.1 on this host"
    assert [told(host) for host in ("10.0.0.1", "gpu-1", "both", "unknown", "0.0.0.0")] == [""] * 5
