"""Batches as `get`, `list` and `status` print them."""

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from vllm_batch.cli import tables
from vllm_batch.cli.batch_errors import title
from vllm_batch.cli.recovery import event_line
from vllm_batch.cli.terminal import Terminal, printable
from vllm_batch.v1 import batch_service_pb2 as pb
from vllm_batch.v1 import recovery_service_pb2


def batch() -> pb.Batch:
    made = pb.Batch(id="batch_1", state=pb.BATCH_STATE_IN_PROGRESS, models=["tiny"])
    made.counts.CopyFrom(pb.BatchCounts(total=100, completed=40, failed=2, running=8))
    made.usage.CopyFrom(pb.TokenUsage(prompt_tokens=900, completion_tokens=70))
    made.create_time.FromSeconds(1_767_323_000)
    return made


def printed(what: object) -> str:
    console = Console(width=200, color_system=None)
    with console.capture() as capture:
        console.print(what)
    return " ".join(capture.get().split())


def test_what_a_batch_waits_for_and_what_to_do() -> None:
    """`get` has the words, the code and the advice; `list`, `status` and `watch` have a line."""
    waiting = batch()
    waiting.wait.CopyFrom(
        pb.Wait(reason=pb.WAIT_REASON_NO_WORKER_OF_MODEL, message="no worker serves it", advice="Start one.")
    )
    assert "waits no worker of model: no worker serves it advice Start one." in printed(tables.details(waiting))
    assert tables.notes([batch(), waiting]) == ["batch_1 waits: no worker serves it. Start one."]
    assert tables.outlook(waiting) == "waits: no worker of model"


def test_when_a_batch_will_end() -> None:
    """`get` and lists have the estimated end; nothing is said where nothing is known."""
    moving = batch()
    moving.estimated_end_time.FromSeconds(1_767_323_045)
    assert "ends about 2026-01-02 03:04:05 UTC" in printed(tables.details(moving))
    assert tables.notes([moving]) == ["batch_1 ends about 2026-01-02 03:04:05 UTC"]
    assert tables.outlook(batch()) == ""


def test_counts_and_tokens() -> None:
    """Running requests, cached and reasoning tokens are there if there are any, and how to see the failures."""
    shown = printed(tables.details(batch()))
    assert "100: 40 completed, 2 failed, 8 running" in shown
    assert "900 prompt, 70 completion" in shown
    assert "failures vllm-batch errors batch_1" in shown
    more = batch()
    more.usage.cached_tokens, more.usage.reasoning_tokens, more.counts.failed = 800, 50, 0
    shown = printed(tables.details(more))
    assert "900 prompt (800 cached), 70 completion (50 reasoning)" in shown
    assert "failures" not in shown


def test_a_kind_of_failure_has_a_name() -> None:
    """The code of an error; of a response its status, with the type if it has one."""
    kinds = [pb.ErrorKind(code="batch_expired"), pb.ErrorKind(status_code=400, type="T"), pb.ErrorKind(status_code=500)]
    assert [title(kind) for kind in kinds] == ["batch_expired", "HTTP 400 T", "HTTP 500"]


@pytest.mark.parametrize("columns", ["", "0", "1", "40", "1000"])
def test_a_pipe_gets_whole_names(columns: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is no terminal gets one whole line per row, whatever width the environment names."""
    monkeypatch.setenv("COLUMNS", columns)
    found = batch()
    found.id = "batch_" + "9" * 18
    found.tenant = "a" * 60
    others = [pb.Batch(id="batch_2", tenant="b", create_time=found.create_time)]
    file = io.StringIO()
    Terminal(file=file).print(tables.table([found, *others]))
    _, line, _ = file.getvalue().splitlines()
    assert line.split()[:3] == [found.id, found.tenant, "in_progress"]


@pytest.mark.parametrize("text", ["[red]x[/red]", "[/x]", "a:smile:b", "[ssl: failed]", "\\[bold]", "é 漢字 😀 \u2028"])
def test_texts_are_printed_as_they_are(text: str) -> None:
    """Nothing in metadata or a message is taken for a style or the name of a picture."""
    found = batch()
    found.metadata["note"] = text
    file = io.StringIO()
    console = Terminal(file=file)
    console.print(tables.details(found))
    console.print(text)
    assert file.getvalue().count(text) == 2


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_no_text_takes_over_the_terminal(text: str) -> None:
    """No control character of a text reaches the terminal, in a table or outside of one."""
    found = batch()
    found.metadata["note"] = text
    file = io.StringIO()
    console = Terminal(file=file, width=1000)
    console.print(tables.details(found))
    console.print(text)
    assert not any((ord(each) < 32 and each not in "\n\t") or 127 <= ord(each) < 160 for each in file.getvalue())
    assert printable("\x1b]0;x\x07\x9b\t\n") == "\\x1b]0;x\\x07\\x9b\t\n"


def test_an_event_says_what_it_is_about() -> None:
    """The line of an event names its worker, host or model, which its reason need not do."""
    event = recovery_service_pb2.RecoveryEvent(worker_id="gpu-2", kind="host_lost", reason="last seen 75 s ago")
    event.start_time.FromSeconds(1_767_323_000)
    assert event_line(event) == "2026-01-02 03:03:20 UTC  gpu-2  host_lost  (last seen 75 s ago)"
