"""What a worker holds: which chunks, how many requests of each, and which are suspects."""

from service.db.sharing import Part
from service.worker.held_chunks import HeldChunks
from tests.support.engine_fakes import request, work_of


def test_a_chunk_is_held_until_its_last_result_is_stored() -> None:
    """A chunk is held until its last result is stored, and a result for a chunk no longer held changes nothing."""
    held, work = HeldChunks(), work_of(1)
    work.chunks[0][1].append(request(11))  # type: ignore[attr-defined]
    held.load(work)
    assert not held.result_stored(1, 10)
    assert (held.ids, 1 in held) == ([1], True)
    assert not held.result_stored(1, 11)
    assert (held.ids, 1 in held) == ([], False)
    assert not held.result_stored(1, 11)


def test_a_second_result_of_a_request_is_none_of_another() -> None:
    """A chunk that was lost, and had again while results of it were not stored yet, is held until its last request."""
    held, work = HeldChunks(), work_of(1)
    work.chunks[0][1].extend((request(11), request(12)))  # type: ignore[attr-defined]
    held.load(work)
    held.drop({1})
    held.load(work)
    held.offer([held.ready.take_last(1, lambda one: one.index == 12)])
    for _ in range(2):
        assert not held.result_stored(1, 10)
        # As a part whose answer was lost is given again.
        held.given([Part(1, [12])])
        assert held.ids == [1]
    assert not held.result_stored(1, 11)
    assert held.ids == []


def test_a_chunk_without_unanswered_requests_is_not_held() -> None:
    """A chunk without unanswered requests is not held, because its lease would be renewed for ever."""
    held, work = HeldChunks(), work_of(1, deaths=1)
    work.chunks[0][1].clear()  # type: ignore[attr-defined]
    held.load(work)
    assert (held.ids, held.suspects) == ([], 0)


def test_a_chunk_that_is_had_again_runs_once() -> None:
    """A chunk whose lease was lost, and had again before that was known, has each request once."""
    held = HeldChunks()
    held.load(work_of(1, 2))
    held.ready.popleft()
    held.load(work_of(1, 2, 3))
    assert [one.chunk_id for one in held.ready] == [2, 3]
    assert not held.result_stored(1, 10)
    assert held.ids == [2, 3]


def test_suspects_are_counted_until_they_are_done_or_lost() -> None:
    """A suspect counts until its result is stored or its lease is lost, which makes room for the next one."""
    held = HeldChunks()
    held.load(work_of(1))
    held.load(work_of(2, 3, 4, deaths=1))
    assert held.suspects == 3
    assert not held.result_stored(1, 10)
    assert held.result_stored(2, 20)
    held.drop({3, 99})
    assert (held.suspects, held.ids, [one.chunk_id for one in held.ready]) == (1, [4], [2, 4, 1])
    assert held.waiting == {1, 2, 4}
    held.ready.popleft()
    assert (held.waiting, held.ids) == ({1, 4}, [4])
    held.clear()
    assert (held.suspects, held.ids, list(held.ready)) == (0, [], [])


def test_what_begins_is_told_ahead_and_once() -> None:
    """Each chunk is told once as not begun, and then a window of it at a time, in the order in which it runs."""
    held, work = HeldChunks(), work_of(1, 2)
    work.chunks[0][1].extend(request(number) for number in (11, 12, 9, 14))  # type: ignore[attr-defined]
    held.load(work)
    assert held.begin([], 3) == {1: None, 2: None}
    assert held.begin([], 3) == {}
    assert held.begin([request(10)], 3) == {1: 12}
    assert held.begin([request(11), request(12)], 3) == {}
    assert held.begin([request(9), request(20, 2)], 3) == {1: 14, 2: 20}
    held.load(work_of(3))
    held.drop({3})
    assert held.begin([request(30, 3)], 3) == {}


def test_what_could_not_be_told_is_told_with_the_next() -> None:
    """Chunks that were locked, or not heard of, are told again until they are known, or are not held any more."""
    held, work = HeldChunks(), work_of(1, 2, 3)
    work.chunks[0][1].extend(request(number) for number in (11, 12))  # type: ignore[attr-defined]
    held.load(work)
    assert held.begin([request(10)], 1) == {1: 10, 2: None, 3: None}
    held.not_noted({1: 10, 3: None})
    held.drop({3})
    assert held.begin([request(20, 2)], 1) == {1: 10, 2: 20}
    held.not_noted({1: 10})
    assert held.begin([request(11)], 1) == {1: 11}
    held.not_noted({1: 11, 3: None})
    assert held.begin([], 1) == {1: 11}
    assert held.begin([], 1) == {}


def test_what_is_given_is_not_told_as_begun() -> None:
    """What follows it in its chunk is told when it starts, and a chunk that was given whole is told no more."""
    held, work = HeldChunks(), work_of(1, 2)
    work.chunks[0][1].extend(request(number) for number in (11, 12, 13, 14))  # type: ignore[attr-defined]
    held.load(work)
    assert held.begin([request(10)], 2) == {1: 11, 2: None}
    held.offer([held.ready.take_last(2, lambda one: one.index in (12, 13)), [request(20, 2)]])
    assert held.begin([request(14)], 2) == {1: 14}
    assert held.begin([request(20, 2)], 2) == {}
    held.given(held.giving)
    assert (held.ids, held.giving) == ([1], [])
