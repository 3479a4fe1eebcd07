"""The gateway's Prometheus metrics about webhooks: deliveries from Postgres, targets that rest from memory."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from prometheus_client.core import GaugeMetricFamily, Metric

from service.db import webhooks
from service.db.availability import DATABASE_ERRORS
from service.db.connection import Database
from service.db.webhooks import Counts
from service.telemetry.metrics import Fresh, Scraped
from service.webhooks.deliverer import Deliverer


@dataclass(eq=False)
class WebhookCollector(Scraped):
    """Shares its connection with another collector. While Postgres is away, deliveries are left out."""

    deliverer: Deliverer
    database: Database
    fresh_s: float
    _counts: Fresh[Counts] = field(init=False)

    def __post_init__(self) -> None:
        monotonic = self.deliverer.signer.clock.monotonic
        self._counts = Fresh(self._count, DATABASE_ERRORS, self.fresh_s, monotonic)

    def collect(self) -> Iterator[Metric]:
        """With one query every `fresh_s` at most."""
        resting = self.deliverer.resting()
        yield GaugeMetricFamily("vllm_batch_webhook_targets_resting", "Targets that rest after failures.", resting)
        found = self._counts.get()
        if found is None:
            return
        states = GaugeMetricFamily("vllm_batch_webhooks", "Webhooks, by state.", labels=["state"])
        for state in webhooks.STATES:
            states.add_metric([state], found.states.get(state, 0))
        yield states
        yield GaugeMetricFamily(
            "vllm_batch_webhook_age_seconds", "Age of the oldest event that is not delivered yet.", found.oldest_s
        )

    def _count(self) -> Counts:
        return self.database.call(webhooks.count_webhooks)
