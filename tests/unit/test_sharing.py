"""What idle workers are given of what waits here: as much as they have room for, and nothing that has begun."""

from typing import Any

from service.db.chunks import Chunk, Request
from service.db.sharing import Arrival, Part, Unchecked, Wish, parse
from service.db.work import Work
from service.worker.held_chunks import HeldChunks
from service.worker.sharing import ASK_INTERVAL_S, SCARCE_S, WISH_S, Sharing, look_again_s
from service.worker.wakeup import IDLE_S, Wakeup
from service.worker.window import Window
from tests.support.engine_fakes import FakeEngine, Journal, request, work_of
from tests.support.loops import in_loop


def requests(chunk_id: int, *indexes: int, batch_id: int = 1) -> list[Request]:
    return [Request(chunk_id, batch_id, index, f"c{index}", "/v1/completions", "{}") for index in indexes]


def indexes(parts: list[list[Request]]) -> list[list[int]]:
    return [[each.index for each in part] for part in parts]


def test_each_who_asked_gets_a_part_of_its_own() -> None:
    """As many requests as each has room for, of the batches that it can run, and each part of one chunk."""
    sharing = Sharing()
    sharing.wished(Wish("a", 2, frozenset({1})), 0)
    sharing.wished(Wish("b", 3, frozenset({1, 2})), 0)
    assert sharing.batches(1) == {1, 2}
    assert (sharing.wanted(4), sharing.wanted(20)) == (4, 5)
    given = [*requests(5, 0, 1, 2), *requests(6, 3), *requests(7, 0, batch_id=2)]
    assert indexes(sharing.parts(given)) == [[0, 1], [2], [3], [0]]
    assert (sharing.batches(1), sharing.wanted(20)) == (frozenset(), 0)


def test_only_chunks_that_the_other_can_run() -> None:
    """Of a batch of several models the wish names chunks, and requests of the others stay."""
    sharing = Sharing()
    sharing.wished(Wish("a", 9, frozenset({1}), frozenset({6})), 0)
    given = [*requests(5, 0, 1), *requests(6, 2)]
    assert [sharing.is_wished(each) for each in given] == [False, False, True]
    assert sharing.wanted(3) == 3
    assert [[each.index for each in part] for part in sharing.parts(given[2:])] == [[2]]


def test_what_waits_is_divided_equally_if_it_is_much() -> None:
    """Who asks gets half if it is the only one, so that a fast worker need not ask for each few requests."""
    sharing = Sharing()
    sharing.wished(Wish("a", 2, frozenset({1})), 0)
    assert (len(sharing.batches(0)), sharing.wanted(41)) == (1, 20)
    sharing.wished(Wish("b", 2, frozenset({1})), 0)
    assert (len(sharing.batches(0)), sharing.wanted(30)) == (1, 30)


def test_an_idle_worker_asks_again_soon() -> None:
    """What was given for a wish may be gone: who looked too early to ask again does not wait for the next look."""
    looked_s = 10.0
    assert look_again_s(looked_s, looked_s) == look_again_s(looked_s, float("-inf")) == IDLE_S
    again_s = look_again_s(looked_s, looked_s - ASK_INTERVAL_S / 4)
    assert looked_s - ASK_INTERVAL_S / 4 < looked_s + again_s <= looked_s + ASK_INTERVAL_S


def test_a_wish_ends_by_itself() -> None:
    """Who does not ask again is not idle any more; a later wish takes the place of an earlier one."""
    sharing = Sharing()
    sharing.wished(Wish("a", 2, frozenset({1})), 0)
    sharing.wished(Wish("a", 1, frozenset({3})), 1)
    assert sharing.batches(WISH_S) == {3}
    assert sharing.batches(1 + WISH_S) == frozenset()


def test_scarcity_ends_by_itself() -> None:
    """Soon after there was too little, a worker takes again what it needs to be never idle."""
    sharing = Sharing()
    assert not sharing.is_scarce(0)
    sharing.note_scarcity(0)
    assert sharing.is_scarce(SCARCE_S / 2)
    assert not sharing.is_scarce(SCARCE_S)


def test_notices_of_other_versions_are_passed_over() -> None:
    """Whatever else is said on the channel, the heart goes on."""
    assert parse('{"type": "arrival"}') == Arrival()
    assert parse('{"type": "unchecked"}') == Unchecked()
    assert parse('{"type": "wish", "worker_id": "a", "room": 1, "batches": [7]}') == Wish("a", 1, frozenset({7}))
    assert [parse(text) for text in ("", "[]", '{"type": "later"}', '{"type": "wish"}')] == [None] * 4


@in_loop
async def test_only_what_has_not_begun_is_taken_back() -> None:
    """The last requests in the engine beyond those that it runs at once; one that was answered meanwhile is not."""
    journal = Journal()
    engine, results = FakeEngine(journal), []

    class Writer:
        def add(self, result: Any) -> None:
            results.append(result.index)

    window = Window(engine, Writer(), Wakeup())  # type: ignore[arg-type]
    for index in range(5):
        window.start(request(index))
    await journal.seen("asked", "body 4")
    window.take_back(0, lambda each: True)
    window.take_back(9, lambda each: each.index == 3)
    window.take_back(1, lambda each: True)
    assert window.leaving == 2
    for index in (0, 1, 2):
        engine.answer(f"body {index}")
    await window.empty()
    assert sorted(each.index for each in window.take_returned()) == [3, 4]
    assert (sorted(results), window.leaving, window.take_returned()) == ([0, 1, 2], 0, [])


def test_what_is_given_is_held_until_postgres_has_it() -> None:
    """Until then its chunk is renewed, and it does not run here; suspects are not given, nor what was lost."""
    held = HeldChunks()
    held.load(Work([(Chunk(5, 1, 0, 3), requests(5, 0, 1, 2))], False))
    held.load(work_of(9, deaths=1))
    assert [each.index for each in held.ready.take_last(9, held.may_give({2}))] == []
    given = held.ready.take_last(2, held.may_give({1}))
    assert [each.index for each in given] == [1, 2]
    held.offer([given])
    assert (held.giving, sorted(held.ids), len(held.ready)) == ([Part(5, [1, 2])], [5, 9], 2)
    held.given([Part(5, [1, 2])])
    assert held.giving == []
    assert not held.result_stored(5, 0)
    assert held.ids == [9]
    held.returned(requests(5, 7))
    assert len(held.ready) == 2
    held.load(Work([(Chunk(6, 1, 0, 1), requests(6, 0))], False))
    held.offer([held.ready.take_last(1, held.may_give({1}))])
    held.drop({6})
    assert (held.giving, held.ids) == ([], [9])
