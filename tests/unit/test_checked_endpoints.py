"""What becomes of a batch made from a file that another worker could run."""

import asyncio
import json
from collections.abc import Mapping, Sequence
from typing import Any
from uuid import UUID

import pytest

from service.db import file_batches, files, served
from service.db.chunks import Holder
from service.db.file_batches import Claim
from service.db.heartbeats import Phase
from service.db.limits import Limits
from service.db.served import Served
from service.worker.checking import Checking
from service.worker.intake import Intake, Sizes
from service.worker.offer import Offer
from service.worker.state import WorkerState
from tests.support.loops import in_loop

CHAT, EMBEDDINGS = "/v1/chat/completions", "/v1/embeddings"
FILE = json.dumps({"custom_id": "a", "method": "POST", "url": EMBEDDINGS, "body": {"model": "emb", "input": "x"}})


class FakePostgres:
    """Has one batch of one line for embeddings. `became`: what was done with it."""

    def __init__(self, others: Served) -> None:
        self.others = others
        self.became: list[Any] = []

    def run(self, function: Any, *arguments: Any, **_: Any) -> asyncio.Future[Any]:
        return asyncio.ensure_future(self._run(function, *arguments))

    async def _run(self, function: Any, *arguments: Any) -> Any:
        if function is file_batches.claim:
            return Claim(7, 8, EMBEDDINGS, b"digest", 1, "call", None)
        if function is files.read_piece:
            return FILE.encode()[arguments[1] :]
        if function is file_batches.fail:
            errors: Sequence[Mapping[str, Any]] = arguments[2]
            self.became += [error["code"] for error in errors]
        if function is file_batches.release:
            self.became += arguments[3]
        return {served.read: self.others, files.size: len(FILE), file_batches.clear: False}.get(function)


@pytest.mark.parametrize(
    ("others", "became"),
    [
        (Served({"emb": {EMBEDDINGS}}), "emb"),
        (Served(is_loading=True), "emb"),
        (Served(), "invalid_endpoint"),
        (Served({"large": {CHAT}}, {"large"}), "invalid_endpoint"),
    ],
)
@in_loop
async def test_an_endpoint_of_another_worker_is_waited_for(others: Served, became: object) -> None:
    """A batch for an endpoint of a worker that is away or loads waits for it; one that nobody serves has failed."""
    postgres, incarnation = FakePostgres(others), UUID(int=1)
    intake = Intake(postgres, Sizes(10, 1000, 1000), Limits(10, 10))  # type: ignore[arg-type]
    state = WorkerState("a:worker", incarnation, Phase.READY, Offer({"chat"}, {CHAT}))
    checking = Checking(postgres, intake, Holder("a:worker", incarnation, 60), state, lambda: None)  # type: ignore[arg-type]
    assert await checking._once()
    assert postgres.became == [became]
