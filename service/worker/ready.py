"""Requests that wait for the engine. Their batches take turns, so that none waits until another's chunk is done."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, field

from service.db.chunks import Request


@dataclass
class Ready:
    """A queue for each batch; the next request is that of the batch whose last one is the longest ago."""

    _by_batch: dict[int, deque[Request]] = field(default_factory=dict)
    _count: int = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Request]:
        for requests in self._by_batch.values():
            yield from requests

    def extend(self, requests: Iterable[Request]) -> None:
        """Adds requests, each behind those of its batch."""
        for request in requests:
            self._by_batch.setdefault(request.batch_id, deque()).append(request)
            self._count += 1

    def put_first(self, requests: Sequence[Request]) -> None:
        """Adds requests, each before those of its batch, in their own order."""
        for request in reversed(requests):
            self._by_batch.setdefault(request.batch_id, deque()).appendleft(request)
            self._count += 1

    def popleft(self) -> Request:
        """Removes the next request and returns it. Raises IndexError without any."""
        if not self._by_batch:
            raise IndexError("no request is ready")
        batch_id = next(iter(self._by_batch))
        requests = self._by_batch.pop(batch_id)
        request = requests.popleft()
        self._count -= 1
        if requests:
            self._by_batch[batch_id] = requests
        return request

    def drop(self, chunk_ids: Set[int]) -> None:
        """Removes the requests of these chunks."""
        self._keep([request for request in self if request.chunk_id not in chunk_ids])

    def take_last(self, count: int, is_able: Callable[[Request], bool]) -> list[Request]:
        """Removes up to `count` of the requests for which it holds, the last of them, and returns them in order."""
        able = [request for request in self if is_able(request)]
        taken = able[max(0, len(able) - count) :]
        gone = {(request.batch_id, request.index) for request in taken}
        self._keep([request for request in self if (request.batch_id, request.index) not in gone])
        return taken

    def _keep(self, requests: Iterable[Request]) -> None:
        self.clear()
        self.extend(requests)

    def clear(self) -> None:
        """Removes all."""
        self._by_batch.clear()
        self._count = 0
