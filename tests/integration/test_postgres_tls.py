"""Postgres over TLS: a valid certificate works; what is wrong with any other is reported in one sentence."""

import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from scripts.doctor import database as doctor
from service.database_url import parse
from service.db.sessions import parameters
from tests.integration.test_sessions import run
from tests.support.batches import lines, refused
from tests.support.certificates import Authority, replace
from tests.support.servers import Stack
from tests.support.stacks import full_stack
from tests.support.swallowing import firewall
from tests.support.tls_postgres import tls_postgres
from tests.support.waiting import until
from vllm_batch import Client

PASSWORD = "hunter2hunter2"
WRONG = {
    "wrong name": 'server certificate for "127.0.0.1" (and 1 other name) does not match host name "db.example"',
    "expired": "its TLS certificate has expired: renew it on the server",
    "unknown authority": "its TLS certificate was not issued by a CA in ",
    "no such file": 'root certificate file "/nowhere.pem" does not exist',
    "no TLS": "server does not support SSL, but SSL was required",
}


@contextmanager
def served(database_url: str, folder: Path, wrong: str) -> Iterator[str]:
    """Yields a URL of the test's database over TLS with the given mistake."""
    given, authority = parse(database_url), Authority(folder, "ours")
    socket = f"{given['host']}/.s.PGSQL.5432"
    pair = (Authority(folder, "others") if wrong == "unknown authority" else authority).issue(
        is_expired=wrong == "expired"
    )
    host = "db.example" if wrong == "wrong name" else "localhost"
    mode, root = "verify-full", "/nowhere.pem" if wrong == "no such file" else authority.file
    with firewall(socket) if wrong == "no TLS" else tls_postgres(socket, pair) as server:
        if wrong == "no TLS":
            mode = "require"
        yield (
            f"postgresql://postgres:{PASSWORD}@{host}:{server.port}/{given['dbname']}?hostaddr=127.0.0.1"
            f"&sslmode={mode}&sslrootcert={root}"
        )


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_is_said(database_url: str, tmp_path: Path, wrong: str) -> None:
    """The doctor and `watchdog --check` name the cause in one sentence, without the password."""
    with served(database_url, tmp_path, wrong) as url:
        finding = doctor.judge(doctor.probe(url), "DATABASE_URL")
        assert WRONG[wrong] in finding.problem
        assert "TLS" in finding.fix
        checked = run(url, "watchdog", "--check")
    assert checked.returncode == 1
    [said] = [line for line in checked.stderr.splitlines() if line.startswith("Postgres does not answer: ")]
    assert WRONG[wrong] in said
    assert PASSWORD not in finding.problem + finding.fix + checked.stderr


def test_nothing_is_started(database_url: str, tmp_path: Path) -> None:
    """start-all.sh ends at once with the cause, and starts nothing."""
    with (
        served(database_url, tmp_path, "expired") as url,
        full_stack(BATCH_ENGINE="simulated", DATABASE_URL=url) as stack,
    ):
        started = stack.script("start-all.sh", timeout_s=60)
        assert started.returncode == 1
        assert WRONG["expired"] in started.stderr
        assert PASSWORD not in started.stdout + started.stderr
        assert not (stack.home / "run/supervisord.pid").exists()


def test_a_renewed_certificate_heals(stack: Stack, client: Client, tmp_path: Path) -> None:
    """Gateway and worker wait while the certificate is expired, tell clients why, and work once it is renewed in place;
    one that expires in mid-batch, or is replaced by one of another name, costs no result."""
    given, authority = parse(stack.database_url), Authority(tmp_path, "ours")
    pair = authority.issue(is_expired=True)
    with tls_postgres(f"{given['host']}/.s.PGSQL.5432", pair) as server:
        stack.database_url = (
            f"postgresql://postgres:{PASSWORD}@localhost:{server.port}/{given['dbname']}?hostaddr=127.0.0.1"
            f"&sslmode=verify-full&sslrootcert={authority.file}"
        )
        for process in (stack.gateway(), stack.worker(window=20)):
            until(lambda process=process: process.events("database_away"), "the process to say so")  # type: ignore[misc]
            assert WRONG["expired"] in str(process.events("database_away")[0]["cause"])
        until(lambda: WRONG["expired"] in client.accepting(), "the gateway to say so")
        error = refused(lambda: client.submit_lines(lines(1)))
        assert error.reason == "DATABASE_UNAVAILABLE"
        assert WRONG["expired"] in error.message
        replace(pair, authority.issue())
        stack.wait_until_accepting()
        for wrong, told in (
            (authority.issue(is_expired=True), WRONG["expired"]),
            (authority.issue("db.example"), 'for "db.example" does not match host name "localhost"'),
        ):
            batch = client.submit_lines(lines(200, vllm_xargs={"simulate": 0.2}))
            until(lambda: client.get(batch.id).counts.completed > 20, "part of the batch")  # noqa: B023
            replace(pair, wrong)
            server.cut()
            until(lambda: told in client.accepting(), "the gateway to say so")  # noqa: B023
            replace(pair, authority.issue())
            with Client(stack.target, patience_s=60) as patient:
                *_, done = patient.watch(batch.id)
                assert done.counts.completed == 200
                assert [result.custom_id for result in patient.results(batch.id)] == [f"c{i}" for i in range(200)]
            stack.wait_until_accepting()
    assert [process.process.poll() for process in stack.servers] == [None, None]
    assert not [path for path in stack.folder.glob("*.log") if PASSWORD in path.read_text()]


def test_the_authorities_of_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    """`sslrootcert=system` means this system's CA file, not that of the machine that built libpq."""
    paths = ssl.get_default_verify_paths()._replace(cafile="/etc/cas.pem")
    monkeypatch.setattr(ssl, "get_default_verify_paths", lambda: paths)
    found = parameters("postgresql://h/db?sslrootcert=system", "test", 1)
    assert (found["sslrootcert"], found["sslmode"]) == ("/etc/cas.pem", "verify-full")
