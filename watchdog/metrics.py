"""What the watchdog sees, for Prometheus: verdicts and budgets, and the disk on which all depends."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from prometheus_client.core import GaugeMetricFamily, Metric

from service.metrics import Scraped, one_of
from watchdog.guards import Guards
from watchdog.policy import Verdict


@dataclass(frozen=True, eq=False)
class WatchdogCollector(Scraped):
    """Reads what the guards published last. `home` is where state lives."""

    guards: Guards
    home: Path

    def collect(self) -> Iterator[Metric]:
        """Asks neither Postgres nor supervisord."""
        seen = [guard.snapshot for guard in self.guards.by_worker.values() if guard.snapshot is not None]
        verdicts = [(snapshot.worker_id, str(snapshot.decision.verdict)) for snapshot in seen]
        yield one_of("vllm_batch_verdict", "1 for the present verdict on a worker.", Verdict, "verdict", verdicts)
        gave_up = GaugeMetricFamily("vllm_batch_gave_up", "1: a person has to look.", labels=["worker_id"])
        left = GaugeMetricFamily(
            "vllm_batch_restart_budget_left", "Restarts that are left in this hour.", labels=["worker_id"]
        )
        for snapshot in seen:
            gave_up.add_metric([snapshot.worker_id], int(snapshot.gave_up))
            left.add_metric([snapshot.worker_id], snapshot.budget_left)
        yield from (gave_up, left)
        disk = shutil.disk_usage(self.home)
        yield GaugeMetricFamily("vllm_batch_home_free_bytes", "Free where BATCH_HOME is.", disk.free)
        yield GaugeMetricFamily("vllm_batch_home_size_bytes", "Size of the disk where BATCH_HOME is.", disk.total)
