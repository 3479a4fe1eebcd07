"""Metrics for Prometheus: what gateway, worker and watchdog have in common. All names begin with `vllm_batch_`.

Counters and histograms are updated where the thing happens; gauges are read when somebody scrapes, and cost nothing
until then. vLLM registers its own, `vllm:...`, with the same registry, so that the worker exports both.
"""

import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from functools import cache

import tenacity
from prometheus_client import REGISTRY, Counter, Histogram, start_http_server
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from service import logs

# From a read by key to the upload of a large file.
DURATIONS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800)

RPCS = Counter("vllm_batch_rpcs", "Calls that have ended, by method and gRPC code.", ["method", "code"])
RPC_DURATION = Histogram(
    "vllm_batch_rpc_duration_seconds", "How long calls took; streams until their end.", ["method"], buckets=DURATIONS_S
)
DATABASE_CALL_DURATION = Histogram(
    "vllm_batch_database_call_duration_seconds",
    "How long calls to Postgres took, waiting for a connection included, by what was called.",
    ["call"],
    buckets=DURATIONS_S,
)
DATABASE_CALL_ERRORS = Counter(
    "vllm_batch_database_call_errors",
    "Calls that Postgres did not answer in time or at all, by what was called.",
    ["call"],
)

PORT_RETRY_S = 1.0

log = logs.get("metrics")


class Scraped(Collector):
    """Gauges that are read when somebody scrapes, and not before."""

    def describe(self) -> Iterable[Metric]:
        """Nothing, or prometheus_client would collect once to know the names."""
        return ()


def serve(host: str, port: int, *collectors: Scraped) -> None:
    """Answers scrapes of `/metrics` in a thread. Port 0: no metrics. One that cannot be had is logged, and asked for
    again and again: work goes on without metrics, and an earlier life of this process may have it yet."""
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
    retrying(start_http_server, port, host)
    log.info("metrics_served", host=host, port=port)


def rpc_ended(method: str, code: str, duration_s: float) -> None:
    """Counts a call; `method` as `/package.Service/Method`, of which the last part is told."""
    count, duration = _of_rpc(method, code)
    count.inc()
    duration.observe(duration_s)


# As many as there are methods of ours and codes of gRPC: what no method has is not counted.
@cache
def _of_rpc(method: str, code: str) -> tuple[Counter, Histogram]:
    name = method.rpartition("/")[2]
    return RPCS.labels(name, code), RPC_DURATION.labels(name)


@contextmanager
def database_call(name: str, failures: tuple[type[Exception], ...]) -> Iterator[None]:
    """Measures a call to Postgres; `failures` are the errors that say that it is away."""
    began_s = time.perf_counter()
    try:
        yield
    except failures:
        DATABASE_CALL_ERRORS.labels(name).inc()
        raise
    finally:
        DATABASE_CALL_DURATION.labels(name).observe(time.perf_counter() - began_s)


def one_of(name: str, about: str, states: type[StrEnum], label: str, now: Iterable[tuple[str, str]]) -> Metric:
    """A gauge for each state of each worker, of which the present one is 1; `now` has worker ids with their states."""
    gauge = GaugeMetricFamily(name, about, labels=["worker_id", label])
    for worker_id, present in now:
        for state in states:
            gauge.add_metric([worker_id, str(state)], float(state == present))
    return gauge
