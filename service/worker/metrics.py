"""What the worker holds, for Prometheus: read when somebody scrapes."""

from collections.abc import Iterator
from dataclasses import dataclass

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric

from service.metrics import Scraped
from service.worker.engine import Engine
from service.worker.life import Life
from service.worker.runner import Runner


@dataclass(frozen=True, eq=False)
class WorkerCollector(Scraped):
    """The window and its fill, the chunks held, the engine's steps."""

    life: Life
    runner: Runner
    engine: Engine

    def collect(self) -> Iterator[Metric]:
        """Reads what other threads write; each number is whole, and together they may be a moment apart."""
        identity = {"worker_id": self.life.worker_id, "incarnation": str(self.life.incarnation)}
        yield InfoMetricFamily("vllm_batch_worker", "Which worker this is, in which life.", identity)
        gauges = (
            ("window_size", "How many requests the worker keeps in the engine.", self.engine.window),
            ("requests_in_engine", "Requests in the engine.", self.runner.in_engine),
            ("requests_held", "Requests taken from the queue and not stored yet.", self.runner.queued),
            ("chunks_held", "Chunks under a lease of this worker.", len(self.runner.held)),
        )
        for name, about, value in gauges:
            yield GaugeMetricFamily(f"vllm_batch_{name}", about, value)
        yield CounterMetricFamily("vllm_batch_engine_steps", "Steps of the engine.", self.engine.steps)
