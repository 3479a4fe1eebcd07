"""What both clients send to submit a batch."""

from __future__ import annotations

import json
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO, TypeAlias, TypedDict

from vllm_batch.v1 import batch_service_pb2 as pb

PIECE_BYTES = 256 << 10

# One request: a line of OpenAI's batch format as it is, or what is made one.
Line: TypeAlias = bytes | str | Mapping[str, Any]


class SubmitOptions(TypedDict, total=False):
    """What may be said about a new batch."""

    # Submitting the same under the same name gives the same batch. One is made when none is given.
    request_id: str
    # Kept with the batch.
    metadata: Mapping[str, str]
    # From -100 to 100; higher runs first.
    priority: int
    # The batch expires when it is not complete after this many seconds; None: never.
    completion_window_s: float | None
    # Told how many bytes have gone out, from a thread of gRPC's; starts again from 0 with each try.
    on_sent: Callable[[int], None]


class Upload:
    """One submission of a JSONL file that can be rewound: the same batch, however often it has to be tried."""

    def __init__(self, file: BinaryIO, options: SubmitOptions) -> None:
        self._file = file
        self._on_sent: Callable[[int], None] = options.get("on_sent", lambda sent: None)
        self._options = pb.BatchOptions(
            # Made once, before the first try: it is what makes the others harmless.
            request_id=options.get("request_id") or str(uuid.uuid4()),
            metadata=dict(options.get("metadata") or {}),
            priority=options.get("priority", 0),
        )
        window_s = options.get("completion_window_s")
        if window_s is not None:
            self._options.completion_window.FromMilliseconds(round(window_s * 1000))
        self._lock = threading.Lock()
        self._try = 0

    def messages(self) -> Iterator[pb.UploadBatchRequest]:
        """What is sent at one try. Ends without an end when the next try has begun."""
        self._try += 1
        return self._messages(self._try)

    def _messages(self, number: int) -> Iterator[pb.UploadBatchRequest]:
        yield pb.UploadBatchRequest(options=self._options)
        sent = 0
        # A thread of gRPC's may still be reading for the try before: it must not take bytes from this one.
        while (piece := self._piece(number, sent)) is not None:
            if not piece:
                yield pb.UploadBatchRequest(end=pb.UploadEnd())
                return
            yield pb.UploadBatchRequest(data=piece)
            sent += len(piece)
            self._on_sent(sent)

    def _piece(self, number: int, sent: int) -> bytes | None:
        """The next bytes; b"" at the end of the file; None when another try has begun."""
        with self._lock:
            if number != self._try:
                return None
            if not sent:
                self._file.seek(0)
            return self._file.read(PIECE_BYTES)


def to_bytes(line: Line) -> bytes:
    """One line with its end."""
    if isinstance(line, Mapping):
        line = json.dumps(line)
    data = line.encode() if isinstance(line, str) else line
    return data if data.endswith(b"\n") else data + b"\n"
