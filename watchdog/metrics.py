"""Prometheus gauges of the watchdog: verdicts, budgets, and disk space."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from prometheus_client.core import GaugeMetricFamily, Metric

from service.db.host_metrics import host_metrics
from service.telemetry.metrics import Scraped, one_of
from watchdog.host import Host
from watchdog.neighbours import Neighbours
from watchdog.policy import Verdict


@dataclass(frozen=True, eq=False)
class WatchdogCollector(Scraped):
    """Exports what the guards published last. `home` is BATCH_HOME."""

    hosts: tuple[Host, ...]
    home: Path
    neighbours: Neighbours

    def collect(self) -> Iterator[Metric]:
        """Needs neither Postgres nor supervisord."""
        guards = [guard for host in self.hosts for guard in host.by_worker.values()]
        seen = [guard.snapshot for guard in guards if guard.snapshot is not None]
        verdicts = [(snapshot.worker_id, str(snapshot.decision.verdict)) for snapshot in seen]
        yield one_of("vllm_batch_verdict", "1 for the current verdict on a worker.", Verdict, "verdict", verdicts)
        gave_up = GaugeMetricFamily(
            "vllm_batch_gave_up", "1: the watchdog gave up; an operator has to look.", labels=["worker_id"]
        )
        left = GaugeMetricFamily("vllm_batch_restart_budget_left", "Restarts left in this hour.", labels=["worker_id"])
        for snapshot in seen:
            gave_up.add_metric([snapshot.worker_id], int(snapshot.gave_up))
            left.add_metric([snapshot.worker_id], snapshot.budget_left)
        yield from (gave_up, left)
        yield from host_metrics(self.neighbours.survey)
        disk = shutil.disk_usage(self.home)
        yield GaugeMetricFamily("vllm_batch_home_free_bytes", "Free space on the disk of BATCH_HOME.", disk.free)
        yield GaugeMetricFamily("vllm_batch_home_size_bytes", "Size of the disk of BATCH_HOME.", disk.total)
