"""The gateway's Prometheus metrics: all workers, according to their heartbeats, and all batches, from Postgres."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from service.db import hosts, queue_stats, unserved, usage
from service.db.availability import DATABASE_ERRORS
from service.db.connection import Database
from service.db.heartbeats import Phase
from service.db.host_metrics import host_metrics
from service.db.hosts import Survey
from service.db.queue_stats import QueueStats
from service.db.usage import Usage
from service.insight.presence import Presence
from service.telemetry.metrics import Fresh, Scraped, one_of

# Postgres is queried no more often than this, however many scrapers there are.
FRESH_S = 5.0
# Prometheus waits 10 s for an answer.
TIMEOUT_S = 2.0
# So many tenants have a label of their own.
TENANTS = 20
# The label of the rest, which is no tenant's name.
OTHER = "(other)"
STATES = ("validating", "in_progress", "cancelling", "completed", "failed", "expired", "cancelled")


@dataclass(eq=False)
class GatewayCollector(Scraped):
    """`database` is used for nothing else and has a short timeout. While Postgres is away, batches are left out."""

    presence: Presence
    database: Database
    lease_s: float
    _used: "_Used" = field(default_factory=lambda: _Used())
    _stored: Fresh[tuple[QueueStats, int, Survey]] = field(init=False)

    def __post_init__(self) -> None:
        self._stored = Fresh(self._take, DATABASE_ERRORS, FRESH_S, self.presence.clock.monotonic)

    def collect(self) -> Iterator[Metric]:
        """Workers without a query, batches with one every FRESH_S at most."""
        yield from self._workers()
        found = self._stored.get()
        yield GaugeMetricFamily("vllm_batch_database_up", "1: Postgres answers.", int(found is not None))
        if found is not None:
            queue, unserved_batches, survey = found
            yield from _batches(queue)
            yield GaugeMetricFamily(
                "vllm_batch_unserved_batches", "Batches in progress whose models no worker serves.", unserved_batches
            )
            yield self._used.metric()
            yield from host_metrics(survey)

    def _workers(self) -> Iterator[Metric]:
        is_accepting = self.presence.refusal() is None
        yield GaugeMetricFamily("vllm_batch_accepting", "1: new work is accepted.", int(is_accepting))
        freshness, now_s = self.presence.freshness, self.presence.clock.monotonic()
        ages = GaugeMetricFamily(
            "vllm_batch_heartbeat_age_seconds", "Age of a worker's last heartbeat.", labels=["worker_id"]
        )
        # Of those that are there: else a worker that is gone for good would look ready for ever.
        alive = [seen for seen in freshness.beats if freshness.age_s(seen, now_s) <= self.presence.timeout_s]
        for seen in alive:
            ages.add_metric([seen.beat.worker_id], freshness.age_s(seen, now_s))
        yield ages
        phases = [(seen.beat.worker_id, seen.beat.phase) for seen in alive]
        yield one_of("vllm_batch_worker_phase", "1 for the phase that a worker last reported.", Phase, "phase", phases)

    def _take(self) -> tuple[QueueStats, int, Survey]:
        queue = self.database.call(queue_stats.take, self.lease_s)
        waiting = self.database.call(unserved.find, self.presence.is_unserved)
        self._used.take(self.database.call(usage.take))
        survey = self.database.call(hosts.survey, self.presence.timeout_s)
        return queue, sum(len(one.batches) for one in waiting), survey


class _Used:
    """Tokens used by tenants: a label for each of the TENANTS that have used most, and one for the others."""

    def __init__(self) -> None:
        self._named: dict[str, tuple[int, int]] = {}
        self._others = (0, 0)

    def take(self, found: Sequence[Usage]) -> None:
        """Stores what was found."""
        most = sorted(found, key=lambda each: (-each.prompt_tokens - each.completion_tokens, each.tenant))
        self._named = {each.tenant: (each.prompt_tokens, each.completion_tokens) for each in most[:TENANTS]}
        others = most[TENANTS:]
        # A counter that falls looks like one that began anew: when tenants change places, the others' waits.
        self._others = (
            max(self._others[0], sum(each.prompt_tokens for each in others)),
            max(self._others[1], sum(each.completion_tokens for each in others)),
        )

    def metric(self) -> Metric:
        """The counter."""
        metric = CounterMetricFamily(
            "vllm_batch_tenant_tokens", "Tokens used, by tenant: prompt or completion.", labels=["tenant", "kind"]
        )
        for name, (prompt, completion) in [*self._named.items(), (OTHER, self._others)]:
            metric.add_metric([name, "prompt"], prompt)
            metric.add_metric([name, "completion"], completion)
        return metric


def _batches(found: QueueStats) -> Iterator[Metric]:
    batches = GaugeMetricFamily("vllm_batch_batches", "Batches, by state.", labels=["state"])
    for state in STATES:
        batches.add_metric([state], found.batches.get(state, 0))
    yield batches
    requests = GaugeMetricFamily(
        "vllm_batch_requests", "Unfinished requests of batches in progress: queued or leased.", labels=["state"]
    )
    requests.add_metric(["queued"], found.queued)
    requests.add_metric(["leased"], found.leased)
    yield requests
    yield GaugeMetricFamily(
        "vllm_batch_queue_age_seconds",
        "Age of the oldest batch that no worker has started.",
        found.queue_age_s,
    )
    yield GaugeMetricFamily(
        "vllm_batch_lease_age_seconds", "Time since the renewal of the least recently renewed lease.", found.lease_age_s
    )
