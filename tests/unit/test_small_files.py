"""What stands in the place of a small file that a setting names: nothing waits for it, or takes it all into memory."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest

from scripts import prerequisites
from scripts.doctor import models
from service import config, database_url, variables
from service.auth import key_files, new_token
from service.config import Settings
from tests.support.certificates import Authority
from vllm_batch import small_files
from vllm_batch.channel import open_channel

# A test that is wrong hangs.
pytestmark = pytest.mark.timeout(30)

KINDS = ("pipe", "device", "folder", "socket", "huge")
# Settings that are paths of files.
FILES = [name for name, field in Settings.model_fields.items() if Path in get_args(field.annotation)]

READ = "import sys, pathlib; from vllm_batch import small_files as s; print(s.read(pathlib.Path(sys.argv[1])).decode())"

Make = Callable[[str], Path]


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("BATCH_", "PG")) or name in ("DATABASE_URL", "SENTRY_DSN"):
            monkeypatch.delenv(name)
    monkeypatch.setitem(Settings.model_config, "env_file", None)


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Makes what is no small file, accessible to its owner alone."""

    def made(kind: str) -> Path:
        path = tmp_path / f"a-{kind}"
        if kind == "pipe":
            os.mkfifo(path, 0o600)
        elif kind == "device":
            path.symlink_to("/dev/zero")
        elif kind == "folder":
            path.mkdir(0o700)
        elif kind == "socket":
            monkeypatch.chdir(tmp_path)
            with socket.socket(socket.AF_UNIX) as server:
                server.bind(path.name)
        else:
            path.touch(0o600)
            os.truncate(path, 1 << 36)
        return path

    return made


def why(kind: str) -> str:
    return "must have at most 16 MiB" if kind == "huge" else f"is a {kind}, and must be a file"


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_read(kind: str, make: Make) -> None:
    """It is refused by name, unopened; an empty file, /dev/null and files of /proc are read."""
    path = make(kind)
    with pytest.raises(ValueError, match=f"{path} .*{why(kind)}"):
        small_files.read(path)
    assert small_files.read(Path("/dev/null")) == b""
    assert small_files.read(Path("/proc/self/cmdline"))


def test_the_output_of_a_command() -> None:
    """What a shell gives for `<(COMMAND)` is read, also when the command has ended, up to the limit."""
    shown = subprocess.run(
        ["bash", "-c", f'"$0" -c "{READ}" <(printf secret) && "$0" -c "{READ}" <(cat /dev/zero)', sys.executable],
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert shown.stdout == "secret\n"
    assert "has more than 16 MiB" in shown.stderr


def test_a_file_that_does_not_tell_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of /proc says that it is empty: it is read up to the limit only."""
    monkeypatch.setattr(small_files, "MAX_BYTES", 10)
    with pytest.raises(ValueError, match="/proc/self/maps has more than"):
        small_files.read(Path("/proc/self/maps"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FILES)
def test_every_setting_of_a_file(name: str, kind: str, make: Make, tmp_path: Path) -> None:
    """Each setting that names a file is refused in one sentence that names it, also by `--check`."""
    authority = Authority(tmp_path, "ca")
    certificate, key = authority.issue()
    given = {"server_cert": certificate, "server_key": key, "tls_cert": certificate, "tls_key": key}
    given |= {"client_ca": authority.file, "tls_ca": authority.file}
    assert config.wrong_files(Settings(**given)) == []
    path = make(kind)
    settings = Settings(**given | {name: path})
    [wrong] = config.wrong_files(settings)
    named, _, told = wrong.partition(": ")
    assert f"BATCH_{name.upper()}" in named.split(", ")
    assert told.startswith(f"{path} ")
    assert why(kind) in told
    assert config.wrong_certificates(settings) == config.wrong_webhooks(settings) == []


@pytest.mark.parametrize("kind", KINDS)
def test_secrets_of_webhooks(kind: str, make: Make, tmp_path: Path) -> None:
    """The file of a tenant's webhook secret is refused by `--check`, and when a webhook is to be signed."""
    path, tenants = make(kind), tmp_path / "tenants.toml"
    tenants.write_text(f"[tenants.a.webhook]\nsecret_file = '{path}'\n")
    [wrong] = config.wrong_webhooks(Settings(tenants_file=tenants))
    assert wrong.startswith("BATCH_TENANTS_FILE: tenants.a.webhook.secret_file: ")
    assert why(kind) in wrong
    with pytest.raises(ValueError, match=why(kind)):
        key_files.read_webhook_secrets(path)


@pytest.mark.parametrize("kind", KINDS)
def test_in_the_place_of_env(kind: str, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """`.env` is refused, read neither by the settings nor by setup.sh, and settles nothing in a running watchdog."""
    path = make(kind)
    monkeypatch.setenv("BATCH_ENV_FILE", str(path))
    monkeypatch.setattr(config, "ENV_FILE", path)
    monkeypatch.setitem(Settings.model_config, "env_file", path)
    settings, judgement = config.examine()
    assert settings is None
    [wrong] = judgement.wrong
    assert wrong.startswith(f"BATCH_ENV_FILE: {path}: it ")
    assert why(kind) in wrong
    assert variables.read_file(path)[0] == {}
    assert config.fingerprint_now() == ""
    assert config.home() == config.ROOT / "var"
    prerequisites.read_settings()


@pytest.mark.parametrize("kind", KINDS)
def test_flags_of_the_engine(kind: str, make: Make) -> None:
    """Pipes and devices are refused for every flag, and anything but a small file for those that vLLM reads whole."""
    path = make(kind)
    for flag in ("--chat-template ", "--config=", "--anything "):
        wrong = config.wrong_files(Settings(engine_args=f"--seed 1 {flag}'{path}' --last /dev/null"))
        is_refused = flag != "--anything " or kind in ("pipe", "device")
        assert len(wrong) == is_refused
        assert all(f"BATCH_ENGINE_ARGS: the file of {flag.strip(' =')} " in line for line in wrong)
        assert all(why(kind) in line and str(path) not in line for line in wrong)
    assert config.wrong_files(Settings(engine_args="--chat-template '{{ a }}' --config none.yaml --x=")) == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", database_url.FILES)
def test_files_of_libpq(name: str, kind: str, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """What libpq would wait for without a deadline is refused, in the URL and in its variables."""
    path = make(kind)
    monkeypatch.setenv(f"PG{name.upper()}", str(path))
    with pytest.raises(database_url.UrlError, match=f"PG{name.upper()} .*{why(kind)}"):
        database_url.parse("postgresql://h/d")
    if name != "servicefile":
        with pytest.raises(database_url.UrlError, match=f"its {name} .*{why(kind)}"):
            database_url.parse(f"postgresql://h/d?{name}={path}")
        assert database_url.parse(f"postgresql://h/d?{name}=/dev/null")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variable", ["BATCH_TLS_CA", "BATCH_TLS_CERT", "BATCH_TLS_KEY", "BATCH_TOKEN_FILE"])
def test_files_of_clients(
    variable: str, kind: str, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client refuses a file by the variable that names it."""
    authority = Authority(tmp_path, "ca")
    certificate, key = authority.issue()
    for name, file in (("CA", authority.file), ("CERT", certificate), ("KEY", key)):
        monkeypatch.setenv(f"BATCH_TLS_{name}", str(file))
    open_channel("127.0.0.1:1").close()
    monkeypatch.setenv(variable, str(make(kind)))
    with pytest.raises(ValueError, match=f"{variable}: .*{why(kind)}"):
        open_channel("127.0.0.1:1")


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_for_it(kind: str, make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    """No token is added to what is no small file."""
    path = make(kind)
    assert new_token.main([str(path), "alice", "read"]) == 1
    assert why(kind) in capsys.readouterr().err


@pytest.mark.parametrize("kind", KINDS)
def test_in_a_folder_of_a_model(kind: str, make: Make, tmp_path: Path) -> None:
    """The doctor reads no such config.json, and no such index of weights."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").symlink_to(make(kind))
    if kind != "huge":
        (model / "model.safetensors.index.json").symlink_to(tmp_path / f"a-{kind}")
    found = models.probe_folder(model)
    assert why(kind) in found.config_error
    assert found.shards == []
