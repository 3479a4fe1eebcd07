"""With a password in every setting that can hold one, none appears in anything written or printed."""

import os
import shutil
import signal
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import pytest
from pydantic import AliasChoices

from service.config import Settings
from service.processes import Mark
from tests.integration.test_doctor import doctor
from tests.integration.test_sessions import run
from tests.support.batches import finished, lines, refused
from tests.support.ports import free_port
from tests.support.sentry_receiver import receiving
from tests.support.servers import Stack
from tests.support.stacks import full_stack
from tests.support.waiting import until
from vllm_batch import CallError, Client
from watchdog.act import evidence_folder

PASSWORD = "hunter2hunter2"
KEY_OF_SENTRY = "hunter3hunter3"


def planted(url: str) -> dict[str, str]:
    """Each setting, and each variable of a library, that can hold a secret, with one in it."""
    return {
        "DATABASE_URL": url,
        "BATCH_GATEWAY_DATABASE_URL": url,
        "SENTRY_DSN": f"http://{PASSWORD}@127.0.0.1:{free_port()}/1",
        "BATCH_ENGINE_ARGS": f"--api-key {PASSWORD} --hf-token={PASSWORD}",
        "BATCH_TOKEN": PASSWORD,
        "HF_TOKEN": PASSWORD,
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://localhost:{free_port()}",
        "OTEL_EXPORTER_OTLP_HEADERS": f"authorization=Bearer {PASSWORD}",
        "PGPASSWORD": PASSWORD,
        # gRPC sends spans through the proxy, and everything else of ours needs none.
        "http_proxy": f"http://u:{PASSWORD}@127.0.0.1:{free_port()}",
        "no_proxy": "127.0.0.1",
    }


def plant(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """Plants secrets in the variables that processes inherit."""
    for name, value in planted(url).items():
        monkeypatch.setenv(name, value)


def written(folder: Path) -> dict[str, str]:
    return {str(path): path.read_text(errors="replace") for path in folder.rglob("*") if path.is_file()}


def shown(done: "subprocess.CompletedProcess[str]") -> str:
    return done.stdout + done.stderr


def check_unsaid(*texts: str) -> None:
    for text in texts:
        assert PASSWORD not in text


def test_every_secret_setting_is_planted() -> None:
    """A setting that is declared as a secret is planted by these tests."""
    names = set()
    for name, field in Settings.model_fields.items():
        if "SecretStr" in str(field.annotation):
            alias = field.validation_alias
            names.add(str(alias.choices[0]) if isinstance(alias, AliasChoices) else f"BATCH_{name.upper()}")
    assert {"DATABASE_URL", "SENTRY_DSN", "BATCH_GATEWAY_DATABASE_URL"} <= names
    given = planted(PASSWORD)
    assert [name for name in names if PASSWORD not in given.get(name, "")] == []


def test_a_stack_that_works_and_fails(stack: Stack, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logs at DEBUG, errors to clients and evidence folders contain no secret while a stack works and fails."""
    stack.database_url += f"&password={PASSWORD}"
    url = stack.database_url
    plant(monkeypatch, url)
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


@pytest.mark.timeout(300)
def test_restarts_of_a_whole_stack(database_url: str) -> None:
    """When a worker dies too often, alerts, evidence, logs, screens and all other files contain no secret."""
    with receiving() as receiver:
        given = planted(f"{database_url}&password={PASSWORD}") | {
            # Sentry knows its own key, so that this one is searched for in all other places.
            "SENTRY_DSN": receiver.dsn.replace("publickey", KEY_OF_SENTRY),
            "BATCH_ENGINE": "simulated",
            "BATCH_LOG_LEVEL": "DEBUG",
            "BATCH_HEARTBEAT_INTERVAL_S": "0.5",
            "BATCH_CHECK_INTERVAL_S": "2",
            "BATCH_RESTART_BACKOFF_MAX_S": "1",
            "BATCH_MAX_RESTARTS_PER_HOUR": "1",
        }
        # It would take the place of the token in the file.
        del given["BATCH_TOKEN"]
        with full_stack(**given) as stack:
            stack.require_tokens()
            started = stack.script("start-all.sh")
            assert started.returncode == 0, shown(started)
            os.kill(stack.pid("worker"), signal.SIGKILL)
            until(lambda: stack.recovered(1), "the restart")
            os.kill(stack.pid("worker"), signal.SIGKILL)
            until(lambda: stack.status().gave_up, "the budget to be spent")
            until(lambda: "budget_spent" in [event["tags"]["kind"] for event in receiver.events], "the alert")
            texts = {"status and audit log": f"{stack.status()} {stack.audit()}"}
            texts |= {name: shown(stack.script(name)) for name in ("status.sh", "doctor.sh", "stop-all.sh")}
            # All but the files of tokens, which an operator makes.
            shutil.rmtree(stack.home / "keys")
            texts |= written(stack.home) | {"start-all.sh": shown(started)}
            token = stack.security["token"]
    assert "is exhausted" in texts["status.sh"]
    assert [name for name in texts if name.endswith("event.json")]
    for secret in (PASSWORD, token, KEY_OF_SENTRY):
        assert [name for name, text in texts.items() if secret in text] == []
    check_unsaid(receiver.raw.decode())
    assert token.encode() not in receiver.raw


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
    plant(monkeypatch, url)
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
