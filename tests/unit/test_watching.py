"""What a watcher of a batch that does not change is told."""

import pytest

from service.api import messages
from service.api.watching import is_news
from vllm_batch.v1 import batch_service_pb2 as pb


def batch(reason: int = 0, message: str = "", end_s: int = 0, running: int = 0) -> pb.Batch:
    made = pb.Batch(counts=pb.BatchCounts(total=100, running=running))
    made.start_time.FromSeconds(1_000)
    if reason:
        made.wait.reason, made.wait.message = reason, message
    if end_s:
        made.estimated_end_time.FromSeconds(end_s)
    return made


LOADING = pb.WAIT_REASON_WORKER_LOADING


@pytest.mark.parametrize(
    ("sent", "now", "age_s", "expected"),
    [
        (batch(), batch(), 100, False),
        (batch(), batch(LOADING, "for 1 s"), 0, True),
        (batch(LOADING, "for 1 s"), batch(pb.WAIT_REASON_ENGINE_DEAD), 0, True),
        (batch(LOADING, "for 1 s"), batch(LOADING, "for 3 s"), 2, False),
        (batch(LOADING, "for 1 s"), batch(LOADING, "for 11 s"), 10, True),
        (batch(LOADING, "for 1 s"), batch(LOADING, "for 1 s"), 10, False),
        (batch(), batch(running=8), 0, True),
        (batch(running=8), batch(running=4), 0, False),
        (batch(), batch(end_s=2_000), 0, True),
        (batch(end_s=2_000), batch(end_s=2_040), 0, False),
        (batch(end_s=2_000), batch(end_s=2_060), 0, True),
        (batch(end_s=1_010), batch(end_s=1_014), 0, False),
        (batch(end_s=2_000), batch(), 0, True),
    ],
)
def test_what_is_news(sent: pb.Batch, now: pb.Batch, age_s: float, expected: bool) -> None:
    """Another reason and an end that moved noticeably are; a number in the words is every ten seconds."""
    assert is_news(sent, now, age_s) is expected


def test_an_outage_of_postgres_is_a_wait() -> None:
    """The batch as it was last read, without a guess of its end."""
    away = messages.database_away(batch(LOADING, "for 1 s", end_s=2_000))
    assert away.wait.reason == pb.WAIT_REASON_DATABASE_AWAY
    assert "Postgres" in away.wait.message
    assert not away.HasField("estimated_end_time")
    assert away.counts.total == 100
