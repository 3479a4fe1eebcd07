"""What Sentry gets, by the real SDK, at a receiver of our own."""

import gzip
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from pydantic import SecretStr

from service.config import Settings
from tests.waiting import until
from watchdog.alerts import Alerts


class Receiver(ThreadingHTTPServer):
    """Takes envelopes as Sentry does, and keeps their events."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.events: list[dict[str, Any]] = []
        self.raw = b""

    @property
    def dsn(self) -> str:
        return f"http://publickey@127.0.0.1:{self.server_port}/1"


class Handler(BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        body = gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body
        self.server.raw += body
        items = [json.loads(line) for line in body.splitlines() if line.startswith(b"{")]
        self.server.events += [item for item in items if "fingerprint" in item]
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_an_alert_arrives_whole(receiver: Receiver) -> None:
    """Level, environment, cause for grouping, evidence and timings arrive; settings and variables do not."""
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


def test_no_dsn_no_traffic() -> None:
    """Without a DSN nothing is sent, and nothing fails."""
    alerts = Alerts(Settings())
    assert alerts._client.transport is None
    alerts.tell("budget_spent", "CRASHED", "w", "fatal", "gave up", {})
    alerts.close()
