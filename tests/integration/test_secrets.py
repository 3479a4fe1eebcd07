"""With a password in every setting that can hold one, none appears in anything written or printed."""

from datetime import UTC, datetime
from pathlib import Path

import pytest

from service.processes import Mark
from tests.integration.test_doctor import doctor
from tests.integration.test_sessions import run
from tests.support.batches import finished, lines, refused
from tests.support.ports import free_port
from tests.support.servers import Stack
from tests.support.waiting import until
from vllm_batch import CallError, Client
from watchdog.act import evidence_folder

PASSWORD = "hunter2hunter2"


def planted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plants secrets in the other variables that processes inherit."""
    monkeypatch.setenv("SENTRY_DSN", f"http://{PASSWORD}@127.0.0.1:{free_port()}/1")
    monkeypatch.setenv("HF_TOKEN", PASSWORD)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", f"authorization=Bearer {PASSWORD}")
    monkeypatch.setenv("PGPASSWORD", PASSWORD)
    monkeypatch.setenv("BATCH_TOKEN", PASSWORD)


def written(folder: Path) -> dict[str, str]:
    return {str(path): path.read_text(errors="replace") for path in folder.rglob("*") if path.is_file()}


def check_unsaid(*texts: str) -> None:
    for text in texts:
        assert PASSWORD not in text


def test_a_stack_that_works_and_fails(stack: Stack, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logs at DEBUG, errors to clients and evidence folders contain no secret while a stack works and fails."""
    planted(monkeypatch)
    stack.database_url += f"&password={PASSWORD}"
    url = stack.database_url
    gateway = stack.gateway(log_level="DEBUG", gateway_database_url=url)
    worker = stack.worker(log_level="DEBUG")
    stack.wait_until_accepting()
    batch = client.submit_lines(lines(3))
    assert finished(client, batch.id).counts.completed == 3
    evidence_folder.keep(
        stack.folder, Mark(stack.folder), datetime.now(UTC), "1", {"a": 1}, None, [gateway.log, worker.log]
    )
    for server in stack.servers:
        server.kill()
    stack.servers.clear()
    stack.database_url = f"postgresql://u:{PASSWORD}@127.0.0.1:{free_port()}/db"
    gateway, worker = stack.gateway(gateway_database_url=stack.database_url), stack.worker()
    for server in (gateway, worker):
        until(lambda server=server: server.events("database_away"), "the outage to be noticed")  # type: ignore[misc]
    error: CallError = refused(lambda: client.submit_lines(lines(1)))
    check_unsaid(error.message, str(error), repr(error.metadata), client.accepting())
    files = written(stack.folder)
    assert [name for name in files if "event-1" in name]
    assert len(files) > 5
    check_unsaid(*files.values())


@pytest.mark.parametrize(
    "url",
    [
        f"postgresql://u:{PASSWORD}@127.0.0.1:1/db",
        f"mysql://u:{PASSWORD}@h/db",
        f"postgresql://u:{PASSWORD}@h/db?pgbouncer=true",
        f"postgresql://u:x/{PASSWORD}@h/db",
        f"postgresql://u:x@{PASSWORD}@h/db",
        f"host=h password='{PASSWORD}",
        PASSWORD,
    ],
)
def test_checks(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--check` and the doctor never print a password from a URL, valid or not."""
    planted(monkeypatch)
    for module in ("service.gateway", "service.worker", "watchdog"):
        done = run(url, module, "--check")
        check_unsaid(done.stdout, done.stderr)
    found = doctor(tmp_path, "--quick", DATABASE_URL=url, BATCH_ENGINE="simulated", BATCH_GATEWAY_DATABASE_URL=url)
    check_unsaid(found.stdout, found.stderr)
    assert "DATABASE_URL: " in found.stdout


def test_credentials_of_a_collector(monkeypatch: pytest.MonkeyPatch) -> None:
    """Credentials in the collector's URL are rejected at start, because gRPC would log them as the host name."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://u:{PASSWORD}@127.0.0.1:4317")
    done = run("postgresql:///x", "service.worker", "--check")
    assert done.returncode == 2
    assert "OTEL_EXPORTER_OTLP_ENDPOINT: " in done.stderr
    check_unsaid(done.stdout, done.stderr)
