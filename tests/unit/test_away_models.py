"""Whether a batch is accepted does not depend on the order of its requests, whichever models are away."""

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.api import named_models
from service.api.named_models import Named
from service.db.served import Served
from service.errors import ApiError
from service.gateway.upload import KEPT_BYTES, Upload
from service.insight.routing import Freshness, live, spread
from service.worker.intake import Rows, Sizes, inline_lines
from service.worker.offer import Offer
from tests.unit.test_routing import known, seen
from vllm_batch.v1 import batch_service_pb2 as pb

URL = "/v1/chat/completions"
LIVE = {"here", "there"}
# Of workers that are away, and one that no worker is known to serve but batches wait for.
AWAY, AWAITED, UNKNOWN = {"gone", "lost"}, "awaited", "unknown"
WORKERS = replace(
    known(
        *(seen(model, models=(model,)) for model in sorted(LIVE)),
        *(seen(model, models=(model,), age_s=600) for model in sorted(AWAY)),
    ),
    awaited=frozenset({AWAITED}),
)
SERVED = Served({model: {URL} for model in LIVE | AWAY}, frozenset(LIVE), frozenset({AWAITED}))
MODELS = st.sampled_from([*sorted(LIVE), *sorted(AWAY), AWAITED, UNKNOWN, None])
Given = Sequence[str | None]


def expected(models: Given, require_live: bool) -> set[str]:
    """What docs/front-door.md says: it speaks of the models alone, not of their order."""
    names = set(models)
    away = {"UNAVAILABLE"} if AWAITED in names or (require_live and names & AWAY) else set()
    wrong = {"INVALID_ARGUMENT"} if UNKNOWN in names else set()
    return wrong | away or ({"OK"} if names & {*LIVE, None} else {"UNAVAILABLE"})


def body(model: str | None) -> dict[str, Any]:
    return {} if model is None else {"model": model}


def file_of(models: Given, padding: int = 0) -> bytes:
    lines = [
        {"custom_id": f"c{i}", "url": URL, "body": body(model) | {"x": "x" * padding}} for i, model in enumerate(models)
    ]
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def is_live(model: str) -> bool:
    return model in LIVE


def named_by(data: bytes, cut: int) -> Named:
    """What the gateway learns of an upload that arrives in pieces of this size."""

    async def messages() -> AsyncIterator[pb.UploadBatchRequest]:
        yield pb.UploadBatchRequest(options=pb.BatchOptions())
        for at in range(0, len(data), cut):
            yield pb.UploadBatchRequest(data=data[at : at + cut])
        yield pb.UploadBatchRequest(end=pb.UploadEnd())

    return asyncio.run(Upload(messages(), "made").models(is_live))


def outcome(named: Named, data: bytes, require_live: bool = False, freshness: Freshness = WORKERS) -> str:
    """What the client gets: from the gateway, or from the worker that it tries first."""
    try:
        able = live(freshness, 0, 60, named.models, named.are_all)
        first = spread(able, freshness, 0, {}, lambda: 0.0, named.models)[0]
        offer = Offer(frozenset(first.beat.models), {URL}, SERVED, require_live)
        rows = Rows(7, offer, Sizes(1_000_000, 1 << 20, 1 << 30))
        rows.feed(data)
        rows.end()
    except ApiError as error:
        refusal = error
    else:
        return "OK"
    assert refusal.code is not grpc.StatusCode.UNAVAILABLE or refusal.metadata["models"]
    return refusal.code.name


@given(st.lists(MODELS, min_size=1, max_size=6), st.booleans(), st.integers(1, 400))
def test_an_upload_in_any_order(models: Given, require_live: bool, cut: int) -> None:
    """An upload is accepted or refused for what its lines name, in whatever order and pieces they come."""
    for order in (models, models[::-1], sorted(models, key=str)):
        data = file_of(order)
        assert outcome(named_by(data, cut), data, require_live) in expected(models, require_live)


@given(st.lists(MODELS, min_size=1, max_size=6), st.booleans())
def test_inline_requests_in_any_order(models: Given, require_live: bool) -> None:
    """CreateBatch decides as an upload of the same requests does."""
    requests = [
        pb.InlineRequest(custom_id=f"c{i}", url=URL, body_json=json.dumps(body(model)))
        for i, model in enumerate(models)
    ]
    request = pb.CreateBatchRequest(requests=requests)
    found = outcome(named_models.of_inline(request), inline_lines(request), require_live)
    assert found in expected(models, require_live)


@pytest.mark.parametrize("models", list(itertools.permutations(["here", "gone", "lost"])))
def test_an_upload_that_is_not_kept(models: Given) -> None:
    """Also where the gateway does not see all of an upload: what is away may come first, for megabytes."""
    data = file_of(models, KEPT_BYTES)
    assert outcome(named_by(data, 100_000), data) == "OK"
    alone = file_of(["gone", "lost"], KEPT_BYTES)
    assert outcome(named_by(alone, 100_000), alone) == "UNAVAILABLE"


def test_what_is_away_is_named() -> None:
    """The refusal names the models, and has reason and delay of the worker that may be back first."""
    for models in (["gone"], ["lost", "gone"], ["gone", AWAITED]):
        with pytest.raises(ApiError) as caught:
            live(WORKERS, 0, 60, frozenset(models), are_all=True)
        names = ", ".join(sorted(models))
        assert (caught.value.reason, caught.value.metadata["models"]) == ("WORKER_OFFLINE", names)
        assert caught.value.metadata["worker_id"] in AWAY
        assert caught.value.message == f"no worker serves {names} now: worker offline (last seen 600s ago)"


def test_a_worker_of_other_models_takes_over() -> None:
    """After those that serve the models of a batch all others are tried."""
    named = frozenset({"there"})
    order = spread(live(WORKERS, 0, 60, named), WORKERS, 0, {}, lambda: 0.0, named)
    assert [one.beat.worker_id for one in order] == ["there", "here"]
