"""Claims work for a worker, chunks with their requests and suspects among them, in one call to Postgres."""

from collections.abc import Sequence
from dataclasses import dataclass

import peewee

from service.db import chunks, sharing, suspects
from service.db.chunks import Chunk, Holder, Request
from service.db.run_order import CHUNK_SIZE
from service.telemetry import logs

log = logs.get("work")


@dataclass(frozen=True)
class Work:
    """Claimed chunks, each with its requests without a result; and whether suspects wait to run alone.

    `is_scarce`: there was nothing left, and others were asked for a part of what they hold.
    """

    chunks: Sequence[tuple[Chunk, Sequence[Request]]]
    are_alone_waiting: bool
    is_scarce: bool = False


def take(
    db: peewee.PostgresqlDatabase,
    holder: Holder,
    models: Sequence[str],
    wanted: int,
    suspects_held: int,
    known: Sequence[int] | None = None,
    room: int = 0,
) -> Work:
    """Claims chunks of about `wanted` requests, at least one, and suspects that may run together with others.

    `room`: how many requests the holder could begin at once. If there are none, it asks others for so many of theirs.
    `known`: the chunks that the holder knows of; all others that it has are put back first.
    """
    lost = 0 if known is None else chunks.release_others(db, holder, known)
    few, alone = suspects.waiting(db, models)
    taken = _claim(db, holder, models, wanted)
    if few:
        taken += suspects.claim_few(db, holder, models, suspects_held)
    is_scarce = room > 0 and not taken and sharing.ask(db, holder, models, room)
    work = Work([(chunk, chunks.unanswered(db, chunk)) for chunk in taken], alone > 0, is_scarce)
    if lost:
        # Not before: while requests cannot be read, each claim is lost.
        log.warning("lost_claims_released", chunks=lost)
    return work


def _claim(db: peewee.PostgresqlDatabase, holder: Holder, models: Sequence[str], wanted: int) -> list[Chunk]:
    """Claims chunks until they have about so many requests: how many there are in one is known once it is claimed."""
    taken: list[Chunk] = []
    limit = max(1, wanted // CHUNK_SIZE)
    while True:
        more = chunks.claim(db, holder, models, limit)
        taken += more
        requests = sum(chunk.count for chunk in taken)
        if len(more) < limit or requests + requests // len(taken) > wanted:
            return taken
        # The next may be larger.
        limit = max(1, min((wanted - requests) * len(taken) // requests, 2 * len(taken)))


def take_alone(db: peewee.PostgresqlDatabase, holder: Holder, models: Sequence[str]) -> Work:
    """Claims one suspect that must run alone."""
    taken = suspects.claim_alone(db, holder, models)
    return Work([(chunk, chunks.unanswered(db, chunk)) for chunk in taken], bool(taken))
