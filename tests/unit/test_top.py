"""The screen of `top` for given answers, and what it remembers between them."""

from datetime import UTC, datetime

import pytest
from rich.cells import cell_len
from rich.console import Console

from vllm_batch.cli.overview import Gateway, Watchdog
from vllm_batch.cli.screen import State, render
from vllm_batch.v1 import batch_service_pb2 as pb
from vllm_batch.v1 import recovery_service_pb2 as rpb

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def screen(state: State, width: int = 80, height: int = 24) -> str:
    console = Console(width=width, height=height, color_system=None, force_terminal=True, highlight=False)
    with console.capture() as capture:
        console.print(render(state, NOW, height))
    return capture.get()


def worker(observed_s: int = 1, age_s: float | None = 1.0, **fields: object) -> rpb.WorkerStatus:
    made = rpb.WorkerStatus(worker_id="box:worker", process_state="RUNNING", pid=7, phase="ready", health="SERVING")
    made.verdict = rpb.VERDICT_HEALTHY
    made.budget_left, made.budget_limit = 9, 10
    made.observe_time.FromSeconds(observed_s)
    if age_s is not None:
        made.heartbeat_age.FromMilliseconds(round(1000 * age_s))
    made.MergeFrom(rpb.WorkerStatus(**fields))  # type: ignore[arg-type]
    return made


def batch(number: int, done: int, total: int = 100, tokens: int = 0, failed: int = 0) -> pb.Batch:
    counts = pb.BatchCounts(total=total, completed=done - failed, failed=failed)
    usage = pb.TokenUsage(completion_tokens=tokens)
    return pb.Batch(id=f"batch_{number}", state=pb.BATCH_STATE_IN_PROGRESS, counts=counts, usage=usage)


def test_everything_on_one_screen() -> None:
    """One screen shows verdict, signals, batches with progress bars, rates and the phases of the last restart."""
    state = State()
    restart = rpb.RecoveryEvent(kind="restart", verdict=rpb.VERDICT_CRASHED, outcome="recovered")
    for phase, took_s in (("stop", 1), ("load", 28)):
        restart.timings.add(phase=phase).duration.FromSeconds(took_s)
    state.take_watchdog(Watchdog("", [worker()], [restart]))
    state.take_gateway(Gateway(batches=[batch(1, 10, tokens=100)]), 0.0)
    state.take_gateway(Gateway(batches=[batch(1, 50, tokens=900, failed=3)]), 4.0)
    shown = screen(state)
    for text in ("HEALTHY", "RUNNING pid 7", "9/10 restarts left", "SERVING", "1.0 s ago", "batch_1", "━", "50/100"):
        assert text in shown
    for text in ("3 failed", "10.0 requests/s", "200 tokens/s", "accepts new work"):
        assert text in shown
    assert "CRASHED → recovered  29.0 s: stop 1.0, load 28.0" in shown


def test_when_a_batch_ends_or_what_it_waits_for() -> None:
    """Below each batch that has not ended, on a line that fits; the screen gets no longer by it."""
    moving, waiting = batch(1, 10), batch(2, 0)
    moving.estimated_end_time.FromSeconds(1_767_323_045)
    moving.counts.running = 64
    waiting.wait.message = "worker box:worker has been starting and loading its model for 40 s" + " and more" * 9
    state = State()
    state.take_watchdog(Watchdog("", [worker()]))
    state.take_gateway(Gateway(batches=[waiting, moving, *(batch(number, 1) for number in range(3, 40))]), 0.0)
    shown = screen(state).splitlines()
    [under] = [shown[number + 1] for number, line in enumerate(shown) if line.startswith("batch_1 ")]
    assert under.strip() == "ends about 2026-01-02 03:04:05 UTC, 64 requests running"
    [under] = [shown[number + 1] for number, line in enumerate(shown) if line.startswith("batch_2 ")]
    assert under.startswith("  waits: worker box:worker has been starting")
    assert len(shown) <= 24


def test_why_the_engine_failed_is_readable_in_80_columns() -> None:
    """A long cause and its advice are shown in full on 80 columns, wrapped over several lines."""
    cause = "ValueError: " + " ".join(f"word{number}" for number in range(25))
    state = State()
    state.take_watchdog(Watchdog("", [worker(verdict=rpb.VERDICT_START_FAILED, cause=cause, advice="Check it.")]))
    shown = screen(state)
    assert all(word in shown for word in cause.split())
    assert "advice    Check it." in shown


def test_a_sample_for_each_observation() -> None:
    """The heartbeat chart gets one sample per observation of the watchdog, however often `top` asks."""
    state = State()
    for observed_s, age_s in ((1, 0.0), (1, 0.0), (2, 5.0), (3, 20.0), (4, None)):
        state.take_watchdog(Watchdog("", [worker(observed_s, age_s)]))
    assert " ▁▂█·" in screen(state)


def test_signals_that_are_lost_show() -> None:
    """SERVING, NOT_SERVING and no answer can be told apart without colours."""
    state = State()
    for observed_s, health in enumerate(("SERVING", "NOT_SERVING", "DEADLINE_EXCEEDED")):
        state.take_watchdog(Watchdog("", [worker(observed_s, health=health)]))
    assert "█▄▁" in screen(state)


def test_who_is_down_is_said() -> None:
    """Without the gateway, workers are still shown; without the watchdog, batches are; and the failure is named."""
    state = State()
    state.take_gateway(Gateway(failure="connection refused"), 0.0)
    state.take_watchdog(Watchdog("", [worker()]))
    shown = screen(state)
    assert "gateway   does not answer  connection refused" in shown
    assert "HEALTHY" in shown
    state.take_gateway(Gateway(refusal="worker offline (last seen 72s ago)", batches=[batch(5, 1)]), 1.0)
    state.take_watchdog(Watchdog(failure="deadline exceeded"))
    shown = screen(state)
    assert "watchdog  does not answer  deadline exceeded" in shown
    assert "no new work: worker offline (last seen 72s ago)" in shown
    assert "batch_5" in shown
    assert "asking" in screen(State())


def test_old_answers_say_so() -> None:
    """An answer that is out of date is shown with its age."""
    state = State(gateway_age_s=12, watchdog_age_s=7)
    state.take_gateway(Gateway(), 0.0)
    state.take_watchdog(Watchdog("", [worker()]))
    assert "(12 s old)" in screen(state)
    assert "(7 s old)" in screen(state)


@pytest.mark.parametrize(("width", "height"), [(80, 24), (80, 12), (120, 50), (40, 24)])
def test_fits_the_terminal(width: int, height: int) -> None:
    """Long names, reasons and numbers are cut to the width, and on at least 24 lines surplus rows are left out."""
    state = State()
    given_up = worker(worker_id="w" * 300, gave_up=True, verdict=rpb.VERDICT_RPC_WEDGED, reason="because " * 40)
    held = worker(worker_id="v", verdict=rpb.VERDICT_NOT_READY, reason="日本語 " * 60)
    for observed_s in range(100):
        given_up.observe_time.FromSeconds(observed_s)
        restart = rpb.RecoveryEvent(kind="restart", verdict=rpb.VERDICT_FROZEN, outcome="failed")
        state.take_watchdog(Watchdog("", [given_up, held], [restart] * 30))
    batches = [batch(10**17 + number, 10**12, 10**13, failed=10**11) for number in range(50)]
    state.take_gateway(Gateway(refusal="no " * 100, batches=batches), 0.0)
    lines = screen(state, width, height).splitlines()
    assert max(map(cell_len, lines)) <= width
    if height >= 24:
        assert len(lines) <= height
        assert "failed" in lines[-1]


def test_many_workers_take_a_line_each() -> None:
    """Eight workers with both charts fit on 24 lines, and unhealthy ones come first."""
    state = State()
    ill = worker(worker_id="box:worker_7", verdict=rpb.VERDICT_FROZEN, health="DEADLINE_EXCEEDED")
    state.take_watchdog(Watchdog("", [*(worker(worker_id=f"box:worker_{n}") for n in range(7)), ill]))
    state.take_gateway(Gateway(batches=[batch(1, 10)]), 0.0)
    lines = screen(state).splitlines()
    assert len(lines) <= 24
    assert next(line.split()[:2] for line in lines if "worker_" in line) == ["box:worker_7", "FROZEN"]
    assert sum("HEALTHY" in line and "█" in line and "▁" in line for line in lines) == 7


def test_rates_end_with_the_gateway() -> None:
    """After a gateway outage no rate is computed across the gap, and meanwhile the rate is 0."""
    state = State()
    state.take_gateway(Gateway(batches=[batch(1, 10)]), 0.0)
    state.take_gateway(Gateway(batches=[batch(1, 20)]), 1.0)
    assert state.requests_per_s == 10
    state.take_gateway(Gateway(failure="gone"), 2.0)
    assert state.requests_per_s == 0
    state.take_gateway(Gateway(batches=[batch(1, 90)]), 3.0)
    assert state.requests_per_s == 0
