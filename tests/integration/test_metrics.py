"""Metrics of a whole stack after work and a recovery; dashboard, alert rules and docs name what it exports."""

import json
import os
import re
import signal
import socket
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import promql_parser
import pytest
import yaml
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from tests.support.batches import lines
from tests.support.ports import free_port
from tests.support.servers import Stack
from tests.support.stacks import ROOT, full_stack
from tests.support.waiting import until
from vllm_batch import CallError, Client

pytestmark = pytest.mark.timeout(240)
CONF = ROOT / "conf"


def scrape(port: int) -> list[Sample]:
    """All samples that a process exports."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        families = text_string_to_metric_families(answer.read().decode())
        return [sample for family in families for sample in family.samples]


@dataclass
class Scraped:
    """What gateway, worker, watchdog and OpenAI's API exported."""

    by_process: dict[str, list[Sample]]

    @property
    def samples(self) -> list[Sample]:
        return [sample for samples in self.by_process.values() for sample in samples]

    def value(self, process: str, name: str, **labels: str) -> float:
        """The sum over all samples with these labels."""
        found = [s for s in self.by_process[process] if s.name == name and labels.items() <= s.labels.items()]
        assert found, f"{process} exports no {name} with {labels}"
        return sum(sample.value for sample in found)


@pytest.fixture(scope="module")
def scraped() -> Iterator[Scraped]:
    """The metrics of a stack that answered 30 requests, rejected a batch, and restarted a killed worker.

    Another host of its fleet, `gone`, is lost.
    """
    ports = {name: free_port() for name in ("GATEWAY", "WORKER", "WATCHDOG", "HTTP")}
    settings = {f"BATCH_{name}_METRICS_PORT": str(port) for name, port in ports.items()}
    with full_stack(BATCH_ENGINE="simulated", BATCH_HEARTBEAT_INTERVAL_S="1", **settings) as stack:
        stack.start_all()
        stack.sql(
            "INSERT INTO watchdogs (watchdog_id, pid, start_time, last_seen)"
            " VALUES ('gone', 1, now(), now() - interval '5 minutes')"
        )
        os.kill(stack.pid("worker"), signal.SIGKILL)
        until(lambda: stack.recovered(1), "the worker to be recovered")
        with Client(stack.target) as client:
            batch = client.submit_lines(lines(30))
            assert len(list(client.results(batch.id, follow=True))) == 30
            with pytest.raises(CallError):
                client.submit_lines(["not JSON"])
        with OpenAI(base_url=f"http://127.0.0.1:{stack.http_port}/v1", api_key="none") as door:
            door.files.create(file=("a", b"{}"), purpose="batch")
        lost = "vllm_batch_lost_age_seconds"
        until(lambda: any(one.name == lost for one in scrape(ports["WATCHDOG"])), "the watchdog to look around")
        yield Scraped({name.lower(): scrape(port) for name, port in ports.items()})


@pytest.mark.thorough
def test_files_are_counted(scraped: Scraped) -> None:
    """OpenAI's door counts its calls, files and their bytes."""
    assert scraped.value("http", "vllm_batch_rpcs_total", method="CreateFile", code="OK") == 1
    assert scraped.value("http", "vllm_batch_files") == 1
    assert scraped.value("http", "vllm_batch_file_bytes") == 2


def test_work_is_counted(scraped: Scraped) -> None:
    """The worker counts results, tokens and calls and exports its window; the gateway counts batches and calls."""
    assert scraped.value("worker", "vllm_batch_results_total", outcome="completed") == 30
    assert scraped.value("worker", "vllm_batch_tokens_total", kind="completion") > 0
    assert scraped.value("worker", "vllm_batch_request_duration_seconds_count") == 30
    assert scraped.value("worker", "vllm_batch_window_size") == 256
    assert scraped.value("gateway", "vllm_batch_batches", state="completed") == 1
    assert scraped.value("gateway", "vllm_batch_tenant_tokens_total", tenant="default", kind="completion") > 0
    assert scraped.value("gateway", "vllm_batch_accepting") == 1
    assert scraped.value("gateway", "vllm_batch_worker_phase", phase="ready") == 1
    assert scraped.value("gateway", "vllm_batch_rpcs_total", method="UploadBatch", code="OK") == 1
    assert scraped.value("gateway", "vllm_batch_rpcs_total", method="UploadBatch", code="INVALID_ARGUMENT") == 1
    assert scraped.value("worker", "vllm_batch_rpcs_total", method="UploadBatch", code="INVALID_ARGUMENT") == 1
    assert scraped.value("worker", "vllm_batch_database_call_duration_seconds_count", call="write") > 0


def test_recovery_is_counted(scraped: Scraped) -> None:
    """The watchdog counts the restart and its phases, and exports verdict and budget."""
    assert scraped.value("watchdog", "vllm_batch_restarts_total", outcome="recovered") == 1
    assert scraped.value("watchdog", "vllm_batch_restarts_total", outcome="failed") == 0
    assert scraped.value("watchdog", "vllm_batch_restart_phase_duration_seconds_count", phase="load") == 1
    worker, gateway = (f"{socket.gethostname()}:{name}" for name in ("worker", "gateway"))
    assert scraped.value("watchdog", "vllm_batch_verdict", worker_id=worker, verdict="HEALTHY") == 1
    assert scraped.value("watchdog", "vllm_batch_verdict", worker_id=worker, verdict="CRASHED") == 0
    assert scraped.value("watchdog", "vllm_batch_restart_budget_left", worker_id=worker) == 9
    assert scraped.value("watchdog", "vllm_batch_restart_budget_left", worker_id=gateway) == 10
    assert scraped.value("watchdog", "vllm_batch_rpcs_total", method="ListEvents", code="OK") > 0


def test_others_export_what_is_lost(scraped: Scraped) -> None:
    """Gateway and watchdog count the hosts, and export how long one that is gone has not been seen."""
    for process in ("gateway", "watchdog"):
        assert scraped.value(process, "vllm_batch_hosts", state="alive") == 1
        assert scraped.value(process, "vllm_batch_hosts", state="lost") == 1
        assert scraped.value(process, "vllm_batch_lost_age_seconds", kind="host", subject="gone") >= 300


def expressions() -> dict[str, str]:
    """Every query of the dashboard and condition of an alert, by location."""
    dashboard = json.loads((CONF / "grafana-dashboard.json").read_text())
    found = {}
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            found[f"panel {panel['title']!r} {target['refId']}"] = target["expr"].replace("$__rate_interval", "5m")
    for group in yaml.safe_load((CONF / "alert-rules.yml").read_text())["groups"]:
        for rule in group["rules"]:
            found[f"alert {rule['alert']}"] = rule["expr"]
    return found


def parts(expression: str) -> tuple[set[str], set[str]]:
    """The metric names and labels in a query, found by a parser for PromQL."""
    metrics, labels = set(), set()

    def look(node: object) -> bool:
        if isinstance(node, promql_parser.VectorSelector):
            metrics.add(node.name)
        if isinstance(node, promql_parser.AggregateExpr) and node.modifier is not None:
            labels.update(node.modifier.labels)
        return True

    promql_parser.walk(promql_parser.parse(expression), look)
    return metrics, labels


@pytest.mark.parametrize("place", expressions())
def test_dashboard_and_alerts_ask_for_what_there_is(scraped: Scraped, place: str) -> None:
    """Every metric and label that a panel or alert queries is exported. vLLM's own: tests/e2e."""
    metrics, labels = parts(expressions()[place])
    assert metrics
    ours = {name for name in metrics if not name.startswith("vllm:")}
    assert ours <= {sample.name for sample in scraped.samples}
    known = {label for sample in scraped.samples if sample.name in metrics for label in sample.labels}
    assert not ours or labels <= known | {"job", "instance"}


def test_every_alert_says_how_loud_it_is() -> None:
    """Every alert has a severity and a description, and none pages before its condition has lasted for some time."""
    for group in yaml.safe_load((CONF / "alert-rules.yml").read_text())["groups"]:
        for rule in group["rules"]:
            assert rule["labels"]["severity"] in ("page", "ticket")
            assert "for" in rule or rule["labels"]["severity"] == "ticket"
            assert {"summary", "description"} <= rule["annotations"].keys()


def test_docs_have_every_metric(scraped: Scraped) -> None:
    """The table in the docs lists exactly the metrics that are exported."""
    told = set(re.findall(r"^\| `(vllm_batch_\w+)", (ROOT / "docs/observability.md").read_text(), re.MULTILINE))
    exported = {s.name for s in scraped.samples if s.name.startswith("vllm_batch_") and not s.name.endswith("_created")}
    assert {re.sub(r"_(bucket|sum|count)$", "", name) for name in exported} == told


def test_metrics_without_a_database(stack: Stack, tmp_path: Path) -> None:
    """While Postgres is away the gateway still answers scrapes, and exports that the database is down."""
    port = free_port()
    stack.database_url = f"postgresql:///x?host={tmp_path}"
    stack.gateway(gateway_metrics_port=port, database_timeout_s=1)

    def answer() -> dict[str, float]:
        try:
            return {sample.name: sample.value for sample in scrape(port)}
        except OSError:
            return {}

    values = until(answer, "the gateway to answer a scrape")
    assert (values["vllm_batch_database_up"], values["vllm_batch_accepting"]) == (0, 0)
    assert "vllm_batch_batches" not in values


@pytest.mark.thorough
def test_taken_port_does_not_keep_it_from_working(stack: Stack) -> None:
    """If the metrics port is taken, the process serves without metrics and logs it, and serves them once it is free."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = other.getsockname()[1]
        stack.worker()
        gateway = stack.gateway(gateway_metrics_port=taken)
        stack.wait_until_accepting()
        assert gateway.events("metrics_not_served")[0]["port"] == taken
    until(lambda: gateway.events("metrics_served"), "metrics to be served")
    assert len(gateway.events("metrics_not_served")) == 1
