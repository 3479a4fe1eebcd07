"""Whatever clients send, they get a clear error or a stored batch, never half of one, and the server keeps running."""

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from service.rpc import pages
from tests.support.batches import count, finished, line, lines, refused
from tests.support.made_up import methods, payloads
from tests.support.servers import Stack
from tests.support.waiting import until
from vllm_batch import CallError, Client
from vllm_batch.v1 import batch_service_pb2, batch_service_pb2_grpc, host_service_pb2, webhook_service_pb2
from vllm_batch.v1 import batch_service_pb2 as pb

CLEAR = {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND, grpc.StatusCode.RESOURCE_EXHAUSTED}
# Of a message that is right, at the wrong time.
CONFLICTS = {grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.ALREADY_EXISTS}
# One stack for all examples: they do not depend on what is stored. Fewer than for a pure function: a call costs more.
EXAMPLES = settings.default.max_examples * 6 // 10
fuzz = settings(
    max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def outcome(call: Callable[[], Any]) -> tuple[Any, CallError | None]:
    """A call's answer, or the error it ends with."""
    try:
        return call(), None
    except CallError as error:
        return None, error
    except grpc.RpcError as error:
        return None, CallError(error)


def raw(custom_id: str, body: bytes) -> bytes:
    return f'{{"custom_id": "{custom_id}", "url": "/v1/chat/completions", "body": '.encode() + body + b"}"


@pytest.mark.parametrize(
    ("wrong", "field", "description"),
    [
        (raw("a", b"[" * 200_000 + b"]" * 200_000), "line 2", "nested too deeply"),
        (raw("a", b'{"x": ' * 100_000 + b"1" + b"}" * 100_000), "line 2", "nested too deeply"),
        (raw("a", b'{"x": "\xff"}'), "line 2", "not UTF-8"),
        (raw("a", b'{"x": "\0"}'), "line 2", "not JSON"),
        (raw("a\\u0000", b"{}"), "line 2: custom_id", "NUL"),
        (raw("a", b'{"stream": true}'), "line 2: body.stream", "not streamed"),
        (raw("a", b'{"model": ["tiny"]}'), "line 2: body.model", "Expected `str | null`"),
        (b"\0" * 100, "line 2", "not JSON"),
    ],
)
def test_hostile_lines(serving: Stack, client: Client, wrong: bytes, field: str, description: str) -> None:
    """Deep nesting, broken UTF-8, NUL bytes and wrong types are reported with their line, and nothing is stored."""
    error = refused(lambda: client.submit_lines([line("good"), wrong]))
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert error.violations[0][0] == field
    assert description in error.violations[0][1]
    assert count(serving, "requests") == 0


@pytest.mark.parametrize("name", ["x" * 512, "😀" * 512])
def test_many_long_errors(serving: Stack, client: Client, name: str) -> None:
    """Each of twenty repeated names is told, however long it is."""
    error = refused(lambda: client.submit_lines([line(name)] * 21))
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert [field for field, _ in error.violations] == [f"line {number}: custom_id" for number in range(2, 22)]
    assert count(serving, "requests") == 0


def test_huge_numbers_are_the_engines_affair(serving: Stack, client: Client) -> None:
    """Numbers beyond any type are stored as given; if the engine rejects one, only that request fails."""
    huge = [raw("a", b'{"max_tokens": 1e99999}'), raw("b", b'{"x": ' + b"9" * 100_000 + b"}"), line("c")]
    done = finished(client, client.submit_lines(huge).id)
    assert done.state == pb.BATCH_STATE_COMPLETED
    assert done.counts.completed + done.counts.failed == 3
    statuses = [result.response.status_code for result in client.results(done.id)]
    assert (statuses[0], statuses[2]) == (400, 200)


def test_fuzzed_files(serving: Stack, client: Client) -> None:
    """A file with random bytes changed is stored whole, or rejected with its line and nothing stored."""
    good = b"".join(lines(5))

    @fuzz
    @given(
        changes=st.lists(st.tuples(st.integers(0, len(good) - 1), st.binary(max_size=3)), min_size=1, max_size=4),
        # Mostly whole: nearly every cut is refused alone for ending in the middle of a line.
        cut=st.one_of(st.just(len(good)), st.just(len(good)), st.integers(0, len(good))),
    )
    def check(changes: list[tuple[int, bytes]], cut: int) -> None:
        data = bytearray(good)
        for place, new in changes:
            data[place : place + len(new)] = new
        before = count(serving, "batches"), count(serving, "requests")
        batch, error = outcome(lambda: client.submit_lines([bytes(data[:cut])]))
        if error is None:
            assert batch.counts.total == count(serving, "requests") - before[1]
        else:
            assert error.code in CLEAR, error
            assert error.violations
            places = [field for field, _ in error.violations]
            assert all(place.startswith(("line ", "requests", "file")) for place in places), places
            assert (count(serving, "batches"), count(serving, "requests")) == before

    check()


SERVICES = methods(batch_service_pb2, host_service_pb2, webhook_service_pb2)


def test_fuzzed_messages(serving: Stack, client: Client) -> None:
    """Any message, or any bytes as one, ends its call with a clear status, and the server keeps working."""
    ended = finished(client, client.submit_lines(lines(3)).id).id
    real = {"batch_id": [ended], "page_token": made_tokens(serving, ended), "resume_token": made_tokens(serving, ended)}
    # As many of each message as of bytes: what is no message is refused before anything reads it.
    made = {
        path: payloads(method.input_type, {} if method.name == "DeleteBatch" else real)
        for path, method in SERVICES.items()
    }
    calls = st.sampled_from(sorted(SERVICES)).flatmap(
        lambda path: st.tuples(st.just(path), st.lists(made[path], min_size=1, max_size=4))
    )
    seen: set[tuple[str, grpc.StatusCode | None]] = set()
    with grpc.insecure_channel(serving.target) as channel:

        @fuzz
        @given(calls)
        @example(("/vllm_batch.v1.BatchService/ListBatches", [b""]))
        @example(("/vllm_batch.v1.BatchService/GetBatch", [b""]))
        def check(one: tuple[str, list[bytes]]) -> None:
            path, messages = one
            method = SERVICES[path]
            kind = ("stream" if method.client_streaming else "unary", "stream" if method.server_streaming else "unary")
            call: Any = getattr(channel, "_".join(kind))(path)
            sent = iter(messages) if method.client_streaming else messages[0]
            is_stream = method.server_streaming
            _, error = outcome(lambda: [*call(sent, timeout=20)] if is_stream else call(sent, timeout=20))
            seen.add((method.name, error and error.code))
            assert error is None or error.code in {*CLEAR, *CONFLICTS}, (path, messages, error)

        check()
    # Some have got past the checks of their fields, and some have not: beside the two examples, among many.
    accepted = {name for name, code in seen if code is None}
    assert "ListBatches" in accepted
    assert ("GetBatch", grpc.StatusCode.INVALID_ARGUMENT) in seen
    assert EXAMPLES < 1000 or len(accepted) > 5
    assert finished(client, client.submit_lines(lines(1)).id).counts.completed == 1
    assert all(server.process.poll() is None for server in serving.servers)
    assert not [event for server in serving.servers for event in server.events("call_failed")]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("BatchService/ListBatches", pb.ListBatchesRequest(tenant="a\0b")),
        ("WebhookService/ListDeliveries", webhook_service_pb2.ListDeliveriesRequest(tenant="a\0b")),
        ("HostService/DrainHost", host_service_pb2.DrainHostRequest(name="x" * 50_000)),
        ("BatchService/CreateBatch", pb.CreateBatchRequest(requests=[pb.InlineRequest(custom_id="a")] * 1000)),
        (
            "BatchService/CreateBatch",
            pb.CreateBatchRequest(
                options=pb.BatchOptions(metadata={f"{number:\u00e9>65}": "" for number in range(100)}),
                requests=[pb.InlineRequest(custom_id="a", url="/v1/chat/completions", body_json="{}")],
            ),
        ),
    ],
)
def test_messages_that_were_made_up(serving: Stack, path: str, message: Any) -> None:
    """NUL in a tenant, and names or errors that are too long or too many for the end of a call, are refused as such."""
    with grpc.insecure_channel(serving.target) as channel:
        call: Any = channel.unary_unary(f"/vllm_batch.v1.{path}")
        _, error = outcome(lambda: call(message.SerializeToString(), timeout=20))
    assert error is not None
    assert error.code in {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND}
    assert not [event for server in serving.servers for event in server.events("call_failed")]


def made_tokens(serving: Stack, batch_id: str) -> list[str]:
    """Tokens that the server has issued, of each kind."""
    with grpc.insecure_channel(serving.target) as channel:
        stub = batch_service_pb2_grpc.BatchServiceStub(channel)
        page = stub.ListBatches(pb.ListBatchesRequest(page_size=1), timeout=20)
        found = [page.next_page_token, pages.token("batches", 5), pages.token_after("hosts", "a")]
        for order in (pb.RESULT_ORDER_INPUT, pb.RESULT_ORDER_FINISHED):
            for which in pb.ResultFilter.values():
                asked = pb.StreamResultsRequest(batch_id=batch_id, order=order, filter=which)
                found += [response.resume_token for response in stub.StreamResults(asked, timeout=20)]
    return sorted(set(filter(None, found)))


KINDS = ("batches", "index", "sequence", "index-failed", "sequence-succeeded", "")
NUMBERS = st.integers(-1, 2**64).map(str) | st.sampled_from([str(2**62 - 1), "9" * 5000, "1_0", " 1", "²", "0x1", ""])


def test_fuzzed_tokens(serving: Stack, client: Client) -> None:
    """Any tokens, names and states are INVALID_ARGUMENT or NOT_FOUND, never an internal error.

    Most tokens are nearly right: one that was issued with a character changed, or one of any kind, place and offset.
    """
    batch = finished(client, client.submit_lines(lines(3)).id)
    issued = st.sampled_from(made_tokens(serving, batch.id))
    changed = st.builds(
        lambda token, place, other: token[: place % (len(token) + 1)] + other + token[place % (len(token) + 1) + 1 :],
        issued,
        st.integers(0, 40),
        st.sampled_from(["", *"AZaz09-_=+/", "é"]),
    )
    made = st.builds(pages.token_after, st.sampled_from(KINDS), st.lists(NUMBERS, max_size=3).map(":".join))
    with grpc.insecure_channel(serving.target) as channel:
        stub = batch_service_pb2_grpc.BatchServiceStub(channel)

        @fuzz
        @given(
            text=st.one_of(issued, changed, made, st.text(max_size=40)),
            number=st.integers(-(2**31), 2**31 - 1) | st.integers(-1, 1001),
            filter=st.sampled_from(pb.ResultFilter.values()),
            order=st.sampled_from(pb.ResultOrder.values()),
            format=st.sampled_from(pb.ResultFormat.values()),
            name=st.text(max_size=20) | NUMBERS.map("batch_{}".format),
        )
        def check(text: str, number: int, filter: Any, order: Any, format: Any, name: str) -> None:
            asked = pb.StreamResultsRequest(
                batch_id=batch.id, resume_token=text, filter=filter, order=order, format=format
            )
            for call in (
                lambda: stub.ListBatches(pb.ListBatchesRequest(page_token=text, page_size=number), timeout=20),
                lambda: stub.ListBatches(pb.ListBatchesRequest(states=[number]), timeout=20),  # type: ignore[list-item]
                lambda: list(stub.StreamResults(asked, timeout=20)),
                lambda: stub.GetResult(pb.GetResultRequest(batch_id=batch.id, custom_id=text), timeout=20),
                lambda: stub.GetBatch(pb.GetBatchRequest(batch_id=name), timeout=20),
            ):
                _, error = outcome(call)
                assert error is None or error.code in CLEAR, (text, number, name, error)

        check()
    assert not [event for server in serving.servers for event in server.events("call_failed")]


def test_client_vanishes_in_the_middle_of_an_upload(serving: Stack, client: Client) -> None:
    """An upload that is cancelled, or lacks its end message, leaves nothing behind and blocks nothing."""
    with grpc.insecure_channel(serving.target) as channel:
        stub = batch_service_pb2_grpc.BatchServiceStub(channel)
        for _ in range(3):
            is_cancelled = threading.Event()

            def pieces(is_cancelled: threading.Event = is_cancelled) -> Iterator[pb.UploadBatchRequest]:
                yield pb.UploadBatchRequest(options=pb.BatchOptions())
                # Whole lines: nothing about them shows that more were to follow.
                yield pb.UploadBatchRequest(data=b"".join(lines(400, filler="x" * 20_000)))
                is_cancelled.wait(30)

            call: Any = stub.UploadBatch.future(pieces(), timeout=30)
            until(lambda: count(serving, "requests") > 0, "the upload to be in progress")
            call.cancel()
            is_cancelled.set()
            until(lambda: count(serving, "requests") == 0, "the upload to be discarded")
        unended = iter([pb.UploadBatchRequest(options=pb.BatchOptions()), pb.UploadBatchRequest(data=line("a"))])
        error = refused(lambda: client._retry(lambda: stub.UploadBatch(unended, timeout=30)))
        assert [field for field, _ in error.violations] == ["end"]
    assert (count(serving, "batches"), count(serving, "requests")) == (0, 0)
    assert finished(client, client.submit_lines(lines(1)).id).counts.completed == 1


def test_truncated_upload(serving: Stack, client: Client) -> None:
    """A file that ends in the middle of a line is rejected with that line's number, and nothing is stored."""
    error = refused(lambda: client.submit_lines([b"".join(lines(10))[:-20]]))
    assert error.violations[0][0] == "line 10"
    assert count(serving, "requests") == 0


def test_bodies_survive_as_given(serving: Stack, client: Client) -> None:
    """Any JSON body reaches the engine byte for byte: the simulated answer is a hash of the body."""

    @settings(fuzz, max_examples=EXAMPLES // 12)
    @given(st.lists(st.text(max_size=20), min_size=20, max_size=100))
    def check(texts: list[str]) -> None:
        bodies = [json.dumps({"x": text}, ensure_ascii=bool(place % 2)) for place, text in enumerate(texts)]
        given = [raw(f"c{place}", body.encode()) for place, body in enumerate(bodies)]
        batch = client.submit_lines(given)
        finished(client, batch.id)
        for result, body in zip(client.results(batch.id), bodies, strict=True):
            answer = json.loads(result.response.body_json)
            assert answer["choices"][0]["message"]["content"] == hashlib.sha256(body.encode()).hexdigest()

    check()
