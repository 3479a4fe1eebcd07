"""What is said of batches whose standing cannot be read."""

from types import SimpleNamespace
from typing import Any

from structlog.testing import capture_logs

from service.clock import SystemClock
from service.db.availability import DatabaseAwayError
from service.insight.explainer import Explainer
from service.insight.waiting import Condition, Worker
from tests.support.loops import in_loop
from vllm_batch.v1 import batch_service_pb2 as pb


class Postgres:
    """Refuses to read, for a cause."""

    cause = "permission denied for table chunks"

    async def read(self, *_: object) -> None:
        raise DatabaseAwayError(self.cause)


def batch(number: int, *, is_terminal: bool = False) -> Any:
    return SimpleNamespace(id=number, models=("tiny",), is_terminal=is_terminal)


@in_loop
async def test_what_cannot_be_read() -> None:
    """Batches are shown without it, but with the refusal of all results, if there is one; each cause is logged once,
    also if batches that have ended, of which nothing is read, are shown meanwhile."""
    postgres: Any = Postgres()
    workers = [Worker("w", Condition.READY)]
    presence: Any = SimpleNamespace(workers=lambda: workers)
    explainer = Explainer(postgres, presence, SystemClock())

    async def explained() -> list[pb.Batch]:
        shown = [pb.Batch(), pb.Batch()]
        await explainer.explain([batch(1), batch(2, is_terminal=True)], shown)
        await explainer.explain([batch(2, is_terminal=True)], [pb.Batch()])
        return shown

    with capture_logs() as events:
        assert await explained() == [pb.Batch(), pb.Batch()]
        workers[0] = Worker("w", Condition.READY, refused="permission denied for table results")
        open_, ended = await explained()
        postgres.cause = "permission denied for table batches"
        await explained()
    assert open_.wait.message.endswith("worker w has: permission denied for table results")
    assert ended == pb.Batch()
    assert [event["cause"].split()[-1] for event in events] == ["chunks", "batches"]
