"""Variable names: our own misspelt ones stop a start, foreign ones do not, and `.env` works like the environment."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from scripts.settings import supervisord_conf
from service import config, variables
from service.config import ROOT, Settings, known_variables

KNOWN = sorted(known_variables())
# Of cloud batch services, schedulers and users' own programs.
FOREIGN = """
BATCH_SIZE BATCH_TASK_INDEX BATCH_TASK_COUNT BATCH_JOB_UID BATCH_TASK_RETRY_ATTEMPT BATCH_HOSTS_FILE BATCH_ID
BATCH_MAIN_NODE_HOSTNAME BATCH_NODE_COUNT BATCH_JOB_ID BATCH_QUEUE BATCH_TIMEOUT BATCH_INTERVAL BATCH_NAME BATCH_USER
BATCH_DIR BATCH_LOG_DIR BATCH_ENV BATCH_DEBUG BATCH_NUM_WORKERS BATCH_MAX_SIZE BATCH_CONFIG BATCH_SERVER_PORT
BATCH_REGION
""".split()  # noqa: SIM905 - as they are read


def links(service: str, number: int) -> dict[str, str]:
    """The variables that Kubernetes sets for a Service."""
    name = f"BATCH{service}"
    port = f"{name}_PORT_{number}_TCP"
    return {
        f"{name}_SERVICE_HOST": "10.0.0.1",
        f"{name}_SERVICE_PORT": str(number),
        f"{name}_SERVICE_PORT_GRPC": str(number),
        f"{name}_PORT": f"tcp://10.0.0.1:{number}",
        port: f"tcp://10.0.0.1:{number}",
        f"{port}_PROTO": "tcp",
        f"{port}_PORT": str(number),
        f"{port}_ADDR": "10.0.0.1",
    }


@pytest.fixture
def env_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A temporary `.env`, with none of our variables in the environment."""
    for name in list(os.environ):
        if name.startswith("BATCH_") or name in known_variables():
            monkeypatch.delenv(name)
    path = tmp_path / ".env"
    monkeypatch.setattr(config, "ENV_FILE", path)
    monkeypatch.setitem(Settings.model_config, "env_file", path)
    taken = set(os.environ)
    yield path
    for name in set(os.environ) - taken:
        del os.environ[name]
    config._taken.clear()


def edits(name: str) -> Iterator[str]:
    """The name with one letter changed, left out, doubled or swapped with its neighbour."""
    for i, letter in enumerate(name):
        yield name[:i] + ("X" if letter != "X" else "Y") + name[i + 1 :]
        yield name[:i] + name[i + 1 :]
        yield name[: i + 1] + name[i:]
        yield name[:i] + name[i + 1 : i + 2] + letter + name[i + 2 :]


@pytest.mark.parametrize("name", KNOWN)
def test_one_wrong_letter(name: str) -> None:
    """One typing error in a name is an error that suggests the right name; in the environment only for BATCH_ names."""
    for wrong in set(edits(name)) - set(KNOWN):
        [told] = variables.judge({}, {wrong: "1"}, KNOWN).wrong
        assert told.startswith(f"{wrong}: no such setting; ")
        assert name in told
        given = variables.judge({wrong: "1"}, {}, KNOWN)
        assert (given.wrong if name.startswith("BATCH_") else given.foreign) == [told]


@given(st.sampled_from(KNOWN), st.data())
def test_any_letter(name: str, data: st.DataObject) -> None:
    """Any letter inserted or replaced anywhere in a name in `.env` gets the same error."""
    i = data.draw(st.integers(0, len(name)))
    letter = data.draw(st.sampled_from("ABCDEFGHIJKLMNOPQRSTUVWXYZ_0123456789"))
    for wrong in {name[:i] + letter + name[i:], name[:i] + letter + name[i + 1 :]} - set(KNOWN):
        assert name in variables.judge({}, {wrong: "1"}, KNOWN).wrong[0]


# Python reads a lone \r as a line break, and no variable can have NUL.
TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\0"), max_size=30)


@given(st.dictionaries(st.sampled_from(KNOWN), TEXTS | st.text("${}HOME:-'\"\\\\# \n%=", max_size=12)))
@example({"DATABASE_URL": "postgresql://u:a${HOME}b@h/d"})
def test_any_value(values: dict[str, str]) -> None:
    """Any text in single quotes is read unchanged."""
    with tempfile.NamedTemporaryFile(suffix=".env") as file:
        for name, value in values.items():
            escaped = value.replace("\\", "\\\\").replace("'", "\\'")
            file.write(f"{name}='{escaped}'\n".encode())
        file.flush()
        found, wrong = variables.read_file(Path(file.name))
    assert (found, wrong) == (values, [])


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("BATCH_HEARTBEAT_TIMEOUT", "BATCH_HEARTBEAT_TIMEOUT_S"),
        ("BATCH_MAX_RESTARTS_HOUR", "BATCH_MAX_RESTARTS_PER_HOUR"),
        ("BATCH_TOKENS_HASH", "BATCH_TOKEN_HASHES"),
        ("batch_gatway_port", "BATCH_GATEWAY_PORT"),
    ],
)
def test_more_than_a_letter(wrong: str, meant: str) -> None:
    """Larger mistakes, such as a missing unit, are recognized too."""
    assert meant in variables.judge({wrong: "1"}, {}, KNOWN).wrong[0]


def test_what_belongs_to_others_is_a_warning() -> None:
    """Each foreign variable gets one warning and stops nothing."""
    given = dict.fromkeys(FOREIGN, "1") | links("", 80) | links("_GATEWAY", 50051) | links("_WORKER_METRICS", 9100)
    judgement = variables.judge(given, {}, KNOWN)
    assert judgement.wrong == []
    assert [line.partition(":")[0] for line in judgement.foreign] == sorted(given)


def test_a_service_with_the_name_of_a_setting(env_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If Kubernetes sets BATCH_GATEWAY_PORT for a Service named batch-gateway, `.env` or the default applies."""
    monkeypatch.setenv("BATCH_GATEWAY_PORT", "tcp://10.0.0.1:50051")
    monkeypatch.setenv("BATCH_WORKER_PORT", "tcp://10.0.0.1:50052")
    env_file.write_text("BATCH_GATEWAY_PORT=1234\n")
    settings = config.load(warns=False)
    assert (settings.gateway_port, settings.worker_port) == (1234, 50052)


def test_file_and_environment_mean_the_same(env_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings in `.env` take effect as in the environment, which takes precedence."""
    env_file.write_text(
        "\ufeffexport BATCH_HOME='/srv/a home'\r\nDATABASE_URL=postgresql://h/d\r\nbatch_log_level=DEBUG\r\n"
    )
    settings = config.load()
    assert (str(settings.home), settings.postgres_url) == ("/srv/a home", "postgresql://h/d")
    assert (settings.log_level, config.home()) == ("DEBUG", settings.home)
    monkeypatch.setenv("BATCH_HOME", "elsewhere")
    assert config.load().home == config.home() == ROOT / "elsewhere"


def test_other_variables_in_values(env_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """${NAME} expands to a variable of the environment or the file, except in single quotes; for scripts too."""
    monkeypatch.setenv("HOME", "/home/me")
    env_file.write_text(
        "A=/x\nBATCH_HOME=${HOME}${A}\nBATCH_MODEL=\"${A}/${B:-m}\"\nDATABASE_URL='postgresql://u:${A}@h/d'\n"
    )
    settings = Settings()
    assert settings.postgres_url == "postgresql://u:${A}@h/d"
    assert (config.home(), settings.home) == (Path("/home/me/x"), Path("/home/me/x"))
    assert settings.model == "/x/m"


def test_home_is_known_whatever_else_is_wrong(env_file: Path) -> None:
    """BATCH_HOME is known even if other settings are wrong, and is the default if `.env` cannot be read."""
    env_file.write_text("BATCH_HOME=/srv/batch\nBATCH_ENGINE=wrong\nBATCH_NO\n")
    assert str(config.home()) == "/srv/batch"
    env_file.write_bytes(b"BATCH_HOME=/srv/\xff")
    assert config.home() == ROOT / "var"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (b"BATCH_HMOE=/x\n", "BATCH_HMOE: no such setting; BATCH_HOME is meant"),
        (b"DATABASE_URI=secret\n", "DATABASE_URI: no such setting; DATABASE_URL is meant"),
        (b"A=1\nBATCH_HOST 127.0.0.1 secret\n", "line 2: not NAME=value"),
        (b"\n\nBATCH_HOST\n", "line 3: not NAME=value"),
        (b"SECRET_TOKEN='open secret\n", "line 1: not NAME=value"),
        (b"BATCH_HOST=secret\xff\n", "not UTF-8 text"),
        ("BATCH_HOST=secret\n".encode("utf-16-le"), "it has a NUL"),
        (b"HF_TOKEN=secret\0\n", "it has a NUL"),
    ],
)
def test_typing_errors_in_the_file(text: bytes, told: str, env_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Mistakes in `.env` stop the start with the name or line number, but without the value."""
    env_file.write_bytes(text)
    with pytest.raises(SystemExit) as caught:
        config.load()
    shown = capsys.readouterr().err
    assert caught.value.code == 2
    assert told in shown
    assert "secret" not in shown


def test_variables_of_libraries(env_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Variables such as HF_TOKEN in `.env` reach libraries, and changing one changes the settings' fingerprint."""
    monkeypatch.setenv("HF_HOME", "/given")
    env_file.write_text("HF_HOME=/in/file\nHF_TOKEN=one\n")
    before = config.load().fingerprint
    assert (os.environ["HF_HOME"], os.environ["HF_TOKEN"]) == ("/given", "one")
    assert config.fingerprint_now() == before
    env_file.write_text("HF_HOME=/in/file\nHF_TOKEN=two\n")
    assert config.fingerprint_now() != before


@pytest.mark.parametrize("kind", ["folder", "pipe", "output of a command", "link to nothing", "link to a folder"])
def test_what_is_no_file(kind: str, env_file: Path, request: pytest.FixtureRequest) -> None:
    """What stands in the place of `.env` and is no file stops the start, instead of counting as an empty one."""
    if kind == "folder":
        # As container engines make one for a file that is to be mounted and is missing.
        env_file.mkdir()
    elif kind == "pipe":
        os.mkfifo(env_file)
    elif kind == "output of a command":
        output = os.popen("echo BATCH_MODEL=another")
        request.addfinalizer(output.close)
        env_file.symlink_to(f"/dev/fd/{output.fileno()}")
    else:
        env_file.symlink_to(env_file.parent if kind == "link to a folder" else "nothing")
    what = "a folder" if "folder" in kind else "a pipe"
    told = "a link to nothing" if kind == "link to nothing" else f"it is {what}, and must be a file"
    assert variables.read_file(env_file) == ({}, [f"{env_file}: {told}"])
    with pytest.raises(SystemExit):
        config.load()
    assert variables.read_file(Path("/dev/null")) == variables.read_file(env_file / "none") == ({}, [])


def test_variables_of_libpq(env_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """libpq's variables do not apply to the embedded Postgres, for which they are not meant, but to any other."""
    monkeypatch.setenv("PGAPPNAME", "company")
    monkeypatch.setenv("PGPORT", "6432")
    env_file.write_text("PGOPTIONS='-c search_path=ours'\nDATABASE_URL=postgresql://h/d\n")
    config.load()
    assert (os.environ["PGAPPNAME"], os.environ["PGPORT"]) == ("company", "6432")
    assert os.environ["PGOPTIONS"] == "-c search_path=ours"
    env_file.write_text("PGOPTIONS='-c search_path=ours'\n")
    config.load()
    assert not [name for name in os.environ if name.startswith("PG")]


def test_a_file_that_is_named_must_be_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A BATCH_ENV_FILE that does not exist is an error."""
    monkeypatch.setenv("BATCH_ENV_FILE", "given")
    monkeypatch.setattr(config, "ENV_FILE", tmp_path / "none")
    assert config.judge_variables().wrong[:1] == [f"BATCH_ENV_FILE: there is no {tmp_path}/none"]


def test_whose_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another home than `var/`, also over a link and before there is one, has its own supervisord.conf."""
    root = tmp_path / "checkout"
    root.mkdir()
    (tmp_path / "link").symlink_to(root)
    monkeypatch.setattr("scripts.settings.ROOT", root)
    for home in (root / "var", tmp_path / "link/var"):
        assert supervisord_conf(home) == root / "conf/supervisord.conf"
    assert supervisord_conf(tmp_path) == tmp_path / "supervisord.conf"
