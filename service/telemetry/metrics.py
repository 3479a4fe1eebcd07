"""The Prometheus metrics that gateway, worker and watchdog share. All names begin with `vllm_batch_`.

Counters and histograms are updated where things happen; gauges are read on a scrape, and cost nothing until then.
vLLM registers its own, `vllm:...`, in the same registry, so that the worker exports both.
"""

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cache
from typing import Generic, TypeVar

import tenacity
from prometheus_client import REGISTRY, Counter, Histogram, start_http_server
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from service import addresses
from service.telemetry import logs

# From a lookup by key to the upload of a large file.
DURATIONS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800)

RPCS = Counter("vllm_batch_rpcs", "Finished calls, by method and gRPC code.", ["method", "code"])
RPC_DURATION = Histogram(
    "vllm_batch_rpc_duration_seconds", "Duration of calls; of a stream until its end.", ["method"], buckets=DURATIONS_S
)
DATABASE_CALL_DURATION = Histogram(
    "vllm_batch_database_call_duration_seconds",
    "Duration of calls to Postgres, including the wait for a connection, by call.",
    ["call"],
    buckets=DURATIONS_S,
)
DATABASE_CALL_ERRORS = Counter(
    "vllm_batch_database_call_errors",
    "Calls that Postgres did not answer, or not in time, by call.",
    ["call"],
)

PORT_RETRY_S = 1.0

T = TypeVar("T")

log = logs.get("metrics")


@dataclass(eq=False)
class Fresh(Generic[T]):
    """What `take` returned, `fresh_s` old at most, however many scrapers there are; None if it raised one of `away`."""

    take: Callable[[], T]
    away: tuple[type[Exception], ...]
    fresh_s: float
    monotonic: Callable[[], float] = time.monotonic
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _found: T | None = None
    _taken_s: float = float("-inf")

    def get(self) -> T | None:
        """Takes it again if it is too old. For any thread."""
        with self._lock:
            if self.monotonic() - self._taken_s > self.fresh_s:
                try:
                    self._found = self.take()
                except self.away:
                    self._found = None
                self._taken_s = self.monotonic()
            return self._found


class Scraped(Collector):
    """Gauges that are read only when scraped."""

    def describe(self) -> Iterable[Metric]:
        """Empty; without this method prometheus_client would collect once to learn the names."""
        return ()


def serve(host: str, port: int, *collectors: Scraped) -> None:
    """Serves `/metrics` from a thread; port 0: no metrics. Logs a port that cannot be bound and keeps trying: the
    process works without metrics, and an earlier life of it may still hold the port."""
    if not port:
        return
    for collector in collectors:
        REGISTRY.register(collector)
    threading.Thread(target=_serve, args=(host, port), name="metrics", daemon=True).start()


def _serve(host: str, port: int) -> None:
    def tell(state: tenacity.RetryCallState) -> None:
        if state.attempt_number == 1 and state.outcome is not None:
            log.warning("metrics_not_served", host=host, port=port, cause=str(state.outcome.exception()))

    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception_type(OSError), wait=tenacity.wait_fixed(PORT_RETRY_S), before_sleep=tell
    )
    retrying(start_http_server, port, addresses.bare(host))
    log.info("metrics_served", host=host, port=port)


def rpc_ended(method: str, code: str, duration_s: float) -> None:
    """Counts a finished call. `method` is `/package.Service/Method`; the metrics show its last part."""
    count, duration = _of_rpc(method, code)
    count.inc()
    duration.observe(duration_s)


# Bounded: our methods × gRPC codes. Calls to unknown methods are not counted.
@cache
def _of_rpc(method: str, code: str) -> tuple[Counter, Histogram]:
    name = method.rpartition("/")[2]
    return RPCS.labels(name, code), RPC_DURATION.labels(name)


@contextmanager
def database_call(name: str, failure: type[Exception]) -> Iterator[None]:
    """Measures a call to Postgres; counts it as an error if it raises `failure`."""
    began_s = time.perf_counter()
    try:
        yield
    except failure:
        DATABASE_CALL_ERRORS.labels(name).inc()
        raise
    finally:
        DATABASE_CALL_DURATION.labels(name).observe(time.perf_counter() - began_s)


def one_of(name: str, about: str, states: type[StrEnum], label: str, now: Iterable[tuple[str, str]]) -> Metric:
    """A gauge for each state of each worker: 1 for the current one. `now` pairs worker ids with their states."""
    gauge = GaugeMetricFamily(name, about, labels=["worker_id", label])
    for worker_id, present in now:
        for state in states:
            gauge.add_metric([worker_id, str(state)], float(state == present))
    return gauge
