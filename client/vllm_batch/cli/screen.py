"""The screen of `vllm-batch top`, drawn from given answers. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from textwrap import wrap

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from vllm_batch.cli.overview import RUNNING, Gateway, Watchdog
from vllm_batch.cli.terminal import printable
from vllm_batch.output import state_name
from vllm_batch.v1 import batch_service_pb2 as pb
from vllm_batch.v1 import recovery_service_pb2 as rpb

# Age from which an answer is marked as old.
STALE_S = 5.0
# Rates are averages over this time.
RATE_S = 10.0
SAMPLES = 40
RESTARTS_SHOWN = 3
BLOCK_WIDTH = 70
BLOCK_LINES = 3
LEVELS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class Signals:
    """Both signals of a worker, as observed once by the watchdog."""

    health: str
    heartbeat_age_s: float | None


@dataclass
class State:
    """What the screen shows: the last answers, their age, and samples from earlier ones."""

    gateway: Gateway | None = None
    watchdog: Watchdog | None = None
    gateway_age_s: float = 0.0
    watchdog_age_s: float = 0.0
    signals: dict[str, deque[Signals]] = field(default_factory=dict)
    requests_per_s: float = 0.0
    tokens_per_s: float = 0.0
    _observed: dict[str, int] = field(default_factory=dict)
    _totals: deque[tuple[float, dict[str, tuple[int, int]]]] = field(default_factory=deque)

    def take_watchdog(self, answer: Watchdog) -> None:
        """Stores an answer. One sample of signals per observation, however often the watchdog is asked."""
        self.watchdog = answer
        for worker in answer.workers:
            observed = worker.observe_time.ToMilliseconds()
            if self._observed.get(worker.worker_id) == observed:
                continue
            self._observed[worker.worker_id] = observed
            age_s = worker.heartbeat_age.ToMilliseconds() / 1000 if worker.HasField("heartbeat_age") else None
            samples = self.signals.setdefault(worker.worker_id, deque(maxlen=SAMPLES))
            samples.append(Signals(worker.health, age_s))

    def take_gateway(self, answer: Gateway, now_s: float) -> None:
        """Stores an answer, and the rates of its batches over the last RATE_S."""
        self.gateway = answer
        if answer.failure:
            self._totals.clear()
        else:
            self._totals.append((now_s, {batch.id: _totals(batch) for batch in answer.batches}))
        while self._totals and now_s - self._totals[0][0] > RATE_S:
            self._totals.popleft()
        self.requests_per_s = self.tokens_per_s = 0.0
        if len(self._totals) > 1:
            (start_s, before), (end_s, after) = self._totals[0], self._totals[-1]
            both = before.keys() & after.keys()
            span_s = max(0.001, end_s - start_s)
            self.requests_per_s = sum(after[key][0] - before[key][0] for key in both) / span_s
            self.tokens_per_s = sum(after[key][1] - before[key][1] for key in both) / span_s


def _totals(batch: pb.Batch) -> tuple[int, int]:
    """Requests done and tokens generated."""
    return batch.counts.completed + batch.counts.failed, batch.usage.completion_tokens


def render(state: State, now: datetime, height: int) -> RenderableType:
    """The screen, at most `height` lines; lines are truncated to the width."""
    parts: list[RenderableType] = [_line(("vllm-batch top", "bold"), f"  {now:%H:%M:%S} UTC  ", ("q: quit", "dim"))]
    parts += [*_gateway(state), _line("")]
    parts += _workers(state, height - 12)
    restarts = [_restart(event) for event in state.watchdog.restarts[:RESTARTS_SHOWN]] if state.watchdog else []
    restarts = restarts or [_line(("none yet" if state.watchdog and not state.watchdog.failure else "unknown", "dim"))]
    left = max(1, height - len(parts) - len(restarts) - 4)
    batches = state.gateway.batches if state.gateway else []
    parts += [_line(""), _line(("batches", "bold")), *_batches(batches, left)]
    parts += [_line(""), _line(("last restarts", "bold")), *restarts]
    return Group(*parts)


def _line(*parts: str | tuple[str, str]) -> Text:
    shown = (printable(part) if isinstance(part, str) else (printable(part[0]), part[1]) for part in parts)
    return Text.assemble(*shown, no_wrap=True, overflow="ellipsis")


def _gateway(state: State) -> list[RenderableType]:
    name, old = ("gateway   ", "bold"), _old(state.gateway_age_s)
    if state.gateway is None:
        return [_line(name, ("asking", "dim"))]
    if state.gateway.failure:
        return [_line(name, ("does not answer  ", "red"), state.gateway.failure)]
    rates = f"{state.requests_per_s:.1f} requests/s  {state.tokens_per_s:.0f} tokens/s"
    if state.gateway.refusal:
        accepting = _line(name, old, ("no new work: ", "yellow"), state.gateway.refusal)
    else:
        accepting = _line(name, old, ("accepts new work", "green"))
    return [accepting, _line(("speed     ", "bold"), rates)]


def _old(age_s: float) -> tuple[str, str]:
    return (f"({age_s:.0f} s old) " if age_s > STALE_S else "", "yellow")


def _workers(state: State, height: int) -> list[RenderableType]:
    if state.watchdog is None:
        return [_line(("watchdog  ", "bold"), ("asking", "dim"))]
    if state.watchdog.failure:
        return [_line(("watchdog  ", "bold"), ("does not answer  ", "red"), state.watchdog.failure)]
    old = _old(state.watchdog_age_s)
    # Unhealthy ones first.
    workers = sorted(state.watchdog.workers, key=lambda worker: worker.verdict == rpb.VERDICT_HEALTHY)
    signals = [list(state.signals.get(worker.worker_id, ())) for worker in workers]
    if not workers:
        return [_line(("watchdog  ", "bold"), "guards no worker")]
    full = [line for worker, those in zip(workers, signals, strict=True) for line in _worker(worker, those, old)]
    if len(workers) == 1 or len(full) <= height:
        return full
    shown = max(1, height - 2)
    lines = [_short(worker, those[-15:]) for worker, those in zip(workers[:shown], signals, strict=False)]
    more = f"  and {len(workers) - shown} more" if len(workers) > shown else ""
    return [_line(("workers   ", "bold"), old, "verdict, health, heartbeat age", more), *lines]


def _short(worker: rpb.WorkerStatus, signals: list[Signals]) -> Text:
    verdict = rpb.Verdict.Name(worker.verdict).removeprefix("VERDICT_")
    colour = "green" if worker.verdict == rpb.VERDICT_HEALTHY else "yellow"
    ages = _age_line([each.heartbeat_age_s for each in signals])
    space = " " * (17 - len(signals))
    name, process = worker.worker_id[-16:], worker.process_state or "-"
    return _line(
        f"{name:<17}", (f"{verdict:<17}", colour), f"{process:<10}", *_health_line(signals), space, (ages, "cyan")
    )


def _worker(worker: rpb.WorkerStatus, signals: list[Signals], old: tuple[str, str]) -> list[RenderableType]:
    verdict = rpb.Verdict.Name(worker.verdict).removeprefix("VERDICT_")
    colour = "green" if worker.verdict == rpb.VERDICT_HEALTHY else "yellow"
    process = f"  {worker.process_state or 'supervisord away'} pid {worker.pid}  {worker.phase or 'no heartbeat'}"
    budget = f"  {worker.budget_left}/{worker.budget_limit} restarts left"
    age = f"{worker.heartbeat_age.ToMilliseconds() / 1000:.1f} s ago" if worker.HasField("heartbeat_age") else "none"
    lines = [
        _line(("worker    ", "bold"), old, (verdict, colour), process, budget),
        _line(f"          observed {worker.observe_time.ToDatetime():%H:%M:%S}  {worker.worker_id}"),
        _line("health    ", f"{worker.health or '-':<14}", *_health_line(signals)),
        _line("heartbeat ", f"{age:<14}", (_age_line([each.heartbeat_age_s for each in signals]), "cyan")),
    ]
    if worker.gave_up:
        lines.append(_line(("          gave up: find the cause, then `vllm-batch recovery reset REASON`", "red")))
    elif worker.HasField("intent"):
        lines.append(_line(("          restart under way: ", "yellow"), worker.intent.reason))
    elif worker.HasField("pause_end_time"):
        until = f"{worker.pause_end_time.ToDatetime():%H:%M:%S}"
        lines.append(_line((f"          paused until {until} UTC: ", "yellow"), worker.pause_reason))
    elif worker.verdict != rpb.VERDICT_HEALTHY:
        lines.append(_line("          ", worker.reason))
    return [*lines, *_block("cause", worker.cause), *_block("advice", worker.advice)]


def _block(name: str, text: str) -> list[Text]:
    """A long text, wrapped to a few lines that fit into 80 columns."""
    heads = [name, *[""] * (BLOCK_LINES - 1)]
    parts = zip(heads, wrap(text, BLOCK_WIDTH), strict=False)
    return [_line((f"{head:<10}", "bold"), (part, "red")) for head, part in parts]


def _health_line(signals: Iterable[Signals]) -> Iterator[tuple[str, str]]:
    """Full and green: SERVING; half and yellow: NOT_SERVING; low and red: no answer."""
    shapes = {"SERVING": ("█", "green"), "NOT_SERVING": ("▄", "yellow")}
    return (shapes.get(each.health, ("▁", "red")) for each in signals)


def _age_line(ages_s: list[float | None]) -> str:
    """Higher is older; the top is 10 s or the oldest shown, whichever is older. A dot: no heartbeat."""
    scale_s = max(10.0, *(age_s or 0.0 for age_s in ages_s), 0.0)
    top = len(LEVELS) - 1
    return "".join("·" if age_s is None else LEVELS[min(top, int(age_s / scale_s * top))] for age_s in ages_s)


def _batches(batches: Sequence[pb.Batch], height: int) -> list[RenderableType]:
    """A line for each batch, and one for its end or what it waits for."""
    lines: list[RenderableType] = []
    for batch in batches[:height]:
        lines += [_batch(batch), *_outlook(batch)]
    return lines[:height] or [_line(("none to show", "dim"))]


def _outlook(batch: pb.Batch) -> list[RenderableType]:
    if batch.HasField("wait"):
        return [_line(("  waits: ", "yellow"), batch.wait.message)]
    if batch.HasField("estimated_end_time"):
        end = f"{batch.estimated_end_time.ToDatetime():%Y-%m-%d %H:%M:%S} UTC"
        return [_line((f"  ends about {end}, {batch.counts.running} requests running", "dim"))]
    return []


def _batch(batch: pb.Batch) -> Table:
    table = Table.grid(padding=(0, 1), expand=True)
    # Whole, to be copied into a command.
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, width=11)
    table.add_column(no_wrap=True, ratio=4)
    table.add_column(no_wrap=True, justify="right", overflow="ellipsis", ratio=4)
    table.add_column(no_wrap=True, justify="right", overflow="ellipsis", ratio=3)
    counts, done = batch.counts, batch.counts.completed + batch.counts.failed
    is_running = pb.BatchState.Name(batch.state) in RUNNING
    table.add_row(
        batch.id,
        Text(state_name(batch), style="bold" if is_running else "dim"),
        ProgressBar(total=max(1, counts.total), completed=done),
        f"{done}/{counts.total}",
        Text(f"{counts.failed} failed", style="red" if counts.failed else "dim"),
    )
    return table


def _restart(event: rpb.RecoveryEvent) -> Text:
    verdict = rpb.Verdict.Name(event.verdict).removeprefix("VERDICT_")
    timings = [(timing.phase, timing.duration.ToMilliseconds() / 1000) for timing in event.timings]
    took = f"  {sum(took_s for _, took_s in timings):.1f} s: " if timings else "  "
    took += ", ".join(f"{phase} {took_s:.1f}" for phase, took_s in timings)
    colour = {"recovered": "green", "failed": "red"}.get(event.outcome, "yellow")
    return _line(f"{event.start_time.ToDatetime():%H:%M:%S} {verdict} → ", (event.outcome, colour), took)
