"""The chunks that a worker holds under a lease, and which of their requests are waiting or not stored yet."""

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field

from service.api import messages
from service.db.chunks import Request
from service.db.sharing import Part
from service.db.work import Work
from service.telemetry import logs
from service.worker.ready import Ready

log = logs.get("runner")


@dataclass
class HeldChunks:
    """A chunk is held from its claim until its last result is stored, it is released, or its lease is lost."""

    # Requests that are not in the engine yet.
    ready: Ready = field(default_factory=Ready)
    # What others are given: it does not run here any more, and Postgres has not confirmed it yet.
    giving: list[Part] = field(default_factory=list)
    # The indexes of requests without a stored result, by chunk. No number: after a chunk was lost and had again, a
    # request may have two results, of which the first may come from before.
    _unstored: dict[int, set[int]] = field(default_factory=dict)
    # The indexes of requests that are not known to Postgres as begun, in the order in which they start, by chunk.
    _unnoted: dict[int, deque[int]] = field(default_factory=dict)
    # Chunks of which Postgres knows nothing yet.
    _new: set[int] = field(default_factory=set)
    # What it was to know and could not be told, by chunk.
    _late: dict[int, int | None] = field(default_factory=dict)
    # Chunks that consist of one suspect.
    _suspects: set[int] = field(default_factory=set)

    @property
    def ids(self) -> list[int]:
        """May be read from any thread."""
        return list(self._unstored)

    @property
    def waiting(self) -> set[int]:
        """The chunks with requests that are not in the engine yet."""
        return {request.chunk_id for request in self.ready}

    @property
    def suspects(self) -> int:
        """How many of the chunks are suspects."""
        return len(self._suspects)

    def __contains__(self, chunk_id: int) -> bool:
        return chunk_id in self._unstored

    def load(self, work: Work) -> None:
        """Adds claimed chunks. A chunk that already has all results is not held: its lease expires.

        Nor is one added that is here: its lease was lost and had again before that was known, and its requests run.
        """
        suspects: list[Request] = []
        for chunk, requests in work.chunks:
            if requests and chunk.id not in self:
                self._unstored[chunk.id] = {request.index for request in requests}
                if chunk.deaths:
                    suspects += requests
                else:
                    self.ready.extend(requests)
                self._unnoted[chunk.id] = deque(request.index for request in requests)
                self._new.add(chunk.id)
                if chunk.deaths:
                    self._suspects.add(chunk.id)
            batch = messages.batch_name(chunk.batch_id)
            log.debug("chunk_claimed", chunk=chunk.id, batch=batch, requests=len(requests))
        # They have had their turn before, and others wait to run after them.
        self.ready.put_first(suspects)

    def begin(self, starting: Sequence[Request], ahead: int) -> dict[int, int | None]:
        """Returns what Postgres is to know before these start, and then counts as known.

        By chunk the last request that may be in the engine, up to `ahead` of them further on than so far; None: none.
        """
        last: dict[int, int | None] = dict.fromkeys(self._new) | self._late
        self._new.clear()
        self._late.clear()
        for request in starting:
            unnoted = self._unnoted.get(request.chunk_id)
            if unnoted and unnoted[0] == request.index:
                for _ in range(min(ahead, len(unnoted))):
                    last[request.chunk_id] = unnoted.popleft()
        return last

    def not_noted(self, last: Mapping[int, int | None]) -> None:
        """What `begin` returned does not count as known: it is returned again with what starts next."""
        self._late |= {chunk_id: index for chunk_id, index in last.items() if chunk_id in self}

    def result_stored(self, chunk_id: int, index: int) -> bool:
        """Notes a stored result. Returns True if it clears a suspect."""
        if chunk_id not in self or not self._settle(chunk_id, {index}):
            return False
        is_suspect = chunk_id in self._suspects
        self._suspects.discard(chunk_id)
        return is_suspect

    def returned(self, requests: Iterable[Request]) -> None:
        """Has requests wait again that were taken out of the engine."""
        self.ready.extend(request for request in requests if request.chunk_id in self)

    def may_give(self, batches: Set[int]) -> Callable[[Request], bool]:
        """Whether a request may be given to others: one of these batches. Suspects stay."""
        return lambda request: request.batch_id in batches and request.chunk_id not in self._suspects

    def offer(self, parts: Iterable[Sequence[Request]]) -> None:
        """Begins to give requests, already removed from `ready`. Each part is of one chunk."""
        for part in parts:
            given = [request.index for request in part]
            self.giving.append(Part(part[0].chunk_id, given))
            # The next that starts is then the first of the others.
            if unnoted := self._unnoted.get(part[0].chunk_id):
                gone = set(given)
                self._unnoted[part[0].chunk_id] = deque(index for index in unnoted if index not in gone)

    def given(self, parts: Sequence[Part]) -> None:
        """These are in the queue now."""
        self.giving = [part for part in self.giving if part not in parts]
        for part in parts:
            if part.chunk_id in self:
                self._settle(part.chunk_id, set(part.indexes))

    def drop(self, ids: Set[int]) -> None:
        """Forgets these chunks."""
        for chunk_id in ids:
            self._forget(chunk_id)
        self._suspects -= ids
        self.ready.drop(ids)
        self.giving = [part for part in self.giving if part.chunk_id not in ids]

    def clear(self) -> None:
        """Forgets all chunks."""
        self.giving.clear()
        self._unstored.clear()
        self._unnoted.clear()
        self._new.clear()
        self._late.clear()
        self._suspects.clear()
        self.ready.clear()

    def _settle(self, chunk_id: int, indexes: Set[int]) -> bool:
        """These requests of a chunk are not waited for any more. True if they were the last: it is forgotten."""
        unstored = self._unstored[chunk_id]
        unstored -= indexes
        if not unstored:
            self._forget(chunk_id)
        return not unstored

    def _forget(self, chunk_id: int) -> None:
        self._unstored.pop(chunk_id, None)
        self._unnoted.pop(chunk_id, None)
        self._new.discard(chunk_id)
        self._late.pop(chunk_id, None)
