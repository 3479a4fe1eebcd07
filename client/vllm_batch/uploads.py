"""The messages that both clients send to submit a batch."""

from __future__ import annotations

import json
import os
import reprlib
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, BinaryIO, Literal, TypeAlias, TypedDict

from vllm_batch import requests
from vllm_batch.errors import CallError
from vllm_batch.v1 import batch_service_pb2 as pb

PIECE_BYTES = 256 << 10

# One request: a line in OpenAI's batch format, or a dict that is serialised as one.
Line: TypeAlias = bytes | str | Mapping[str, Any]


_ORDERS = {"prefix": pb.RUN_ORDER_UNSPECIFIED, "input": pb.RUN_ORDER_INPUT}


class SubmitOptions(TypedDict, total=False):
    """Options of a new batch."""

    # Idempotency key: submitting the same requests with the same key returns the same batch. Default: a new UUID.
    request_id: str
    # Stored with the batch and returned as given.
    metadata: Mapping[str, str]
    # From -100 to 100; higher runs first.
    priority: int
    # The batch expires if it is not complete after this many seconds; None: never.
    completion_window_s: float | None
    # In which order its requests run. "prefix", the default: those with prompts that begin alike together; "input": as
    # they are in the file.
    order: Literal["prefix", "input"]
    # The URL that receives the event of its end, instead of the tenant's own target.
    webhook: str
    # Refuse it (UNAVAILABLE) if it names a model that no worker serves now, instead of running the rest of it first.
    require_live: bool
    # Called with the number of bytes sent, from a gRPC thread; starts at 0 again with each attempt.
    on_sent: Callable[[int], None]


class Upload:
    """One submission of a seekable JSONL file: the same batch, however many attempts it takes."""

    def __init__(self, file: BinaryIO, options: SubmitOptions) -> None:
        # Without a type checker nobody else says so, and without its request_id a batch would be made twice.
        unknown = sorted(set(options) - set(SubmitOptions.__annotations__))
        if unknown:
            raise TypeError(f"submit has no option {unknown[0]!r}; it has {', '.join(SubmitOptions.__annotations__)}")
        order = options.get("order", "prefix")
        if order not in tuple(_ORDERS):
            raise ValueError(f"order is {order!r}, and must be one of {', '.join(map(repr, _ORDERS))}")
        if not hasattr(file, "seek"):
            raise TypeError(f"give a file that is open in binary mode, not {type(file).__name__}")
        self._file = file
        self._on_sent: Callable[[int], None] = options.get("on_sent") or (lambda sent: None)
        self._options = requests.message(
            pb.BatchOptions,
            # Chosen once, before the first attempt: it makes further attempts harmless.
            request_id=options.get("request_id") or str(uuid.uuid4()),
            metadata=options.get("metadata") or {},
            priority=options.get("priority", 0),
            order=_ORDERS[order],
            webhook=options.get("webhook", ""),
            require_live=options.get("require_live", False),
        )
        window_s = options.get("completion_window_s")
        if window_s is not None:
            try:
                self._options.completion_window.FromMilliseconds(round(window_s * 1000))
            except (TypeError, ValueError, OverflowError) as error:
                kind = TypeError if isinstance(error, TypeError) else ValueError
                raise kind(f"completion_window_s cannot be {window_s!r}: it is a number of seconds") from None
        self._lock = threading.Lock()
        self._attempt = 0
        self._failure: Exception | None = None
        self._state: object = None

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Around the call that sends it: what reading the file raised, not the UNKNOWN that gRPC makes of it."""
        try:
            yield
        except CallError:
            if self._failure is not None:
                raise self._failure from None
            raise

    def messages(self) -> Iterator[pb.UploadBatchRequest]:
        """The messages of one attempt. Stops short, without an end message, once the next attempt has begun."""
        self._attempt += 1
        return self._messages(self._attempt)

    def _messages(self, number: int) -> Iterator[pb.UploadBatchRequest]:
        yield pb.UploadBatchRequest(options=self._options)
        sent = 0
        try:
            # A gRPC thread may still be reading for the previous attempt: it must not take bytes from this one.
            while (piece := self._piece(number, sent)) is not None:
                if not piece:
                    yield pb.UploadBatchRequest(end=pb.UploadEnd())
                    return
                yield pb.UploadBatchRequest(data=piece)
                sent += len(piece)
                self._on_sent(sent)
        except Exception as error:
            self._failure = error
            raise

    def _piece(self, number: int, sent: int) -> bytes | None:
        """The next bytes; b"" at the end of the file; None once another attempt has begun."""
        with self._lock:
            if number != self._attempt:
                return None
            if not sent:
                self._file.seek(0)
                self._state = _state(self._file)
            piece = self._file.read(PIECE_BYTES)
            # Part of the old and part of the new text may be valid lines, too.
            if not piece and self._state != _state(self._file):
                stored = "nothing was stored: submit it again"
                if number > 1:
                    key = self._options.request_id
                    stored = f"an earlier attempt may be stored: submitting it again as {key} tells"
                raise OSError(f"the file changed while it was being sent; {stored}")
        if not isinstance(piece, bytes):
            raise TypeError("the file must be opened in binary mode, as open(path, 'rb') does")
        return piece


def _state(file: BinaryIO) -> object:
    """What differs once a file on a disk has been written to; None for what is none."""
    try:
        found = os.fstat(file.fileno())
    except (AttributeError, OSError):
        return None
    return found.st_size, found.st_mtime_ns


def check_lines(lines: object) -> None:
    """Raises TypeError for one text, whose characters would be taken for lines."""
    if isinstance(lines, str | bytes | Mapping):
        raise TypeError(f"give the lines as a list, not as one {type(lines).__name__}")


def to_bytes(line: Line) -> bytes:
    """One line, newline included."""
    if isinstance(line, Mapping):
        line = json.dumps(dict(line))
    if not isinstance(line, str | bytes | bytearray):
        raise TypeError(f"a line is a dict, a str or bytes, and not {reprlib.repr(line)}")
    data = line.encode() if isinstance(line, str) else line
    return data if data.endswith(b"\n") else data + b"\n"
