"""What the gateway knows of all, for Prometheus: workers as their heartbeats tell, batches as Postgres has them."""

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

import peewee
from prometheus_client.core import GaugeMetricFamily, Metric

from service.db import survey
from service.db.connection import Database, Unreachable
from service.db.heartbeats import Phase
from service.db.survey import Survey
from service.errors import ApiError
from service.gateway.presence import Presence
from service.metrics import Scraped, one_of

# However many scrape, Postgres is asked no more often than this.
FRESH_S = 5.0
# Prometheus waits 10 s for an answer.
TIMEOUT_S = 2.0
STATES = ("in_progress", "cancelling", "completed", "failed", "expired", "cancelled")


@dataclass(eq=False)
class GatewayCollector(Scraped):
    """`database` is for this alone, with a short timeout. Without Postgres there is only what is known without it."""

    presence: Presence
    database: Database
    lease_s: float
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _survey: Survey | None = None
    _taken_s: float = float("-inf")

    def collect(self) -> Iterator[Metric]:
        """Workers without any query, batches with one every few seconds at most."""
        yield from self._workers()
        found = self._look()
        yield GaugeMetricFamily("vllm_batch_database_up", "1: Postgres answers.", int(found is not None))
        if found is not None:
            yield from _batches(found)

    def _workers(self) -> Iterator[Metric]:
        try:
            self.presence.live(frozenset())
            is_accepting = True
        except ApiError:
            is_accepting = False
        yield GaugeMetricFamily("vllm_batch_accepting", "1: new work is accepted now.", int(is_accepting))
        freshness, now_s = self.presence.freshness, self.presence.clock.monotonic()
        ages = GaugeMetricFamily(
            "vllm_batch_heartbeat_age_seconds", "Since the last heartbeat of a worker.", labels=["worker_id"]
        )
        for seen in freshness.beats:
            ages.add_metric([seen.beat.worker_id], freshness.age_s(seen, now_s))
        yield ages
        phases = [(seen.beat.worker_id, seen.beat.phase) for seen in freshness.beats]
        yield one_of("vllm_batch_worker_phase", "1 for the phase a worker last said.", Phase, "phase", phases)

    def _look(self) -> Survey | None:
        with self._lock:
            now_s = self.presence.clock.monotonic()
            if now_s - self._taken_s > FRESH_S:
                try:
                    self._survey = self.database.call(survey.take, self.lease_s)
                except (*Unreachable, peewee.ProgrammingError):
                    # A schema that is not there yet is as good as no database.
                    self._survey = None
                self._taken_s = self.presence.clock.monotonic()
            return self._survey


def _batches(found: Survey) -> Iterator[Metric]:
    batches = GaugeMetricFamily("vllm_batch_batches", "Batches, by state.", labels=["state"])
    for state in STATES:
        batches.add_metric([state], found.batches.get(state, 0))
    yield batches
    requests = GaugeMetricFamily(
        "vllm_batch_requests", "Requests of batches in progress without a result: queued, or leased.", labels=["state"]
    )
    requests.add_metric(["queued"], found.queued)
    requests.add_metric(["leased"], found.leased)
    yield requests
    yield GaugeMetricFamily(
        "vllm_batch_queue_age_seconds",
        "Since the oldest batch was created of which nothing has gone to a worker.",
        found.queue_age_s,
    )
    yield GaugeMetricFamily(
        "vllm_batch_lease_age_seconds", "Since the renewal of the lease renewed longest ago.", found.lease_age_s
    )
