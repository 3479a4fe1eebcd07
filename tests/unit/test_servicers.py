"""What gateway and worker do with any message: nothing reaches Postgres that it would refuse, and refusals say why."""

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import grpc
from google.protobuf.message import Message
from google.protobuf.struct_pb2 import Struct
from hypothesis import example, given
from hypothesis import strategies as st

from service.api import messages
from service.api.servicer import BatchServicer
from service.auth.callers import ANYBODY
from service.db.limits import Limits
from service.errors import ApiError
from service.gateway.webhook_servicer import WebhookServicer
from service.insight.host_servicer import HostServicer
from service.machine import Place
from service.rpc import call_context
from service.tenants import Quotas
from service.worker.intake import Rows, Sizes, inline_lines, inline_place
from service.worker.offer import Offer
from tests.support.made_up import check_taken, methods
from tests.support.made_up import messages as made_up
from vllm_batch.v1 import batch_service_pb2 as pb
from vllm_batch.v1 import host_service_pb2, webhook_service_pb2

SERVICES = methods(pb, host_service_pb2, webhook_service_pb2)
# Those are about what is stored; the others are the gateway's, or the worker's alone.
STORED = sorted({*SERVICES} - {f"/vllm_batch.v1.BatchService/{name}Batch" for name in ("Create", "Upload")})
STORED.remove("/vllm_batch.v1.BatchService/GetServiceStatus")
REAL = {"batch_id": ["batch_1", "batch_9223372036854775807"], "delivery_id": ["evt_" + "0" * 32]}
NO_WORKERS: Any = SimpleNamespace(place=Place(), unreached=dict)


class Nothing:
    """A database in which nothing is found."""

    async def read(self, function: Any, *args: Any) -> Any:
        """Takes only what Postgres takes."""
        check_taken(args)
        return None if function.__name__ in ("get", "read_one", "cancel", "delete", "retry") else []

    run = run_idempotent = read


def answer(name: str, message: Message) -> None:
    """Calls the method as a server does."""
    service, method = name.rpartition(".")[2].split("/")
    database, limits = Nothing(), Limits(1, 1)
    servicers: dict[str, Any] = {
        "BatchService": BatchServicer(database, limits),  # type: ignore[arg-type]
        "HostService": HostServicer(database, 60, NO_WORKERS),  # type: ignore[arg-type]
        "WebhookService": WebhookServicer(database, None, [], Quotas),  # type: ignore[arg-type]
    }
    called = getattr(servicers[service], method)

    async def call() -> None:
        call_context.begin("/test", ()).caller = ANYBODY
        answers = called(message, None)
        if isinstance(answers, AsyncIterator):
            assert [each async for each in answers]
        else:
            assert await answers is not None

    asyncio.run(call())


@given(
    st.sampled_from(STORED).flatmap(
        lambda name: st.tuples(
            st.just(name),
            made_up(SERVICES[name].input_type, REAL),
        )
    )
)
@example(("/vllm_batch.v1.BatchService/ListBatches", pb.ListBatchesRequest(tenant="\0")))
@example(("/vllm_batch.v1.WebhookService/ListDeliveries", webhook_service_pb2.ListDeliveriesRequest(tenant="\0")))
def test_any_message(given: tuple[str, Any]) -> None:
    """Any message about what is stored is answered, or refused with a code and a sentence for whoever sent it."""
    refusal = None
    try:
        answer(*given)
    except ApiError as error:
        refusal = error
    codes = (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND)
    assert refusal is None or (refusal.code in codes and refusal.message)


# Of requests made up from the descriptor alone hardly any is right, and no batch of several.
RIGHT = st.builds(
    pb.InlineRequest,
    custom_id=st.text(min_size=1, max_size=5),
    method=st.sampled_from(["", "POST"]),
    url=st.just("/v1/chat/completions"),
    body=made_up(Struct.DESCRIPTOR),
) | st.builds(
    pb.InlineRequest,
    custom_id=st.text("ab\r\n\t\\", min_size=1, max_size=9),
    url=st.just("/v1/chat/completions"),
    body_json=st.sampled_from(["{}", "{\n}", '{"n": 1e999, "x": "\\n"}', '{"model": "tiny"}', ' {"model": null}\t']),
)


@given(
    st.just(pb.BatchOptions()) | made_up(pb.BatchOptions.DESCRIPTOR),
    st.lists(RIGHT, max_size=4) | st.lists(made_up(pb.InlineRequest.DESCRIPTOR) | RIGHT, max_size=4),
)
def test_any_inline_batch(options: Any, requests: list[Any]) -> None:
    """Any inline requests and options become one row each, with nothing in them that Postgres would refuse, or none."""
    asked = pb.CreateBatchRequest(options=options, requests=requests)
    refusal, copied = None, b""
    try:
        taken = messages.options(asked.options)
        rows = Rows(7, Offer({"tiny"}, {"/v1/chat/completions"}), Sizes(100, 1 << 26, 1 << 30), inline_place)
        copied = rows.feed(inline_lines(asked)) + rows.end()
    except ApiError as error:
        refusal = error
    if refusal is not None:
        assert refusal.code is grpc.StatusCode.INVALID_ARGUMENT
        assert all(violation.field.startswith(("options.", "requests")) for violation in refusal.violations)
        return
    assert copied.count(b"\n") == rows.total == len(asked.requests) > 0
    assert b"\0" not in copied
    assert "\0" not in "".join([taken.request_id or "", *taken.metadata, *taken.metadata.values()])
    assert taken.completion_window_s is None or 0 < taken.completion_window_s < 1e9


BODIES = st.sampled_from(
    ["{}", "{\n}", '{"x":\r\n[1,\n2]}', '\t{"n": 1e999, "x": "\\n"}', '{"model": "tiny"} ', '{"x": "\u2028\x85"}']
)


@given(
    st.lists(st.tuples(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=9), BODIES))
)
def test_inline_requests_that_are_right(given: list[tuple[str, str]]) -> None:
    """Whatever names and blanks right inline requests have, each becomes a row, with its body but for line breaks."""
    asked = pb.CreateBatchRequest()
    for number, (name, body) in enumerate(given):
        asked.requests.add(custom_id=f"{number}{name}", url="/v1/chat/completions", body_json=body)
    rows = Rows(7, Offer({"tiny"}, {"/v1/chat/completions"}), Sizes(100, 1 << 26, 1 << 30), inline_place)
    copied = rows.feed(inline_lines(asked)) if given else b""
    assert rows.total == len(given) == copied.count(b"\n")
