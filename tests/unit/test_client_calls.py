"""What both clients share: when a call is tried again, and what is sent at each try."""

import asyncio
import io
from collections.abc import Callable

import grpc
import pytest
import tenacity

from service.errors import ApiError
from vllm_batch.calls import CallError, retry_rules
from vllm_batch.uploads import Upload, to_bytes
from vllm_batch.v1 import batch_service_pb2 as pb


class Failure(grpc.RpcError):
    """As gRPC raises it for an error of the server."""

    def __init__(self, code: grpc.StatusCode, delay_s: float | None = None) -> None:
        self.error = ApiError(code, "no", "REASON", {"a": "b"}, delay_s)

    def code(self) -> grpc.StatusCode:
        return self.error.code

    def details(self) -> str:
        return self.error.message

    def trailing_metadata(self) -> object:
        return self.error.trailing_metadata


def sync(call: Callable[[], str], rules: dict[str, object]) -> str:
    return tenacity.Retrying(**rules)(call)  # type: ignore[arg-type]


def aio(call: Callable[[], str], rules: dict[str, object]) -> str:
    async def once() -> str:
        return call()

    return asyncio.run(tenacity.AsyncRetrying(**rules)(once))  # type: ignore[arg-type]


@pytest.mark.parametrize("retry", [sync, aio])
def test_unavailable_alone_is_tried_again(retry: Callable[[Callable[[], str], dict[str, object]], str]) -> None:
    """After the delay that the server named, or one of our own that grows; any other error ends it at once."""
    waits: list[float] = []
    unavailable = grpc.StatusCode.UNAVAILABLE
    failures = [Failure(unavailable, 0.01), Failure(unavailable, 0.02), Failure(unavailable)]

    def call() -> str:
        if failures:
            raise CallError(failures.pop(0))
        return "done"

    rules = retry_rules(60, lambda error, delay_s: waits.append(delay_s))
    assert retry(call, rules) == "done"
    assert waits == [0.01, 0.02, 2.0]
    for code in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.INTERNAL):
        failures[:] = [Failure(code, 0.01)]
        with pytest.raises(CallError) as caught:
            retry(call, rules)
        assert (caught.value.code, caught.value.reason, caught.value.metadata) == (code, "REASON", {"a": "b"})
    assert len(waits) == 3


def test_patience_ends() -> None:
    """A server that stays away is not asked for ever."""
    with pytest.raises(CallError):
        sync(
            lambda: (_ for _ in ()).throw(CallError(Failure(grpc.StatusCode.UNAVAILABLE, 0.01))), retry_rules(0, print)
        )


def test_each_try_sends_the_same() -> None:
    """The whole file again, under the one request_id; what still reads for the try before gets nothing more."""
    file = io.BytesIO(b"x" * 700_000)
    upload = Upload(file, {"priority": 3})
    first = upload.messages()
    begun = [next(first), next(first)]
    second = list(upload.messages())
    assert second[0] == begun[0]
    assert second[0].options.request_id
    assert second[0].options.priority == 3
    assert b"".join(message.data for message in second) == file.getvalue()
    assert second[-1] == pb.UploadBatchRequest(end=pb.UploadEnd())
    assert list(first) == []


def test_lines() -> None:
    """Requests may be dicts or lines, with or without their ends."""
    assert [to_bytes(line) for line in ({"a": "ü"}, "b", b"c\n")] == [b'{"a": "\\u00fc"}\n', b"b\n", b"c\n"]
