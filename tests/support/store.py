"""Stores batches with the statements that the worker uses."""

from collections.abc import Iterable
from uuid import uuid4

from service.db import chunks, creation
from service.db.batches import Batch
from service.db.chunks import Holder
from service.db.connection import Database
from service.db.creation import Options
from service.db.limits import Limits
from service.db.results import Result
from service.worker.intake import Rows, Sizes
from service.worker.offer import Offer

OFFER = Offer({"tiny"}, {"/v1/chat/completions"})
SIZES = Sizes(1_000_000, 1 << 20, 1 << 30)
LEASE_S = 60.0


def line(number: int) -> bytes:
    return b'{"custom_id":"c%d","url":"/v1/chat/completions","body":{"model":"tiny","x":"a\\\\b\\tc"}}\n' % number


def holder(worker_id: str = "w") -> Holder:
    """Returns a new incarnation of a worker."""
    return Holder(worker_id, uuid4(), LEASE_S)


def stored(database: Database, count: int, limits: Limits | None = None, **options: object) -> Batch:
    return stored_lines(database, map(line, range(count)), limits, **options)


def stored_lines(database: Database, lines: Iterable[bytes], limits: Limits | None = None, **options: object) -> Batch:
    given = Options(**options)  # type: ignore[arg-type]
    batch_id = database.call(creation.reserve)
    rows = Rows(batch_id, OFFER, SIZES, run_order=given.run_order)
    copied = rows.feed(b"".join(lines)) + rows.end()
    return database.call(creation.create, batch_id, given, rows.content, copied, False, 60, limits)


def count(database: Database, table: str) -> int:
    return int(database.call(lambda db: db.execute_sql(f"SELECT count(*) FROM {table}").fetchone()[0]))


def answers(chunk: chunks.Chunk, indexes: range, status: int = 200) -> list[Result]:
    return [
        Result(
            *(chunk.id, chunk.batch_id, i, status, "{}"),
            prompt_tokens=2,
            completion_tokens=3,
            cached_tokens=1,
            reasoning_tokens=2,
        )
        for i in indexes
    ]
