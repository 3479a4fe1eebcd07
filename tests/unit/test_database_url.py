"""Database URLs: whatever psql accepts is accepted; anything else is rejected without quoting it."""

import string
from pathlib import Path
from urllib.parse import quote

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from psycopg2.extensions import make_dsn, parse_dsn

from service import config
from service.config import Settings
from service.database_url import UrlError, parse

SECRET = "hunter2hunter2"
# Whatever a password generator may produce.
TEXT = st.text(st.characters(min_codepoint=33, max_codepoint=0x2FFF, exclude_categories=["Cs", "Cc", "Zs"]), min_size=1)
NAMES = st.text(string.ascii_lowercase, min_size=1, max_size=8)
HOSTS = st.sampled_from(["db", "db.example.com", "10.0.0.1", "[::1]", "%2Fvar%2Frun%2Fpg"])
PORTS = st.integers(1, 65_535)


@given(
    st.sampled_from(["postgres://", "postgresql://"]),
    NAMES,
    TEXT,
    st.lists(st.tuples(HOSTS, PORTS), min_size=1, max_size=3),
    NAMES,
    st.sampled_from(["", "?sslmode=require", "?options=-c%20search_path%3Dmine&target_session_attrs=read-write"]),
)
def test_encoded_urls(
    scheme: str, user: str, password: str, hosts: list[tuple[str, int]], name: str, more: str
) -> None:
    """Percent-encoded users, passwords, hosts and ports in a URL are decoded correctly, with either scheme."""
    netloc = ",".join(f"{host}:{port}" for host, port in hosts)
    found = parse(f"{scheme}{user}:{quote(password, safe='')}@{netloc}/{name}{more}")
    assert (found["user"], found["password"], found["dbname"]) == (user, password, name)
    assert found["port"] == ",".join(str(port) for _, port in hosts)
    assert found["host"].count(",") == len(hosts) - 1
    assert ("options" in found) == ("options" in more)


@given(NAMES, TEXT)
def test_connection_strings(name: str, password: str) -> None:
    """libpq's connection strings are accepted too, with their quoting."""
    quoted = password.replace("\\", "\\\\").replace("'", "\\'")
    found = parse(f"host=/var/run/pg dbname={name} password='{quoted}'")
    assert found == {"host": "/var/run/pg", "dbname": name, "password": password}


@given(
    TEXT, st.sampled_from(["{0}", "postgresql://u:{0}@h/db", "host=h password={0}", "mysql://u:{0}@h/db", "{0}://h"])
)
@example("p@ss/w#rd", "postgresql://u:{0}@h/db")
@example("a/b", "postgresql://u:{0}@h/db")
@example("1/b", "postgresql://u:{0}@h/db")
@example("a?b=c", "postgresql://u@h/db?x={0}")
def test_nothing_is_shown(password: str, form: str) -> None:
    """A password that is not percent-encoded is parsed as psql parses it, or rejected without quoting it."""
    said = ""
    try:
        parse(form.format(password + SECRET))
    except UrlError as error:
        said = str(error)
    assert SECRET not in said


PIECES = st.sampled_from(
    [
        *("postgresql://", "postgres://", "host=", "port=", "password=", "user=u", "dbname=d", "service=", "sslmode="),
        *("u", SECRET, "h", "db", "[::1]", "10.0.0.1", "5432", "0", "require", "connect_timeout", "options", "-c"),
        *(":", "@", "/", ",", "?", "&", "=", "%40", "%00", "%zz", "%", "'", "\\", " ", "\n", "\0", "é", "\udcff", "#"),
    ]
)


@given(
    st.lists(PIECES, max_size=10).map("".join)
    | st.lists(PIECES, max_size=8).map(lambda parts: "postgresql://" + "".join(parts))
)
def test_any_url(url: str) -> None:
    """Any text is a URL with names that libpq has, or refused in a sentence that has nothing of it."""
    said = ""
    try:
        found = parse(url)
    except UrlError as error:
        said = str(error)
    if said:
        assert SECRET not in said
        assert len(said) < 200
        return
    assert set(found) <= set(parse_dsn(make_dsn(**found)))
    assert "@" not in found.get("host", "") or "%40" in url or not url.startswith("postgres")


@pytest.mark.parametrize(
    ("url", "told"),
    [
        (f"mysql://u:{SECRET}@h/db", "must begin with postgresql:// or postgres://"),
        (f"postgresql+asyncpg://u:{SECRET}@h/db", "must begin with postgresql:// or postgres://"),
        (f"jdbc:postgresql://h/db?password={SECRET}", "must begin with postgresql:// or postgres://"),
        ("sqlite:///x.db", "must begin with"),
        (SECRET, "must begin with"),
        (f"postgresql://u:{SECRET}%zz@h/db", "write %25"),
        (f"postgresql://u:{SECRET}@x@h/db", "percent-encoded"),
        (f"postgresql://u:{SECRET}/x@h/db", "percent-encoded"),
        (f"postgresql://u:123/{SECRET}@h/db", "percent-encoded"),
        (f"postgresql://u:{SECRET}@[::1/db", "IPv6"),
        (f"postgresql://u:{SECRET}@h/db\n", "the end of a line"),
        (f"postgresql://u:{SECRET}@h/db?pgbouncer=true", "libpq does not have: pgbouncer"),
        ("postgresql://u@h/db?schema=public", "libpq does not have: schema"),
        (f"postgresql://u@h/db?x{SECRET}=1", "libpq does not have"),
        (f"postgresql://u@h/db?{SECRET}", "NAME=VALUE"),
        (f"host=h pasword={SECRET}", "libpq does not have"),
        (f"host=h password='{SECRET}", "is not closed"),
        (f"postgresql://u:{SECRET}@h:99999/db", "its port is no number"),
        (f"postgresql://u:{SECRET}@h:0/db", "its port is no number"),
        (f"postgresql://u@h/db?sslmode={SECRET}", "no such value for sslmode"),
        (f"postgresql://u@h/db?target_session_attrs={SECRET}", "no such value for target_session_attrs"),
        (f"postgresql://u@h/db?hostaddr={SECRET}", "hostaddr is no IP address"),
        ("postgresql://h1,h2:1/db?port=1,2,3", "another number of ports"),
        (f"service={SECRET}", "service"),
        ("postgresql://h/db?replication=database", "replication"),
    ],
)
def test_what_is_refused(
    url: str, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each kind of unusable URL is rejected at start with the setting's name and a reason, but never the URL."""
    monkeypatch.setitem(Settings.model_config, "env_file", None)
    for setting in ("DATABASE_URL", "BATCH_GATEWAY_DATABASE_URL"):
        monkeypatch.setenv(setting, url)
        with pytest.raises(SystemExit):
            config.load()
        said = capsys.readouterr().err
        assert said.startswith(f"wrong settings:\n  {setting}: ")
        assert told in said
        assert SECRET not in said
        monkeypatch.delenv(setting)


def test_a_service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A service from libpq's service file is accepted, including one with several hosts."""
    file = tmp_path / "pg_service.conf"
    file.write_text("[mine]\nhost=a,b\nport=1,2\ndbname=batch\n")
    monkeypatch.setenv("PGSERVICEFILE", str(file))
    assert parse("service=mine") == parse("postgresql://?service=mine") == {"service": "mine"}
    with pytest.raises(UrlError):
        parse("service=other")


@pytest.mark.parametrize("name", ["plain", "with blank", "50%", "a&b?c=d", "naïve", "it's"])
def test_the_embedded_one_in_any_home(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The URL of the embedded Postgres names its folder correctly, whatever characters its path has."""
    monkeypatch.setitem(Settings.model_config, "env_file", None)
    monkeypatch.delenv("DATABASE_URL", raising=False)
    home = Path("/tmp") / name
    assert parse(Settings(home=home).postgres_url)["host"] == f"{home}/run/pg"
