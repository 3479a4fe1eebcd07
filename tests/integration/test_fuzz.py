"""Whatever clients send, they get a clear error or a stored batch, never half of one, and the server keeps running."""

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.batches import count, finished, line, lines, refused
from tests.support.servers import Stack
from tests.support.waiting import until
from vllm_batch import CallError, Client
from vllm_batch.v1 import batch_service_pb2 as pb
from vllm_batch.v1 import batch_service_pb2_grpc

SERVICE = "/vllm_batch.v1.BatchService"
CLEAR = {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND, grpc.StatusCode.RESOURCE_EXHAUSTED}
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
        cut=st.integers(0, len(good)),
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


def test_fuzzed_messages(serving: Stack, client: Client) -> None:
    """Random bytes as the message of any method end that call with a clear status, and the server keeps working."""
    calls = {method.name: method for method in pb.DESCRIPTOR.services_by_name["BatchService"].methods}

    @fuzz
    @given(name=st.sampled_from(sorted(calls)), data=st.binary(max_size=300))
    def check(name: str, data: bytes) -> None:
        with grpc.insecure_channel(serving.target) as channel:
            method = calls[name]
            kind = ("stream" if method.client_streaming else "unary", "stream" if method.server_streaming else "unary")
            call: Any = getattr(channel, "_".join(kind))(f"{SERVICE}/{name}")
            given = iter([data]) if method.client_streaming else data
            is_stream = method.server_streaming
            _, error = outcome(lambda: [*call(given, timeout=20)] if is_stream else call(given, timeout=20))
            assert error is None or error.code in CLEAR, (name, data, error)

    check()
    assert finished(client, client.submit_lines(lines(1)).id).counts.completed == 1
    assert all(server.process.poll() is None for server in serving.servers)
    assert not [event for server in serving.servers for event in server.events("call_failed")]


def test_fuzzed_tokens(serving: Stack, client: Client) -> None:
    """Random tokens, names and states are INVALID_ARGUMENT or NOT_FOUND, never an internal error."""
    batch = client.submit_lines(lines(3))
    with grpc.insecure_channel(serving.target) as channel:
        stub = batch_service_pb2_grpc.BatchServiceStub(channel)

        @fuzz
        @given(text=st.text(max_size=40), number=st.integers(-(2**31), 2**31 - 1))
        def check(text: str, number: int) -> None:
            for call in (
                lambda: stub.ListBatches(pb.ListBatchesRequest(page_token=text, page_size=number), timeout=20),
                lambda: stub.ListBatches(pb.ListBatchesRequest(states=[number]), timeout=20),  # type: ignore[list-item]
                lambda: list(stub.StreamResults(pb.StreamResultsRequest(batch_id=batch.id, resume_token=text))),
                lambda: stub.GetResult(pb.GetResultRequest(batch_id=batch.id, custom_id=text), timeout=20),
                lambda: stub.GetBatch(pb.GetBatchRequest(batch_id=text), timeout=20),
                lambda: stub.DeleteBatch(pb.DeleteBatchRequest(batch_id=text), timeout=20),
            ):
                _, error = outcome(call)
                assert error is None or error.code in CLEAR, (text, number, error)

        check()


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
