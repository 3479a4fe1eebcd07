"""What Sentry receives: the real SDK sends to a local receiver."""

from collections.abc import Iterator

import pytest
from pydantic import SecretStr

from service.config import Settings
from tests.support.sentry_receiver import Receiver, receiving
from tests.support.waiting import until
from watchdog.alerts import Alerts


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    """A local stand-in for Sentry."""
    with receiving() as server:
        yield server


def test_an_alert_arrives_whole(receiver: Receiver) -> None:
    """An alert carries level, environment, fingerprint, evidence and timings, but no secrets from the settings."""
    secret = "postgresql://user:hunter2@db/batch"
    settings = Settings(sentry_dsn=SecretStr(receiver.dsn), environment="staging", database_url=SecretStr(secret))
    alerts = Alerts(settings)
    told = {"event": 7, "timings": {"load": 23.5}, "evidence": {"health": "UNAVAILABLE"}}
    alerts.tell("worker_recovered", "FROZEN", "host:worker", "warning", "host:worker: recovered", told)
    until(lambda: receiver.events, "the event")
    [event] = receiver.events
    assert (event["level"], event["environment"], event["fingerprint"]) == (
        "warning",
        "staging",
        ["worker_recovered", "FROZEN"],
    )
    assert event["contexts"]["recovery"] == told
    assert event["tags"] == {"kind": "worker_recovered", "cause": "FROZEN", "worker_id": "host:worker"}
    assert b"hunter2" not in receiver.raw
    assert not {"server_name", "modules", "extra", "user"} & {name for name, value in event.items() if value}
    alerts.close()


def test_a_fault_of_ours_tells_where_and_not_what(receiver: Receiver) -> None:
    """A watchdog error is reported with its location but without its text, which may hold secrets."""
    alerts = Alerts(Settings(sentry_dsn=SecretStr(receiver.dsn)))
    try:
        raise ValueError("invalid dsn: hunter2")
    except ValueError as error:
        alerts.fault("guard-host:worker", error)
    until(lambda: receiver.events, "the event")
    [event] = receiver.events
    assert event["fingerprint"] == ["watchdog_error", "ValueError"]
    assert "test_a_fault_of_ours" in event["contexts"]["recovery"]["frames"][0]
    assert b"hunter2" not in receiver.raw
    alerts.close()


def test_no_dsn_no_traffic() -> None:
    """Without a DSN nothing is sent and nothing fails."""
    alerts = Alerts(Settings())
    assert alerts._client is None
    alerts.tell("budget_spent", "CRASHED", "w", "fatal", "gave up", {})
    alerts.close()
