"""Prometheus metrics about hosts, which gateways and watchdogs export: what is gone cannot report itself."""

from collections.abc import Iterator

from prometheus_client.core import GaugeMetricFamily, Metric

from service.db.hosts import State, Survey


def host_metrics(found: Survey) -> Iterator[Metric]:
    """How many hosts there are, and what was lost last: at most MOST_LOST labels, however many hosts are gone."""
    count = GaugeMetricFamily("vllm_batch_hosts", "Hosts, by state.", labels=["state"])
    for state in State:
        count.add_metric([state], found.counts.get(state, 0))
    yield count
    yield GaugeMetricFamily("vllm_batch_hosts_draining", "Hosts that are there and ordered to drain.", found.draining)
    lost = GaugeMetricFamily(
        "vllm_batch_lost_age_seconds",
        "Since a host, a watchdog or the last host of a model, which are gone, was last seen.",
        labels=["kind", "subject"],
    )
    for loss in found.lost:
        lost.add_metric([loss.kind, loss.subject], loss.age_s)
    yield lost
