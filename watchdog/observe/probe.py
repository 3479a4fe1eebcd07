"""Probes a worker's health over grpc.health.v1, and watches it so that changes are noticed at once."""

import threading
from collections.abc import Callable

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from watchdog.policy import ProbeAnswer

CHANNEL_OPTIONS = (
    # Detect a frozen peer within about 7 s; the default ping timeout is 60 s.
    ("grpc.keepalive_time_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 2_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # By default gRPC waits a minute between pings after two without data.
    ("grpc.http2.max_pings_without_data", 0),
    # Find a port that has just opened at the next probe.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
    # Never use a proxy between two processes of one host.
    ("grpc.enable_http_proxy", 0),
)
WATCH_TIMEOUT_S = 600.0
RETRY_S = 1.0
ASK_TIMEOUT_S = 2.0

_FAILURES = {
    grpc.StatusCode.UNAVAILABLE: ProbeAnswer.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED: ProbeAnswer.DEADLINE_EXCEEDED,
}
_ANSWERS = {
    health_pb2.HealthCheckResponse.SERVING: ProbeAnswer.SERVING,
    health_pb2.HealthCheckResponse.NOT_SERVING: ProbeAnswer.NOT_SERVING,
}


class Probe:
    """Probes one address. Calls `on_change` from its own threads when the health changes or the stream breaks.

    Asks every `ask_interval_s` as well: a server with a blocked event loop keeps its streams open and answers pings, so
    that only a request detects it.
    """

    def __init__(self, address: str, on_change: Callable[[], None], ask_interval_s: float) -> None:
        self.address = address
        self._ask_interval_s = ask_interval_s
        self._on_change = on_change
        self._channel = grpc.insecure_channel(address, CHANNEL_OPTIONS)
        self._stub = health_pb2_grpc.HealthStub(self._channel)
        self._ending = threading.Event()
        self._call: grpc.Call | None = None
        # The last background check's failure, until `check` returns it or a later check succeeds.
        self._failure: ProbeAnswer | None = None
        self._threads = [
            threading.Thread(target=target, name=f"{name}-{address}", daemon=True)
            for name, target in (("watch", self._watch), ("ask", self._ask))
        ]
        for thread in self._threads:
            thread.start()

    def check(self, timeout_s: float) -> ProbeAnswer:
        """Returns the health, or how the check failed; immediately if the last background check failed."""
        failure, self._failure = self._failure, None
        return failure or self._check(timeout_s)

    def _check(self, timeout_s: float) -> ProbeAnswer:
        try:
            answer = self._stub.Check(health_pb2.HealthCheckRequest(), timeout=timeout_s)
        except grpc.RpcError as error:
            return _FAILURES.get(error.code(), ProbeAnswer.UNKNOWN)
        return _ANSWERS.get(answer.status, ProbeAnswer.UNKNOWN)

    def close(self) -> None:
        """Stops the threads and closes the channel."""
        self._ending.set()
        if self._call is not None:
            self._call.cancel()
        self._threads[0].join(RETRY_S)
        self._channel.close()

    def _ask(self) -> None:
        is_answering = True
        while not self._ending.wait(self._ask_interval_s):
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
