"""Claim: in Postgres, a request costs its text and its response, and a few hundred bytes.

Against: the text alone (`url`, `body` and `custom_id` of the request, `body` of the result).
Target: none; docs/capacity.md draws the conclusions. Bytes per request on disk, in the WAL and in the indexes.

With the worker's own statements, for results of three sizes: stored like an upload, claimed, answered in groups of 100.
"""

import random
from collections.abc import Iterator
from uuid import uuid4

import peewee

from benchmarks.lib import chats
from benchmarks.lib.harness import Figure, Sizes, main
from benchmarks.lib.stacks import postgres
from service.db import chunks, creation, results
from service.db.chunks import Holder
from service.db.connection import Database
from service.db.creation import Content, Options

SIZES: Sizes = {"requests": (10_000, 1_000), "rounds": (5, 1)}
RESULT_BYTES = (300, 2_000, 20_000)
TABLES = ("requests", "results", "chunks")
_dice = random.Random(7)
# As many different words as a longer text has.
WORDS = ["".join(_dice.choices("etaoinshrdlucmfw", k=_dice.randint(2, 9))) for _ in range(2_000)]


def answer(size: int, dice: random.Random) -> str:
    """A body of that many bytes, which Postgres can hardly compress: the worst case."""
    return '{"content":"' + " ".join(dice.choices(WORDS, k=size // 2))[: size - 14] + '"}'


def wal(db: peewee.PostgresqlDatabase) -> int:
    """How many bytes have been written to the WAL so far."""
    return int(db.execute_sql("SELECT pg_wal_lsn_diff(pg_current_wal_insert_lsn(), '0/0')").fetchone()[0])


def sizes(db: peewee.PostgresqlDatabase) -> dict[str, int]:
    """Bytes of each table with its indexes, and of all indexes."""
    found = {
        table: int(db.execute_sql("SELECT pg_total_relation_size(%s)", (table,)).fetchone()[0]) for table in TABLES
    }
    query = "SELECT sum(pg_indexes_size(t::regclass)) FROM unnest(%s::text[]) t"
    return found | {"indexes": int(db.execute_sql(query, (list(TABLES),)).fetchone()[0])}


def store(db: peewee.PostgresqlDatabase, count: int) -> int:
    """Stores a batch as an upload does. Returns the bytes of its text."""
    rows, text = [], 0
    batch_id = creation.reserve(db)
    for index in range(count):
        line = f"{batch_id}\t{index}\tc{index}\t/v1/chat/completions\t{chats.body(index)}"
        text += len(line) - len(f"{batch_id}\t{index}\t\t\t")
        # Without a key, as bodies so small have none, with an estimate of tokens and the model.
        rows.append(f"{line}\t\\N\t64\ttiny\n")
    content = Content(count, ["tiny"], b"")
    creation.create(db, batch_id, Options(), content, "".join(rows).encode(), False, 600)
    return text


def run(database: Database, size: int) -> int:
    """Claims and answers all requests. Returns the bytes of the responses."""
    mine, dice, text = Holder("w", uuid4(), 60.0), random.Random(1), 0
    while taken := database.call(chunks.claim, mine, ["tiny"], 1):
        group = []
        for request in database.call(chunks.unanswered, taken[0]):
            body = answer(size, dice)
            text += len(body)
            group.append(results.Result(request.chunk_id, request.batch_id, request.index, status_code=200, body=body))
        database.call(results.write, group, mine.incarnation)
    return text


def measure(requests: int, rounds: int) -> Iterator[Figure]:
    """Batches with results of each size, in databases of their own."""
    names = [f"of_{size}_{number}" for number in range(rounds) for size in RESULT_BYTES]
    found: dict[tuple[int, str], list[tuple[float, float]]] = {}
    with postgres(*names) as databases:
        for number in range(rounds):
            for size in RESULT_BYTES:
                database = databases[f"of_{size}_{number}"]
                database.call(lambda db: db.execute_sql("CHECKPOINT"))
                begun = database.call(wal)
                asked = database.call(store, requests)
                stored = database.call(wal)
                answered = run(database, size)
                ended = database.call(wal)
                on_disk = database.call(sizes)
                for what, ours, text in (
                    ("requests, table and indexes", on_disk["requests"], asked),
                    ("results, table and indexes", on_disk["results"], answered),
                    ("chunks, table and indexes", on_disk["chunks"], 0),
                    ("indexes of all three", on_disk["indexes"], 0),
                    ("log of an upload", stored - begun, asked),
                    ("log of claiming and answering", ended - stored, answered),
                ):
                    found.setdefault((size, what), []).append((ours / requests, text / requests))
    for (size, what), pairs in found.items():
        depends = what in ("results, table and indexes", "log of claiming and answering")
        if depends or size == RESULT_BYTES[0]:
            name = f"{what}, results of {size:,} bytes" if depends else what
            texts = [text for _, text in pairs] if pairs[0][1] else []
            yield Figure(name, "bytes/request", [ours for ours, _ in pairs], "the text alone", texts)


if __name__ == "__main__":
    main(__file__, __doc__, SIZES, measure)
