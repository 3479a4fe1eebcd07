"""Compares documents, contract, alert rules and example settings with the constants in the code."""

import ast
import configparser
import importlib.util
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from benchmarks import run as benchmark
from benchmarks.lib import page
from service import config, errors
from service.api import error_kinds, messages, watching
from service.api import servicer as api
from service.auth import roles
from service.config import Settings
from service.db import failures, heartbeats, recoveries, results, run_order, webhooks
from service.embedded_postgres import SETTINGS as POSTGRES
from service.gateway import __main__ as gateway
from service.gateway import metrics as gateway_metrics
from service.gateway import unserved_log, upload
from service.http import certified
from service.http.page import live
from service.insight import estimate, links, routing, waiting
from service.rpc import ports, rate_limit
from service.rpc import server as rpc
from service.webhooks import deliverer, sender
from service.webhooks import retries as webhook_retries
from service.worker import (
    estimates,
    intake,
    lines,
    prefixes,
    progress,
    pulse,
    result_writer,
    runner,
    sharing,
    survey,
    suspects,
    wakeup,
)
from service.worker.engine import vllm
from vllm_batch import channel, retries
from vllm_batch.cli import main as command_line
from vllm_batch.cli import terminal
from watchdog import __main__ as watchdog
from watchdog import outages, wiring
from watchdog.act import evidence_folder, restart
from watchdog.observe import probe, stall_detector
from watchdog.policy import Limits, Verdict

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
# What people read and act on: pages, and the comments in files that they are told to edit or run.
TEXTS = [
    *PAGES,
    *sorted(path for path in (ROOT / "conf").iterdir() if path.suffix != ".json"),
    *sorted((ROOT / "proto").rglob("*.proto")),
]
# Lists what was, not what is.
HISTORY = ROOT / "CHANGELOG.md"
LIMITS = Limits()
# As the texts spell them.
COUNT = {2: "two", 3: "three", 4: "four", 5: "five"}
TIMES = {2: "twice"}
FRACTION = {0.5: "half"}
QUOTIENT = {4: "quarter"}


def default(name: str) -> Any:
    """The default of a setting."""
    return Settings.model_fields[name].default


@cache
def words(name: str) -> str:
    """A text on one line, so that line breaks do not matter."""
    text = (ROOT / name).read_text()
    return re.sub(r"\s+", " ", re.sub(r"^\s*//", "", text, flags=re.MULTILINE))


def kib(size: int) -> str:
    return f"{size >> 10} KiB"


def mib(size: int) -> str:
    return f"{size >> 20} MiB"


def option(options: Any, name: str) -> Any:
    """The value of one option of a gRPC server or channel."""
    return dict(options)[name]


def ping_s(options: Any) -> float:
    """How often a channel or server pings."""
    return float(option(options, "grpc.keepalive_time_ms") / 1000)


PAGE = (
    f"up to about {kib(api.PAGE_BYTES)}, as lines up to about {kib(api.LINES_BYTES)}, and at most {results.STRETCH:,}"
)
# What each text says, with the numbers taken from the code.
STATEMENTS = [
    ("proto/vllm_batch/v1/batch_service.proto", PAGE),
    ("proto/vllm_batch/v1/batch_service.proto", f"At most {messages.MAX_REQUEST_ID} characters"),
    (
        "proto/vllm_batch/v1/batch_service.proto",
        f"Up to {messages.MAX_METADATA} pairs, with keys of up to {messages.MAX_METADATA_KEY}"
        f" and values of up to {messages.MAX_METADATA_VALUE} characters",
    ),
    ("proto/vllm_batch/v1/batch_service.proto", f"at most {messages.MAX_WINDOW_S / 86_400:.0f} days"),
    ("proto/vllm_batch/v1/batch_service.proto", f"1 to {lines.MAX_CUSTOM_ID} characters"),
    (
        "proto/vllm_batch/v1/batch_service.proto",
        f"`line N: field` for a line of a batch; up to {errors.MAX_VIOLATIONS}",
    ),
    ("README.md", f"at most {default('max_restarts_per_hour')} times an hour"),
    ("README.md", f"heartbeat every {default('heartbeat_interval_s')} s"),
    ("README.md", f"gateway :{default('gateway_port')}"),
    ("README.md", f"worker :{default('worker_port')}"),
    ("README.md", f"watchdog :{default('watchdog_port')}"),
    ("docs/capacity.md", f"`BATCH_RETENTION_S` ({default('retention_s') / 86_400:.0f} days)"),
    ("docs/capacity.md", f"`max_wal_size` ({POSTGRES['max_wal_size'].removesuffix('GB')} GB)"),
    ("docs/capacity.md", f"The embedded server takes {POSTGRES['max_connections']}:"),
    ("docs/capacity.md", f"one row per worker every {default('heartbeat_interval_s')} s"),
    ("docs/client.md", f"`patience_s` ({retries.PATIENCE_S:.0f} s)"),
    ("docs/client.md", f"(up to {errors.MAX_VIOLATIONS})"),
    ("docs/client.md", f"up to {messages.MAX_WINDOW_S / 86_400:.0f} days"),
    ("docs/durability.md", f"{mib(intake.STAGE_BYTES)} at a time"),
    ("docs/durability.md", f"chunks of {run_order.CHUNK_SIZE} requests"),
    ("docs/durability.md", f"`BATCH_LEASE_S` ({default('lease_s')} s)"),
    ("docs/durability.md", f"after {COUNT[int(2 * intake.STORE_TIMEOUT_S / 3600)]} hours when the worker died"),
    ("docs/front-door.md", f"keeps its first {kib(upload.KEPT_BYTES)}"),
    ("docs/front-door.md", f"its last load took, else {routing.LOADING_S:.0f} s"),
    ("docs/front-door.md", f"died | the rest of the time that its last recovery took, else {routing.RECOVERY_S:.0f} s"),
    ("docs/front-door.md", f"reached | the rest of the time that its last recovery took, else {routing.LOST_S:.0f} s"),
    ("docs/front-door.md", f"seen | the rest of the time that its last recovery took, else {routing.RECOVERY_S:.0f} s"),
    ("docs/front-door.md", f"it is draining | {routing.DRAINING_S:.0f} s"),
    ("docs/front-door.md", f"will say why | {routing.SOON_S:.0f} s"),
    ("docs/front-door.md", f"a person has to look | {routing.GAVE_UP_S:.0f} s"),
    ("docs/front-door.md", f"silent for {routing.WATCHDOG_MISSED_S:.0f} s"),
    ("docs/front-door.md", f"a ping every {ping_s(rpc.CHANNEL_OPTIONS):g} s, with"),
    ("docs/front-door.md", f"with {option(rpc.CHANNEL_OPTIONS, 'grpc.http2.ping_timeout_ms') / 1000:g} s to answer"),
    (
        "docs/front-door.md",
        f"at most {links.CHECK_INTERVAL_S + links.CHECK_TIMEOUT_S:g} s: a Check every {links.CHECK_INTERVAL_S:g} s,"
        f" with {links.CHECK_TIMEOUT_S:g} s to answer",
    ),
    ("docs/front-door.md", f"gives unary calls and uploads {gateway.GRACE_S:.0f} s"),
    ("docs/front-door.md", f"{COUNT[api.AHEAD + 1]} pages of results, each of {kib(api.LINES_BYTES)}"),
    ("docs/front-door.md", f"({kib(api.PAGE_BYTES)} as messages)"),
    ("docs/front-door.md", f"every {FRACTION[watching.POLL_INTERVAL_S]} second"),
    ("docs/front-door.md", f"another every {watching.DESCRIBE_INTERVAL_S:g} s why"),
    ("docs/queue.md", f"for {waiting.MISSED * default('heartbeat_timeout_s'):g} s although it serves"),
    ("docs/queue.md", f"has not taken anything for {waiting.TAKEN_S:g} s"),
    ("docs/queue.md", f"its turn after {suspects.TURN_S:.0f} s at most"),
    ("docs/queue.md", f"after {api.AWAY_S:.0f} s it ends with that error"),
    ("docs/queue.md", f"once {100 * estimate.LEAST_DONE:g} % of the requests are done"),
    ("docs/queue.md", f"at least {estimate.WINDOW_S / 60:g} minutes and {COUNT[estimate.GENERATIONS]} times"),
    ("docs/queue.md", f"every {watching.DESCRIBE_INTERVAL_S:g} s for those that are watched"),
    ("docs/queue.md", f"by {100 * watching.MOVED:g} % of the duration (at least {watching.MOVED_S:g} s)"),
    ("docs/queue.md", f"and every {watching.REPEAT_S:g} s when a number"),
    ("docs/queue.md", f"At most {error_kinds.MAX_KINDS} kinds are shown and {failures.MAX_COUNTED:,} failures counted"),
    ("docs/queue.md", f"in steps of {results.STRETCH:,}"),
    ("proto/vllm_batch/v1/batch_service.proto", f"only the first {failures.MAX_COUNTED:,} by order of completion"),
    ("proto/vllm_batch/v1/batch_service.proto", f"up to {error_kinds.MAX_MESSAGE:,} characters"),
    ("proto/vllm_batch/v1/batch_service.proto", f"at most {error_kinds.MAX_KINDS}."),
    ("proto/vllm_batch/v1/batch_service.proto", f"Absent until {100 * estimate.LEAST_DONE:g} % of its requests"),
    (
        "docs/front-door.md",
        "vanished after"
        f" {(ping_s(rpc.SERVER_OPTIONS) + option(rpc.SERVER_OPTIONS, 'grpc.http2.ping_timeout_ms') / 1000):.0f} s",
    ),
    (
        "docs/client.md",
        f"after {ping_s(channel.OPTIONS) + option(channel.OPTIONS, 'grpc.http2.ping_timeout_ms') / 1000:.0f} s:"
        f" a ping every {ping_s(channel.OPTIONS):.0f} s",
    ),
    ("docs/observability.md", f"at most every {gateway_metrics.FRESH_S:.0f} s and only when scraped"),
    ("docs/observability.md", f"{', '.join(recoveries.PHASES)}; their sum"),
    ("docs/operations.md", f"each of the last {evidence_folder.KEPT_FOLDERS} restarts"),
    ("docs/operations.md", f"`BATCH_RETENTION_S` ({default('retention_s') / 86_400:.0f} days)"),
    ("docs/operations.md", f"{TIMES[vllm.WINDOW_FACTOR]} its `max_num_seqs` and at most {vllm.MAX_WINDOW}"),
    ("docs/observability.md", f"of the {gateway_metrics.TENANTS} tenants that have used most, and of the rest"),
    ("docs/observability.md", f"together as `{gateway_metrics.OTHER}`"),
    ("docs/queue.md", f"with bursts of {COUNT[rate_limit.BURST_S]} seconds' worth"),
    ("docs/queue.md", f"a {QUOTIENT[estimates.BYTES_PER_TOKEN]} of the bytes of its body"),
    ("docs/queue.md", f"`max_output_tokens`; {estimates.COMPLETION_TOKENS} without any of them"),
    ("docs/queue.md", f"Bodies of less than {prefixes.LEAST_BYTES} bytes"),
    ("docs/queue.md", f"after the first {prefixes.BLOCKS[-1][1] >> 20} MiB"),
    ("docs/queue.md", f"more than {run_order.FAR_LONGER} times the mean tokens"),
    ("docs/queue.md", f"less than {survey.WORTH:.0%} of the prompts".replace("%", " %")),
    ("docs/queue.md", f"at most {run_order.CHUNK_SIZE} requests and {run_order.CHUNK_TOKENS:,} tokens"),
    ("docs/queue.md", f"at most {FRACTION[1 / run_order.LAST_PART]} of the requests that are left"),
    ("docs/queue.md", f"a batch of more than {run_order.TAPERED} requests"),
    ("docs/queue.md", f"but up to {run_order.LEAST_LAST} in any case"),
    ("docs/queue.md", f"once that has lasted for {unserved_log.LASTING_S:g} s"),
    ("docs/queue.md", f"asks again after {wakeup.IDLE_S:g} s"),
    ("docs/queue.md", f"For {sharing.SCARCE_S:g} s after it has asked or given"),
    ("docs/queue.md", f"made no step for {runner.STILL_S:g} s"),
    ("docs/queue.md", f"at most {survey.REMEMBERED:,} beginnings"),
    ("docs/queue.md", f"divided by {estimates.BYTES_PER_TOKEN}"),
    ("docs/queue.md", f"times `n`; {estimates.COMPLETION_TOKENS} for a request"),
    ("docs/page.md", f"up to {live.MAX_STREAMS} of them, {live.MAX_STREAMS_EACH} with one token"),
    ("docs/recovery.md", f"(polled every {wiring.PACES[wiring.GROUP].poll_s:g} s)"),
    (
        "docs/recovery.md",
        f"(sent every {wiring.PACES[wiring.GROUP].ask_s:g} s, with {probe.ASK_TIMEOUT_S:g} s to answer)",
    ),
    ("docs/recovery.md", f"health every {wiring.PACES['gateway'].ask_s:g} s"),
    ("docs/recovery.md", f"{COUNT[LIMITS.confirm_probes]} consecutive probes agree"),
    ("docs/recovery.md", f"over at least {LIMITS.confirm_s:g} s"),
    ("docs/recovery.md", f"a tick more than {stall_detector.LATE_S:g} s late"),
    ("docs/recovery.md", f"RPC_WEDGED → confirm for {LIMITS.wedged_confirm_s:g} s"),
    ("docs/recovery.md", f"FROZEN → confirm for {LIMITS.wedged_confirm_s:g} s"),
    ("docs/recovery.md", f"NOT_READY → confirm for {LIMITS.not_ready_confirm_s:g} s"),
    ("docs/recovery.md", f"draining, within `BATCH_DRAIN_TIMEOUT_S` + {wiring.DRAIN_MARGIN_S:g} s"),
    ("docs/recovery.md", f"asked for one token every {pulse.CANARY_INTERVAL_S:g} s"),
    ("docs/recovery.md", f"uses processor time for {progress.LEASE_S:g} s"),
    ("docs/recovery.md", f"may take {progress.COMPUTING_LEASE_S:g} s for a step"),
    ("docs/recovery.md", f"{COUNT[progress.STEP_FACTOR]} times its longest recent step"),
    ("docs/recovery.md", f"(at most {progress.MAX_LEASE_S:g} s)"),
    ("docs/recovery.md", f"after {progress.LATE_S:g} s the heart"),
    ("docs/recovery.md", f"at most {evidence_folder.TIMEOUT_S:g} s; the newest {evidence_folder.KEPT_FOLDERS} folders"),
    ("docs/recovery.md", f"others {restart.SHORT_GRACE_S:g} s; then"),
    ("docs/recovery.md", f"wait up to {restart.GPU_TIMEOUT_S:g} s until the **GPU**"),
    ("docs/recovery.md", f"after {COUNT[LIMITS.healthy_reset_s / 60]} healthy minutes"),
    ("docs/recovery.md", f"reported after {outages.TELL_AFTER_S:g} s"),
    ("docs/recovery.md", f"over for {COUNT[outages.OVER_AFTER_S / 60]} minutes"),
    ("docs/security.md", f"`BATCH_RATE_LIMIT_PER_S` ({default('rate_limit_per_s')})"),
    ("docs/security.md", f"bursts of {COUNT[rate_limit.BURST_S]} seconds' worth"),
    ("docs/security.md", f"one message | {mib(rpc.MAX_MESSAGE_BYTES)}"),
    ("docs/security.md", f"metadata of one call | {kib(ports.SOFT_METADATA_BYTES)};"),
    ("docs/security.md", f"always over {kib(ports.MAX_METADATA_BYTES)}"),
    ("docs/security.md", f"calls on one connection | {option(ports.OPTIONS, 'grpc.max_concurrent_streams')} |"),
    (
        "docs/security.md",
        f"connections to one port | {option(ports.OPTIONS, 'grpc.max_allowed_incoming_connections')} |",
    ),
    ("docs/security.md", f"connections to one port | {certified.MAX_CONNECTIONS} |"),
    ("docs/security.md", f"handshake | {option(ports.OPTIONS, 'grpc.server_handshake_timeout_ms') / 1000:g} s |"),
    (
        "docs/security.md",
        f"one every {option(ports.OPTIONS, 'grpc.http2.min_ping_interval_without_data_ms') / 1000:g} s;"
        f" {COUNT[option(ports.OPTIONS, 'grpc.http2.max_ping_strikes')]} may come early",
    ),
    ("docs/security.md", f"ping every {ping_s(rpc.CHANNEL_OPTIONS):g} to {ping_s(channel.OPTIONS):g} s"),
    ("docs/client.md", f"larger than a gRPC message ({mib(rpc.MAX_MESSAGE_BYTES)})"),
    ("docs/client.md", f"of over {mib(results.MAX_BODY_BYTES)} are not stored"),
    ("docs/client.md", f"lines of over {mib(results.LARGE_BYTES)} in pieces"),
    ("docs/client.md", f"(up to {errors.MAX_VIOLATIONS}), of the {mib(intake.READ_ON_BYTES)} from"),
    ("docs/client.md", f"the first {intake.REMEMBERED:,} lines"),
    ("docs/client.md", f"exits with {terminal.EXIT_OUTPUT}, and"),
    ("docs/webhooks.md", f"answers with a status of 2xx within {sender.DEADLINE_S:.0f} s"),
    ("docs/webhooks.md", f"leased by one gateway for {webhooks.LEASE_S:.0f} s"),
    ("docs/webhooks.md", f"the next try follows in about {webhook_retries.FIRST_S:.0f} s"),
    ("docs/webhooks.md", f"After {webhook_retries.FAILURES} failures in a row"),
    ("docs/webhooks.md", f"up to {webhook_retries.LONGEST_REST_S / 60:.0f} minutes"),
    ("docs/webhooks.md", f"At most {webhook_retries.PER_TARGET} deliveries to one target are under way at once"),
    ("docs/webhooks.md", f"and {deliverer.CONCURRENCY} in all, {deliverer.PER_TENANT} of one tenant"),
    ("docs/troubleshooting.md", f"the limit ({mib(results.MAX_BODY_BYTES)};"),
    ("docs/troubleshooting.md", f"up to {errors.MAX_VIOLATIONS}. Nothing was stored"),
    ("docs/troubleshooting.md", f"exits with {terminal.EXIT_REFUSED}"),
    (
        "docs/troubleshooting.md",
        f"`BATCH_LOAD_TIMEOUT_S` ({FRACTION[default('load_timeout_s') / 3600]} an hour)",
    ),
]


@pytest.mark.parametrize(("name", "said"), STATEMENTS, ids=[f"{name}: {said}" for name, said in STATEMENTS])
def test_numbers_are_those_of_the_code(name: str, said: str) -> None:
    """Every limit, interval or size that a document states is the one in the code."""
    assert said in words(name)


def test_pings_of_clients_are_allowed() -> None:
    """Our clients never ping more often than our servers accept."""
    least_ms = option(ports.OPTIONS, "grpc.http2.min_ping_interval_without_data_ms")
    for options in (rpc.CHANNEL_OPTIONS, channel.OPTIONS, probe.CHANNEL_OPTIONS):
        assert option(options, "grpc.keepalive_time_ms") >= least_ms


def connections(folder: str) -> int:
    """The most connections to Postgres that the code of a process opens: its pools and its single connections."""
    found = 0
    for path in (ROOT / folder).glob("*.py"):
        module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or len(node.args) < 2:
                continue
            # A check or a dry run is a separate process.
            if "check" in ast.unparse(node.args[1]) or "dry-run" in ast.unparse(node.args[1]):
                continue
            if node.func.id == "connect":
                found += 1
            elif node.func.id == "Database":
                given = [word.value for word in node.keywords if word.arg == "connections"] or node.args[3:4]
                value: Any = given[0] if given else ast.Constant(8)
                found += value.value if isinstance(value, ast.Constant) else getattr(module, value.id)
    return found


def test_connections_to_postgres() -> None:
    """docs/capacity.md states each process's connections and how many workers fit the embedded server."""
    worker, gate, http, dog = (
        connections(name) for name in ("service/worker", "service/gateway", "service/http", "watchdog")
    )
    each = f"at most {worker} each (besides {gate} of each gateway, {http} of each http and {dog} of each watchdog)"
    assert each in words("docs/capacity.md")
    assert dog == watchdog.CONNECTIONS
    fit = (int(POSTGRES["max_connections"]) - gate - http - dog) // worker
    assert f"one gateway, one http, one watchdog and {fit} workers" in words("docs/capacity.md")


def test_group_of_results() -> None:
    """docs/capacity.md states how many results one statement stores."""
    assert f"one stores up to {result_writer.GROUP} results" in words("docs/capacity.md")


# Lines like `#BATCH_LEASE_S=60  # what it is`.
SETTING = re.compile(r"^#([A-Z_]+)=(.*?)(?:\s+# .*)?$", re.MULTILINE)
# Shown with an example, because they have no default.
WITHOUT_DEFAULT = {"DATABASE_URL", "OTEL_EXPORTER_OTLP_ENDPOINT", "SENTRY_DSN"}


def variable(name: str) -> str:
    """A setting's environment variable."""
    alias: Any = Settings.model_fields[name].validation_alias
    return str(alias.choices[0]) if alias else f"BATCH_{name.upper()}"


def test_example_settings_are_the_defaults() -> None:
    """conf/example.env has every setting but those of the simulated engine, each with its default."""
    shown = dict(SETTING.findall((ROOT / "conf/example.env").read_text()))
    fields = {variable(name): field for name, field in Settings.model_fields.items()}
    assert shown.keys() == {name for name in fields if not name.startswith("BATCH_SIMULATED_")}
    for name, text in shown.items():
        value = fields[name].default
        if value is None or value == "":
            continue
        if isinstance(value, Path):
            assert config.ROOT / text == value
        elif isinstance(value, bool):
            assert text == str(value).lower()
        elif isinstance(value, int | float):
            assert float(text) == value, name
        else:
            assert text == value, name
    assert {name for name in WITHOUT_DEFAULT if fields[name].default is not None} == set()


def test_example_settings_are_accepted(tmp_path: Path) -> None:
    """conf/example.env is valid with every line switched on: no example has a form that is refused."""
    file = tmp_path / ".env"
    file.write_text(re.sub(r"^#(?=[A-Z_]+=)", "", (ROOT / "conf/example.env").read_text(), flags=re.MULTILINE))
    settings = Settings(_env_file=file)  # type: ignore[call-arg]
    assert settings.sentry_dsn is not None


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_settings_that_are_named_exist(path: Path) -> None:
    """Every setting that a document names exists."""
    known = {variable(name) for name in Settings.model_fields} | config.OTHER_VARIABLES
    named = set(re.findall(r"\bBATCH_[A-Z_]*[A-Z]\b", path.read_text()))
    # Values of an enum in the contract.
    named = {name for name in named if not name.startswith("BATCH_STATE")}
    assert named <= known


SETTINGS_TABLE = re.findall(r"^\| `(BATCH_\w+)` \| (\d+) \|", (ROOT / "docs/recovery.md").read_text(), re.MULTILINE)


@pytest.mark.parametrize(("name", "shown"), SETTINGS_TABLE)
def test_table_of_settings(name: str, shown: str) -> None:
    """The defaults in the table of docs/recovery.md are those in the code."""
    assert float(shown) == default(name.removeprefix("BATCH_").lower())


def test_table_of_verdicts() -> None:
    """The decision table lists every verdict and no other."""
    table = (ROOT / "docs/recovery.md").read_text().partition("First match wins:")[2].partition("*Confirm*")[0]
    named = {
        name
        for row in re.findall(r"\| ([A-Z_]+(?:, [A-Z_]+)*)(?: →[^|]*)? \|$", table, re.MULTILINE)
        for name in row.split(", ")
    }
    assert named == {str(verdict) for verdict in Verdict}


def test_table_of_roles() -> None:
    """docs/security.md lists every method under the role that it requires."""
    for role in roles.Role:
        [row] = re.findall(rf"^\| `{role}` \| (.*) \|$", (ROOT / "docs/security.md").read_text(), re.MULTILINE)
        needed = {method.rpartition("/")[2] for method, least in roles.NEEDED.items() if least is role}
        assert set(re.findall(r"\b[A-Z]\w+", row)) - {"OpenAI", "API"} == needed


def test_table_of_alerts() -> None:
    """docs/observability.md lists every alert under its severity."""
    [group] = yaml.safe_load((ROOT / "conf/alert-rules.yml").read_text())["groups"]
    section = (ROOT / "docs/observability.md").read_text().partition("## Alerts")[2].partition("##")[0]
    for severity in ("page", "ticket"):
        there = {rule["alert"] for rule in group["rules"] if rule["labels"]["severity"] == severity}
        text = section.partition(f"`severity: {severity}`")[2].partition("`severity")[0]
        assert set(re.findall("VllmBatch[A-Za-z]+", text)) == there


def test_alert_of_postgres_does_not_say_that_recovery_stops() -> None:
    """The alert and docs/recovery.md both say that workers are still restarted while Postgres is away."""
    [group] = yaml.safe_load((ROOT / "conf/alert-rules.yml").read_text())["groups"]
    [rule] = [rule for rule in group["rules"] if rule["alert"] == "VllmBatchDatabaseAway"]
    assert "restarted all the same" in rule["annotations"]["description"]
    assert "a worker that crashes is still restarted" in words("docs/recovery.md")


def test_no_worker_alert_is_later_than_a_load() -> None:
    """A restarted worker may take as long as BATCH_LOAD_TIMEOUT_S to load without paging anyone."""
    [group] = yaml.safe_load((ROOT / "conf/alert-rules.yml").read_text())["groups"]
    [rule] = [rule for rule in group["rules"] if rule["alert"] == "VllmBatchNoWorker"]
    assert 60 * int(rule["for"].removesuffix("m")) > default("load_timeout_s")
    assert f"({rule['for'].removesuffix('m')} min: longer than `BATCH_LOAD_TIMEOUT_S`" in words("docs/observability.md")


def test_what_clients_retry() -> None:
    """Both pages say that clients retry UNAVAILABLE and RATE_LIMITED."""
    assert "retry `UNAVAILABLE` and `RATE_LIMITED`, and nothing else" in words("docs/client.md")
    assert "Only `UNAVAILABLE`, `RATE_LIMITED` and" in words("docs/troubleshooting.md")


def test_rotation_of_logs() -> None:
    """docs/operations.md states the sizes and counts at which supervisord rotates logs."""
    parsed = configparser.RawConfigParser()
    parsed.read(ROOT / "conf/supervisord.conf")
    kept = {
        name.removeprefix("program:"): (program["stdout_logfile_maxbytes"], program["stdout_logfile_backups"])
        for name, program in parsed.items()
        if name.startswith("program:")
    }
    assert kept == {
        "worker": ("50MB", "5"),
        **dict.fromkeys(("gateway", "http", "watchdog", "postgres"), ("20MB", "3")),
    }
    said = "at 20 MB (worker: 50 MB) with 3 older files kept (worker: 5)"
    assert said in words("docs/operations.md")
    assert default("stop_timeout_s") <= int(parsed["program:worker"]["stopwaitsecs"])


def test_phases_of_a_worker() -> None:
    """The glossary lists every phase that a worker reports."""
    assert ", ".join(heartbeats.Phase) in words("docs/architecture.md")


def test_python_versions() -> None:
    """The package metadata and the README name the same Python versions."""
    parsed = configparser.ConfigParser()
    parsed.read(ROOT / "setup.cfg")
    named = re.findall(r":: (3\.\d+)", parsed["metadata"]["classifiers"])
    assert f"Python {named[0]} to {named[-1]}" in words("README.md")
    assert named == [f"3.{minor}" for minor in range(int(named[0][2:]), int(named[-1][2:]) + 1)]
    assert parsed["options"]["python_requires"] == f">={named[0]}"


# Paths relative to the checkout, and what follows `python -m`.
FOLDERS = "benchmarks|client|conf|deploy|docs|examples|proto|scripts|service|tests|watchdog"
PATH = re.compile(rf"(?<![\w./-])((?:{FOLDERS})/[\w./-]*[\w/])")
MODULE = re.compile(r"python -m ((?:service|watchdog|benchmarks)[\w.]*\w)")
COMMAND = re.compile(r"(?:^    |[`;] ?|\.venv/bin/)vllm-batch ([a-z]+)(?: ([a-z]+))?", re.MULTILINE)
LINK = re.compile(r"\]\((?!https?:)([^)#]+)[^)]*\)")
# Created by the reader.
PLACEHOLDERS = {"benchmarks/claims/NAME.py"}


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_is_named_is_there(path: Path) -> None:
    """Every file, folder, module and link that a text names exists."""
    if path == HISTORY:
        return
    text = path.read_text()
    missing = {name for name in PATH.findall(text) if name not in PLACEHOLDERS and not (ROOT / name).exists()}
    if path.suffix == ".md":
        missing = {name for name in missing if not (path.parent / name).exists()}
        missing |= {link for link in LINK.findall(text) if not (path.parent / link).exists()}
    missing |= {name for name in MODULE.findall(text) if importlib.util.find_spec(name) is None}
    assert not missing


def test_page_of_benchmarks_says_what_they_say() -> None:
    """docs/benchmarks.md has the current introduction and the current claims of the code."""
    text = (ROOT / "docs/benchmarks.md").read_text()
    assert page.HEAD.format(kind="") in text
    claims = {
        name: (importlib.import_module(f"benchmarks.claims.{name}").__doc__ or "").strip() for name in benchmark.CLAIMS
    }
    assert not [name for name, claim in claims.items() if f"## {name}\n\n{claim}\n\n|" not in text]


def test_architecture_has_every_folder() -> None:
    """docs/architecture.md says what every package is for."""
    text = (ROOT / "docs/architecture.md").read_text()
    packages = [path.parent for name in ("service", "watchdog") for path in (ROOT / name).rglob("__init__.py")]
    parts = {str(path.relative_to(ROOT)) for path in packages if path.name != "migrations"}
    assert len(parts) > 10
    assert not [part for part in parts if f"`{part}/" not in text]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_that_are_named_exist(path: Path) -> None:
    """Every `vllm-batch COMMAND` on a page exists, including subcommands."""
    for first, second in COMMAND.findall(path.read_text()):
        found: Any = command_line.get_command(click.Context(command_line), first)
        assert found is not None, first
        if isinstance(found, click.Group) and second:
            assert found.get_command(click.Context(found), second) is not None, f"{first} {second}"


def test_clients_of_openais_api() -> None:
    """docs/openai.md has the versions that tests/clients installs, which come from whatever registry is configured."""
    folder = ROOT / "tests" / "clients"
    table = re.findall(r"^\| .*", (ROOT / "docs/openai.md").read_text(), re.MULTILINE)
    packages = json.loads((folder / "npm/package.json").read_text())["dependencies"]
    [litellm] = re.findall(r"^litellm==(.+)$", (folder / "litellm/requirements.txt").read_text(), re.MULTILINE)
    for name, version in (packages | {"LiteLLM": litellm}).items():
        assert any(name in row and version in row for row in table), (name, version)
    assert '"resolved"' not in (folder / "npm/package-lock.json").read_text()
