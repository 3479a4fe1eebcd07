"""Prometheus gauges of the worker, read at each scrape."""

from collections.abc import Iterator
from dataclasses import dataclass

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric

from service.telemetry.metrics import Scraped
from service.worker.engine.protocol import Engine
from service.worker.runner import Runner
from service.worker.state import WorkerState


@dataclass(frozen=True, eq=False)
class WorkerCollector(Scraped):
    """Exports the window and its fill, the chunks held and the engine's steps."""

    state: WorkerState
    runner: Runner
    engine: Engine

    def collect(self) -> Iterator[Metric]:
        """Reads values that other threads write: each is consistent in itself, but not with the others."""
        identity = {"worker_id": self.state.worker_id, "incarnation": str(self.state.incarnation)}
        yield InfoMetricFamily("vllm_batch_worker", "This worker and its incarnation.", identity)
        gauges = (
            ("window_size", "Requests that the worker tries to keep in the engine.", self.engine.window),
            ("requests_in_engine", "Requests in the engine.", self.runner.in_engine),
            ("requests_held", "Requests taken from the queue whose results are not stored yet.", self.runner.queued),
            ("chunks_held", "Chunks that this worker holds under a lease.", len(self.runner.held)),
        )
        for name, about, value in gauges:
            yield GaugeMetricFamily(f"vllm_batch_{name}", about, value)
        yield CounterMetricFamily("vllm_batch_engine_steps", "Steps of the engine.", self.engine.steps)
