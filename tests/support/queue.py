"""Batches in the queue, cut as a test needs them, and workers that answer them: for tests of whose turn it is."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from service.db import chunks, results, turns
from service.db.chunks import Chunk, Holder
from service.db.connection import Database
from service.db.results import Result
from tests.support.store import holder

BATCH = """
INSERT INTO batches (state, tenant, digest, metadata, priority, models, total, estimated_tokens, expire_time)
VALUES ('in_progress', %s, '', '{}', %s, %s, %s, %s, clock_timestamp() + make_interval(secs => %s)) RETURNING id
"""
REQUESTS = """
INSERT INTO requests (batch_id, index, custom_id, url, body)
SELECT %s, i, 'c' || i, '/v1/chat/completions', '{}' FROM generate_series(0, %s - 1) AS i
"""
CHUNKS = """
INSERT INTO chunks (batch_id, first_index, count, unfinished, priority, models)
SELECT %s, first, %s, %s, %s, %s FROM generate_series(0, %s - 1, %s) AS first
"""


def queued(
    database: Database,
    count: int,
    *,
    tenant: str = "default",
    priority: int = 0,
    models: Sequence[str] = ("tiny",),
    size: int = 1,
    window_s: float | None = None,
    estimate: int = 10,
) -> int:
    """Puts a batch of `count` chunks of `size` requests each into the queue. Returns its id.

    `estimate`: tokens that a request is expected to use.
    """

    def create(db: object) -> int:
        sql = db.execute_sql  # type: ignore[attr-defined]
        [batch_id] = sql(
            BATCH, (tenant, priority, list(models), count * size, count * size * estimate, window_s)
        ).fetchone()
        sql(REQUESTS, (batch_id, count * size))
        sql(CHUNKS, (batch_id, size, size, priority, list(models), count * size, size))
        turns.enqueue(db, batch_id)  # type: ignore[arg-type]
        return int(batch_id)

    return database.call(create)


def claim(database: Database, mine: Holder, limit: int = 1, models: Sequence[str] = ("tiny",)) -> list[Chunk]:
    """Claims chunks."""
    return database.call(chunks.claim, mine, list(models), limit)


def answer(database: Database, mine: Holder, chunk: Chunk, tokens: int, indexes: Sequence[int] | None = None) -> int:
    """Stores results of a chunk, each of so many tokens."""
    which = range(chunk.first_index, chunk.first_index + chunk.count) if indexes is None else indexes
    group = [
        Result(chunk.id, chunk.batch_id, index, status_code=200, body="{}", completion_tokens=tokens) for index in which
    ]
    return database.call(results.write, group, mine.incarnation)


@dataclass
class Worker:
    """Keeps `window` chunks and answers the one that it has had the longest. `cost`: tokens of each of its requests."""

    database: Database
    cost: Callable[[Chunk], int]
    window: int = 3
    models: Sequence[str] = ("tiny",)
    holder: Holder = field(default_factory=holder)
    held: deque[Chunk] = field(default_factory=deque)
    # Of each answered chunk: its batch, and the tokens.
    answered: list[tuple[int, int]] = field(default_factory=list)

    def step(self) -> Chunk | None:
        """Claims until the window is full, and answers one chunk; None without any."""
        while len(self.held) < self.window and (taken := claim(self.database, self.holder, 1, self.models)):
            self.held.extend(taken)
        if not self.held:
            return None
        chunk = self.held.popleft()
        tokens = self.cost(chunk)
        answer(self.database, self.holder, chunk, tokens)
        self.answered.append((chunk.batch_id, tokens * chunk.count))
        return chunk

    def used(self, *batches: int) -> int:
        """Tokens of the answers for these batches."""
        return sum(tokens for batch_id, tokens in self.answered if batch_id in batches)
