"""Chunks of a batch: each request in one, groups of shared prefixes together, none too large; when order matters."""

import random
from collections import Counter
from itertools import groupby

from hypothesis import given
from hypothesis import strategies as st

from service.db.run_order import CHUNK_SIZE, CHUNK_TOKENS, LEAST_SHARED, STRETCH, Row, Run, cut, cut_by_model, taper
from service.worker.survey import REMEMBERED, Survey

KEYS = st.lists(st.sampled_from([b"", b"\0\1", b"ab", b"abc", b"\xff"]), max_size=4).map(b"".join)
ROWS = st.lists(st.tuples(st.integers(0, 3 * CHUNK_TOKENS), KEYS), max_size=300)


def rows(groups: int, each: int, seed: int = 1) -> list[Row]:
    """Requests of groups with a prefix each, and ends of their own, sorted as Postgres does."""
    chosen = random.Random(seed)
    numbers = list(range(groups * each))
    chosen.shuffle(numbers)
    keys = [b"mm" + chosen.randbytes(20) for _ in range(groups)]
    made = [
        Row(number, int(chosen.expovariate(1 / 100)) + 1, keys[place // each] + chosen.randbytes(3))
        for place, number in enumerate(numbers)
    ]
    return sorted(made, key=lambda row: (row.prefix, row.request))


def indexes(runs: list[Run]) -> list[int]:
    return [index for run in runs for index in run.indexes]


@given(ROWS, st.booleans())
def test_each_request_is_in_one_chunk(given: list[tuple[int, bytes]], is_sorted: bool) -> None:
    """Whatever the keys and lengths, and in whatever order they come."""
    given_rows = [Row(number, *what) for number, what in enumerate(given)]
    runs = list(cut(sorted(given_rows, key=lambda row: row.prefix) if is_sorted else given_rows))
    assert sorted(indexes(runs)) == list(range(len(given)))
    tokens = {row.request: row.tokens for row in given_rows}
    for run in runs:
        assert 0 < len(run.indexes) <= CHUNK_SIZE
        assert run.tokens == sum(tokens[index] for index in run.indexes)
        assert len(run.indexes) == 1 or run.tokens <= CHUNK_TOKENS


@given(st.lists(st.tuples(st.integers(0, CHUNK_TOKENS), KEYS, st.sampled_from(["", "m", "n", None])), max_size=300))
def test_each_chunk_is_of_one_model(given: list[tuple[int, bytes, str | None]]) -> None:
    """Each request is in one chunk, whatever models they name, and a chunk has requests of its model alone."""
    given_rows = [Row(number, *what) for number, what in enumerate(given)]
    ordered = sorted(given_rows, key=lambda row: (row.model is None, row.model or "", row.prefix, row.request))
    runs = list(cut_by_model(ordered, Counter(row.model for row in given_rows)))
    assert sorted(indexes(runs)) == list(range(len(given)))
    for run in runs:
        assert {given_rows[index].model for index in run.indexes} == {run.model}


def test_the_end_of_each_model_is_small() -> None:
    """The last chunks of each model are as small as those of a batch of it alone."""
    models = {"m": 1_000, "n": 10}
    given_rows = [Row(number, 1, model=model) for model, count in models.items() for number in range(count)]
    sizes = [(run.model, len(run.indexes)) for run in cut_by_model(given_rows, models)]
    assert sizes == [("m", 100)] * 9 + [("m", 50), ("m", 25), ("m", 25), ("n", 10)]


def test_without_prefixes_the_order_stays() -> None:
    """Chunks are runs of what is given, up to their size."""
    runs = list(cut(Row(number, 1) for number in range(250)))
    assert [(run.indexes[0], len(run.indexes), run.group) for run in runs] == [
        (0, 100, None),
        (100, 100, None),
        (200, 50, None),
    ]
    assert all(run.is_consecutive for run in runs)
    assert not Run([1, 3], 2).is_consecutive


def test_the_last_chunks_are_small() -> None:
    """The end of a large batch is spread over several workers; a small one has no more chunks than it needs."""
    rows_ = [Row(number, 1) for number in range(1_000)]
    sizes = [len(run.indexes) for run in cut(rows_, len(rows_))]
    assert sizes == [100] * 9 + [50, 25, 25]
    assert taper(range(100, 1_001, 100), [100] * 10)[0] == [*range(100, 901, 100), 950, 975, 1_000]
    assert [len(run.indexes) for run in cut(rows_[:400], 400)] == [100] * 4


def test_long_requests_make_small_chunks() -> None:
    """A chunk has a bounded number of tokens, so that it does not hold a worker for hours."""
    runs = list(cut(Row(number, CHUNK_TOKENS // 4) for number in range(10)))
    assert [len(run.indexes) for run in runs] == [4, 4, 2]


def test_groups_stay_together_and_run_longest_first() -> None:
    """A group of about a chunk has chunks of its own; in each group the longest come first."""
    given = rows(groups=20, each=120)
    group_of = {row.request: row.prefix[:22] for row in given}
    tokens = {row.request: row.tokens for row in given}
    runs = list(cut(given))
    order = [group_of[index] for index in indexes(runs)]
    assert len(list(groupby(order))) == 20
    assert all(len({group_of[index] for index in run.indexes}) == 1 for run in runs if len(run.indexes) == CHUNK_SIZE)
    for _, group in groupby(indexes(runs), key=lambda index: group_of[index]):
        lengths = [tokens[index] for index in group]
        assert lengths == sorted(lengths, reverse=True)


def test_chunks_of_a_group_have_its_number() -> None:
    """So that one worker can be given all of them; other groups have other numbers."""
    runs = list(cut(rows(groups=5, each=250)))
    assert [len(list(chunks)) for _, chunks in groupby(run.group for run in runs)] == [3] * 5
    assert len({run.group for run in runs}) == 5


def test_small_groups_share_chunks() -> None:
    """Groups of a few requests do not make chunks of a few requests."""
    runs = list(cut(rows(groups=300, each=5)))
    assert [len(run.indexes) for run in runs] == [CHUNK_SIZE] * 15


def test_a_huge_group_is_cut_in_flat_memory() -> None:
    """What is read ahead has a limit: the first chunk comes long before the last request."""
    taken = 0

    def endless() -> object:
        nonlocal taken
        while True:
            yield Row(taken, taken, b"m" * 2 * LEAST_SHARED)
            taken += 1

    first = next(cut(endless()))  # type: ignore[arg-type]
    assert taken <= STRETCH + 2
    assert first.group is not None


def survey(keys: list[bytes], tokens: list[int] | None = None, body_bytes: int = 5_000) -> Survey:
    made = Survey()
    for key, cost in zip(keys, tokens or [100] * len(keys), strict=True):
        made.add([cost], body_bytes, [key] if key else [])
    return made


def test_shuffled_prefixes_are_ordered() -> None:
    """The order of the file computes again what is not cached any more; also with many small groups."""
    for groups, each in ((20, 50), (500, 3)):
        keys = [row.prefix for row in sorted(rows(groups, each))]
        assert survey(keys).plan(is_input_order=False).order == "prefix"
        assert survey(keys).plan(is_input_order=True).order == "input"


def test_the_file_order_stays_where_it_is_as_good() -> None:
    """Nothing shared, one prefix for all, or sorted already: nothing to gain, so nothing is sorted."""
    chosen = random.Random(1)
    nothing = [b"mm" + chosen.randbytes(20) for _ in range(2_000)]
    one_for_all = [b"mm" + b"s" * 20 + chosen.randbytes(4) for _ in range(2_000)]
    in_order = [row.prefix for row in rows(20, 100)]
    for keys in (nothing, one_for_all, in_order, [b""] * 2_000):
        assert survey(keys).plan(is_input_order=False).order == "input"


def test_mixed_lengths_run_longest_first() -> None:
    """The end of the batch is not one long request on an empty engine."""
    lengths = [10] * 1_000 + [500]
    assert survey([b""] * 1_001, lengths).plan(is_input_order=False).order == "length"
    assert survey([b""] * 1_001, lengths).plan(is_input_order=True).order == "input"


@given(st.lists(st.integers(0, 2 * CHUNK_TOKENS), min_size=1, max_size=400), st.integers(1, 50))
def test_chunks_in_the_order_of_the_file_are_known_at_its_end(tokens: list[int], piece: int) -> None:
    """They are the same that reading all requests again would give."""
    made = Survey()
    for begin in range(0, len(tokens), piece):
        made.add(tokens[begin : begin + piece], 1, [])
    plan = made.plan(is_input_order=True)
    expected = list(cut(Row(number, cost) for number, cost in enumerate(tokens)))
    whole = taper([run.indexes[-1] + 1 for run in expected], [run.tokens for run in expected])
    assert ([*plan.ends], [*plan.tokens]) == whole
    assert (plan.ends[-1], sum(plan.tokens)) == (len(tokens), sum(tokens))


def test_what_is_remembered_has_a_limit() -> None:
    """Memory is flat, whatever the number of prompts."""
    chosen = random.Random(1)
    made = survey([b"mm" + chosen.randbytes(20) for _ in range(20_000)])
    assert len(made._seen) == REMEMBERED
