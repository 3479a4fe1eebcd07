"""The health of a worker by grpc.health.v1: asked for, and watched so that a change is noticed at once."""

import threading
from collections.abc import Callable

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from watchdog.policy import Health

CHANNEL_OPTIONS = (
    # A frozen peer is noticed within about 7 s; keepalive alone takes its 60 s default.
    ("grpc.keepalive_time_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 2_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # After two pings without data gRPC would wait for a minute between them.
    ("grpc.http2.max_pings_without_data", 0),
    # A port that has just opened is found at the next probe.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
    # A proxy from the environment has no business between two processes of one host.
    ("grpc.enable_http_proxy", 0),
)
WATCH_TIMEOUT_S = 600.0
RETRY_S = 1.0
# A server whose event loop is blocked keeps its streams open and answers pings: only a question finds it out.
ASK_INTERVAL_S = 1.5
ASK_TIMEOUT_S = 2.0

_FAILURES = {
    grpc.StatusCode.UNAVAILABLE: Health.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED: Health.DEADLINE_EXCEEDED,
}
_ANSWERS = {
    health_pb2.HealthCheckResponse.SERVING: Health.SERVING,
    health_pb2.HealthCheckResponse.NOT_SERVING: Health.NOT_SERVING,
}


class Probe:
    """Asks one address, and calls `on_change` from threads of its own when the health there changes or breaks off."""

    def __init__(self, address: str, on_change: Callable[[], None]) -> None:
        self.address = address
        self._on_change = on_change
        self._channel = grpc.insecure_channel(address, CHANNEL_OPTIONS)
        self._stub = health_pb2_grpc.HealthStub(self._channel)
        self._ending = threading.Event()
        self._call: grpc.Call | None = None
        # How a question of ours has just failed, until `check` has told it or another was answered.
        self._failure: Health | None = None
        self._threads = [
            threading.Thread(target=target, name=f"{name}-{address}", daemon=True)
            for name, target in (("watch", self._watch), ("ask", self._ask))
        ]
        for thread in self._threads:
            thread.start()

    def check(self, timeout_s: float) -> Health:
        """The health now, or how the question failed; at once, if it has just failed in between."""
        failure, self._failure = self._failure, None
        return failure or self._check(timeout_s)

    def _check(self, timeout_s: float) -> Health:
        try:
            answer = self._stub.Check(health_pb2.HealthCheckRequest(), timeout=timeout_s)
        except grpc.RpcError as error:
            return _FAILURES.get(error.code(), Health.UNKNOWN)
        return _ANSWERS.get(answer.status, Health.UNKNOWN)

    def close(self) -> None:
        """Ends watching and closes the connection."""
        self._ending.set()
        if self._call is not None:
            self._call.cancel()
        self._threads[0].join(RETRY_S)
        self._channel.close()

    def _ask(self) -> None:
        is_answering = True
        while not self._ending.wait(ASK_INTERVAL_S):
            was_answering, health = is_answering, self._check(ASK_TIMEOUT_S)
            is_answering = health in _ANSWERS.values()
            if is_answering:
                self._failure = None
            elif was_answering and not self._ending.is_set():
                self._failure = health
                self._on_change()

    def _watch(self) -> None:
        last = None
        while not self._ending.is_set():
            self._call = answers = self._stub.Watch(
                health_pb2.HealthCheckRequest(), timeout=WATCH_TIMEOUT_S, wait_for_ready=True
            )
            is_overdue = False
            try:
                for answer in answers:
                    if answer.status != last and not self._ending.is_set():
                        last = answer.status
                        self._on_change()
            except grpc.RpcError as error:
                is_overdue = error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            if is_overdue or self._ending.is_set():
                continue
            if last is not None:
                last = None
                self._on_change()
            self._ending.wait(RETRY_S)
