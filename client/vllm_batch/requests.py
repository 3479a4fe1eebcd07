"""Requests that both clients build in the same way. Pure, but for the random name of a retry."""

from __future__ import annotations

import operator
import reprlib
import uuid
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

from google.protobuf.message import Message

from vllm_batch.v1 import batch_service_pb2 as pb
from vllm_batch.v1 import webhook_service_pb2 as wpb

MAX_PAGE_SIZE = 1000
# A host has more to it than a batch.
HOSTS_PAGE = 200


M = TypeVar("M", bound=Message)
Request = TypeVar("Request", pb.ListBatchesRequest, wpb.ListDeliveriesRequest)


def message(kind: type[M], **fields: Any) -> M:
    """A message with these fields. Raises TypeError or ValueError for a value that a field cannot have, by its name."""
    # An iterator can be read once.
    fields = {name: [*value] if isinstance(value, Iterator) else value for name, value in fields.items()}
    try:
        return kind(**fields)
    except UnicodeError:
        # It shows the text.
        raise
    except (TypeError, ValueError):
        for name, value in fields.items():
            try:
                kind(**{name: value})
            except TypeError:
                raise TypeError(f"{name} cannot be {reprlib.repr(value)}") from None
            except ValueError as error:
                raise ValueError(f"{name} cannot be {reprlib.repr(value)}: {error}") from None
        raise


class Listing(Generic[Request]):
    """Pages with up to `limit` entries in all: send `request` and tell what came of it, until `is_complete`."""

    def __init__(self, request: Request, limit: int) -> None:
        try:
            self._left = operator.index(limit)
        except TypeError:
            raise TypeError(f"limit must be a whole number, not {limit!r}") from None
        if self._left < 0:
            raise ValueError(f"limit must be 0 or more, not {limit}")
        self._is_last = False
        self.request: Request = request
        self.request.page_size = self._page_size

    @property
    def is_complete(self) -> bool:
        """True when there is no further page to ask for."""
        return self._is_last or self._left <= 0

    def came(self, count: int, next_page_token: str) -> None:
        """A page with `count` entries came; `request` asks for the next one from now on."""
        self._left -= count
        self._is_last = not next_page_token
        self.request.page_size, self.request.page_token = self._page_size, next_page_token

    @property
    def _page_size(self) -> int:
        return max(0, min(self._left, MAX_PAGE_SIZE))


def results(
    batch_id: str,
    *,
    follow: bool,
    order: str,
    resume_token: str = "",
    as_lines: bool = False,
    filter: str = "RESULT_FILTER_UNSPECIFIED",
) -> pb.StreamResultsRequest:
    """Asks for the results of a batch, as messages or as lines of OpenAI's batch output."""
    form = pb.RESULT_FORMAT_JSONL if as_lines else pb.RESULT_FORMAT_UNSPECIFIED
    return message(
        pb.StreamResultsRequest,
        batch_id=batch_id,
        order=order,
        follow=follow,
        resume_token=resume_token,
        format=form,
        filter=filter,
    )


def line(batch_id: str, result: pb.Result) -> pb.StreamResultsRequest:
    """Asks for results as lines, beginning with one whose body was left out of its message."""
    return results(
        batch_id, follow=False, order="RESULT_ORDER_INPUT", resume_token=result.response.line_token, as_lines=True
    )


class Lines:
    """Joins lines that arrive in pieces."""

    def __init__(self) -> None:
        self._begun: list[bytes] = []

    def take(self, piece: bytes) -> bytes:
        """The whole lines that this completes; empty while there is none."""
        if self._begun or not piece.endswith(b"\n"):
            self._begun.append(piece)
            if not piece.endswith(b"\n"):
                return b""
            piece = b"".join(self._begun)
            self._begun.clear()
        return piece


def retry(batch_id: str, request_id: str) -> pb.RetryBatchRequest:
    """Asks to retry a batch, under a request_id of its own: however often this is sent, it creates one batch."""
    return message(pb.RetryBatchRequest, batch_id=batch_id, request_id=request_id or str(uuid.uuid4()))


def replay(delivery_id: str, batch_id: str) -> wpb.ReplayDeliveriesRequest:
    """Asks to send an event again. Raises ValueError unless one of the two says which."""
    if bool(delivery_id) == bool(batch_id):
        raise ValueError("give either delivery_id or batch_id")
    if batch_id:
        return message(wpb.ReplayDeliveriesRequest, batch_id=batch_id)
    return message(wpb.ReplayDeliveriesRequest, delivery_id=delivery_id)
