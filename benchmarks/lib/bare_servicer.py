"""The alternative in the benchmarks of calls: a servicer that only returns the message it was given.

`python -m benchmarks.lib.bare_servicer` reads a `Message` as a line of JSON, and prints the port on which it serves.
"""

import asyncio
import json
import subprocess
import sys
from base64 import b64decode, b64encode
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import grpc

from tests.support.stacks import ROOT
from vllm_batch.v1 import batch_service_pb2 as pb
from vllm_batch.v1 import batch_service_pb2_grpc


@dataclass(frozen=True)
class Message:
    """What GetBatch returns, StreamResults repeats, and CreateBatch is refused with; binary data is in base64."""

    batch: str = ""
    response: str = ""
    details: str = ""
    status: str = ""

    @staticmethod
    def of(batch: pb.Batch, refusal: grpc.RpcError) -> "Message":
        """The answers of a gateway to GetBatch and CreateBatch."""
        trailers: Any = refusal.trailing_metadata() or ()
        status = b64encode(dict(trailers)["grpc-status-details-bin"]).decode()
        return Message(
            batch=b64encode(batch.SerializeToString()).decode(), details=refusal.details() or "", status=status
        )

    @staticmethod
    def of_stream(response: pb.StreamResultsResponse) -> "Message":
        """One response of StreamResults."""
        return Message(response=b64encode(response.SerializeToString()).decode())


@contextmanager
def bare(message: Message) -> Iterator[str]:
    """Runs the bare servicer in a process of its own. Yields its address."""
    command = [sys.executable, "-m", "benchmarks.lib.bare_servicer"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True) as process:
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(json.dumps(asdict(message)) + "\n")
            process.stdin.flush()
            yield f"127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.terminate()


class BareServicer(batch_service_pb2_grpc.BatchServiceServicer):
    """Answers every call at once with the same message."""

    def __init__(self, message: Message) -> None:
        self._batch = pb.Batch.FromString(b64decode(message.batch))
        self._response = pb.StreamResultsResponse.FromString(b64decode(message.response))
        self._details = message.details
        self._trailers = (("grpc-status-details-bin", b64decode(message.status)), ("grpc-retry-pushback-ms", "15000"))

    async def GetBatch(self, request: pb.GetBatchRequest, context: Any) -> pb.GetBatchResponse:
        """Returns the batch, whichever was asked for."""
        return pb.GetBatchResponse(batch=self._batch)

    async def StreamResults(
        self, request: pb.StreamResultsRequest, context: Any
    ) -> AsyncIterator[pb.StreamResultsResponse]:
        """Repeats the same response until the client stops reading."""
        while True:
            yield self._response

    async def CreateBatch(self, request: pb.CreateBatchRequest, context: Any) -> pb.CreateBatchResponse:
        """Refuses."""
        await context.abort(grpc.StatusCode.UNAVAILABLE, self._details, self._trailers)
        raise AssertionError("abort raises")


async def _serve(message: Message) -> None:
    server = grpc.aio.server()
    servicer = BareServicer(message)  # type: ignore[abstract]
    batch_service_pb2_grpc.add_BatchServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    sys.stdout.write(f"{port}\n")
    sys.stdout.flush()
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(_serve(Message(**json.loads(sys.stdin.readline()))))
