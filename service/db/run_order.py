"""Cuts the requests of a batch into chunks, in the order in which they are to run. Pure."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from typing import Literal, NamedTuple

# Requests per chunk: few enough that a chunk is done soon and work spreads over workers, many enough that claiming
# costs next to nothing. A million requests are 10,000 chunks.
CHUNK_SIZE = 100
# Estimated tokens per chunk, unless one request has more: 100 requests that ask for 32,000 tokens each would occupy a
# worker for hours.
CHUNK_TOKENS = 250_000
# The last chunks of a batch of more requests than this are small, so that its end is spread over all workers: they have
# this part of what is left, but not fewer requests than that. A smaller batch is not worth the claims.
TAPERED = 400
LAST_PART = 2
LEAST_LAST = 25
# Requests whose keys have fewer leading bytes in common share nothing worth knowing: two bytes are the model's, and
# another is equal by chance once in 256 times.
LEAST_SHARED = 4
# How many more bytes neighbours in a group have in common by chance.
CHANCE = 2
# Requests run longest first if the longest is so many times as long as the mean.
LONG = 2
# In a group, too; in a larger one than this in each stretch of so many, which limits the memory.
STRETCH = 10_000
# Requests that are so many times as long as the mean of a batch are far longer than others.
FAR_LONGER = 4


# What a client chooses.
RunOrder = Literal["prefix", "input"]


@dataclass(frozen=True)
class Plan:
    """How the requests of a new batch are ordered, and chunks cut of them.

    `input`: as in the file. Where its chunks end may be known: after how many requests (`ends`), and how many `tokens`
    each has. `length`: longest first. `prefix`: by prefix, but those of more than `far_longer` tokens (None: not known)
    before all others: one of them at the end would run alone on an engine that is otherwise idle.
    """

    order: Literal["input", "length", "prefix"]
    ends: Sequence[int] = ()
    tokens: Sequence[int] = ()
    far_longer: int | None = None


BY_PREFIX = Plan("prefix")


class Row(NamedTuple):
    """A request to be ordered, by its index. `prefix` is the key of its prompt: see service/worker/prefixes.py.

    `model`: the one that it names, "" for none; None: not known.
    """

    request: int
    tokens: int
    prefix: bytes = b""
    model: str | None = None


@dataclass(frozen=True)
class Run:
    """The requests of one chunk in the order in which they run. Runs of the same `group` share a prefix.

    `model`: as in a Row, if all its requests have the same.
    """

    indexes: Sequence[int]
    tokens: int
    group: int | None = None
    model: str | None = None

    @property
    def is_consecutive(self) -> bool:
        """True if the requests run as they follow one another in the file."""
        return all(after == before + 1 for before, after in pairwise(self.indexes))


@dataclass
class Filling:
    """How full a chunk is, which has room for `most` requests."""

    most: int = CHUNK_SIZE
    count: int = 0
    tokens: int = 0

    def add(self, count: int, tokens: int) -> None:
        """Adds so many requests."""
        self.count, self.tokens = self.count + count, self.tokens + tokens

    def has_room(self, count: int, tokens: int) -> bool:
        """True if so many requests may be added. An empty chunk takes one of any length."""
        if self.count == 0 and count == 1:
            return True
        return self.count + count <= self.most and self.tokens + tokens <= CHUNK_TOKENS * self.most // CHUNK_SIZE


def most_of(total: int, done: int) -> int:
    """How many requests the next chunk of a batch may have when `done` of its `total` are in others."""
    if total <= TAPERED:
        return CHUNK_SIZE
    return max(LEAST_LAST, min(CHUNK_SIZE, (total - done) // LAST_PART))


def taper(ends: Sequence[int], tokens: Sequence[int]) -> tuple[list[int], list[int]]:
    """Divides the last chunks, given as in a Plan. Their tokens are divided by numbers of requests."""
    total, begin = ends[-1], 0
    divided: tuple[list[int], list[int]] = [], []
    for end, cost in zip(ends, tokens, strict=True):
        size, done = end - begin, begin
        while done < end:
            after = min(end, done + most_of(total, done))
            divided[0].append(after)
            divided[1].append(cost * (after - begin) // size - cost * (done - begin) // size)
            done = after
        begin = end
    return divided


def cut(rows: Iterable[Row], total: int = 0) -> Iterator[Run]:
    """Cuts requests, sorted by prefix, into chunks. Those without a prefix stay in the order given.

    `total`: how many requests there are; the last chunks are small. 0: unknown.

    Requests with the same prefix run longest first if their lengths differ much. Small groups are put together into
    chunks; one that does not fit begins a new one.
    """
    chunk: list[int] = []
    done, filling = 0, Filling(most_of(total, 0))
    chunk_group = last_group = None
    for group, stretch in _stretches(rows):
        tokens = sum(row.tokens for row in stretch)
        if group != last_group and chunk and not filling.has_room(len(stretch), tokens):
            yield Run(chunk, filling.tokens, chunk_group)
            done += len(chunk)
            chunk, filling = [], Filling(most_of(total, done))
        last_group = group
        if group is not None and LONG * tokens <= len(stretch) * max(row.tokens for row in stretch):
            # Otherwise what some of them share beyond the prefix of all is worth more.
            stretch.sort(key=lambda row: -row.tokens)
        if filling.has_room(len(stretch), tokens):
            # As below, but quickly.
            chunk_group = chunk_group if chunk else group
            chunk += [row.request for row in stretch]
            filling.add(len(stretch), tokens)
            continue
        for row in stretch:
            if not filling.has_room(1, row.tokens):
                yield Run(chunk, filling.tokens, chunk_group)
                done += len(chunk)
                chunk, filling = [], Filling(most_of(total, done))
            if not chunk:
                chunk_group = group
            chunk.append(row.request)
            filling.add(1, row.tokens)
    if chunk:
        yield Run(chunk, filling.tokens, chunk_group)


def cut_by_model(rows: Iterable[Row], totals: Mapping[str | None, int]) -> Iterator[Run]:
    """Cuts requests, sorted by model and then as above, into chunks of one model each. `totals`: requests by model."""
    for model, some in groupby(rows, key=lambda row: row.model):
        for run in cut(some, totals[model]):
            yield replace(run, model=model)


def _stretches(rows: Iterable[Row]) -> Iterator[tuple[int | None, list[Row]]]:
    """Divides sorted requests into groups that share a prefix, each with its number; None: they share none.

    A large group comes in stretches.
    """
    number = 0
    stretch: list[Row] = []
    # How much the request shares with one of its neighbours, and the same of the request before it.
    share = share_before = 0
    for row, before, after in _with_neighbours(rows):
        share_before, share = share, max(before, after)
        is_same = before >= max(share_before, share) - CHANCE if before else not (share_before or share)
        if stretch and (not is_same or len(stretch) >= STRETCH):
            yield (number if share_before else None), stretch
            stretch = []
            number += not is_same
        stretch.append(row)
    if stretch:
        yield (number if share else None), stretch


def _with_neighbours(rows: Iterable[Row]) -> Iterator[tuple[Row, int, int]]:
    """Each request with how much its key has in common with the one before it and the one after it."""
    row, before = None, 0
    for following in rows:
        if row is None:
            row = following
            continue
        after = _shared(row.prefix, following.prefix)
        yield row, before, after
        row, before = following, after
    if row is not None:
        yield row, before, 0


def _shared(one: bytes, other: bytes) -> int:
    """The number of leading bytes that two keys have in common; 0 if that is too few to matter."""
    size = min(len(one), len(other))
    one, other = one[:size], other[:size]
    if one != other:
        size -= (int.from_bytes(one) ^ int.from_bytes(other)).bit_length() + 7 >> 3
    return size if size >= LEAST_SHARED else 0
