"""A local HTTP server that receives webhooks, and answers as a test asks for."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from openai import OpenAI
from openai.types.webhooks import UnwrapWebhookEvent

from tests.support.waiting import until

SECRET = "whsec_" + "c2VjcmV0IG9mIHRoZSB0ZXN0cywgbm90aGluZyBtb3Jl"


@dataclass(frozen=True)
class Received:
    """One request."""

    path: str
    headers: dict[str, str]
    body: str

    @property
    def id(self) -> str:
        return self.headers["webhook-id"]

    def event(self, secret: str = SECRET) -> UnwrapWebhookEvent:
        """The event, as the openai package reads it. Raises openai.InvalidWebhookSignatureError."""
        client = OpenAI(api_key="none", webhook_secret=secret)
        return client.webhooks.unwrap(self.body, self.headers)


class WebhookReceiver(ThreadingHTTPServer):
    """Keeps what it receives. `answer(request)` gives the status; None: the connection is closed without one."""

    daemon_threads = True

    def __init__(self, port: int = 0) -> None:
        self.received: list[Received] = []
        self.answer: Callable[[Received], int | None] = lambda _: 204
        super().__init__(("127.0.0.1", port), _Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/hook"

    def of(self, batch: str) -> list[Received]:
        """What it received about a batch."""
        return [one for one in self.received if f'"{batch}"' in one.body]

    def wait(self, batch: str, count: int = 1) -> list[Received]:
        """Waits for so many requests about a batch."""
        return until(
            lambda: (found := self.of(batch)) if len(self.of(batch)) >= count else None, f"webhooks of {batch}"
        )  # type: ignore[return-value]


class _Handler(BaseHTTPRequestHandler):
    server: WebhookReceiver

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        request = Received(self.path, {name.lower(): value for name, value in self.headers.items()}, body)
        self.server.received.append(request)
        status = self.server.answer(request)
        if status is None:
            self.close_connection = True
            return
        self.send_response(status)
        if 300 <= status < 400:
            self.send_header("Location", "/elsewhere")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def receiving(port: int = 0) -> Iterator[WebhookReceiver]:
    """Runs a receiver."""
    with WebhookReceiver(port) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        yield server
        server.shutdown()
