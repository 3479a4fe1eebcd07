"""What becomes of a request in the engine: a stored answer, an error, or no result if the engine dies."""

import json

from service.db.chunks import Request
from service.db.results import Result
from service.worker.engine.protocol import Answer, EngineDeadError
from service.worker.wakeup import Wakeup
from service.worker.window import Window, answer_result
from tests.support.engine_fakes import FakeEngine, Journal, request
from tests.support.loops import in_loop


def test_a_body_is_stored_on_one_line() -> None:
    """JSON that an endpoint writes over several lines is stored on one line, otherwise unchanged."""
    body = '{\n  "a": "b\\n",\r\n  "c": [1.0, 1e400]\n}'
    stored = answer_result(Request(1, 2, 3, "c3", "/v1/completions", "{}"), Answer(200, body, 5, 7, 4, 6))
    assert stored.body is not None
    assert "\n" not in stored.body
    assert "\r" not in stored.body
    assert json.loads(stored.body, parse_float=str) == json.loads(body, parse_float=str)
    assert (stored.custom_id, stored.index, stored.prompt_tokens, stored.completion_tokens) == ("c3", 3, 5, 7)
    assert (stored.cached_tokens, stored.reasoning_tokens) == (4, 6)


class Parts:
    """A window on an engine that the test controls. `results` is what the writer was given."""

    def __init__(self) -> None:
        self.journal = Journal()
        self.engine = FakeEngine(self.journal)
        self.results: list[Result] = []
        self.window = Window(self.engine, self, Wakeup())  # type: ignore[arg-type]

    def add(self, result: Result) -> None:
        self.results.append(result)
        self.journal.note("finished", result.index)


@in_loop
async def test_a_death_is_no_result_and_tells_what_was_in_the_engine() -> None:
    """When the engine dies its requests get no result and their chunks are recorded, whoever notices the death."""
    for finds in ("request", "look"):
        parts = Parts()
        for index, chunk_id in ((1, 5), (2, 5), (3, 6)):
            parts.window.start(request(index, chunk_id))
        await parts.journal.seen("asked", "body 3")
        if finds == "request":
            parts.engine.fail("body 1", EngineDeadError("gone"))
        else:
            parts.engine.is_dead = True
            parts.window.watch_engine()
        await parts.window.empty()
        assert (parts.window.is_dead, parts.window.is_open, parts.window.died_with) == (True, False, {5, 6})
        assert parts.results == []


@in_loop
async def test_an_unforeseen_failure_is_that_requests_result() -> None:
    """An unexpected exception in one request becomes its error result; other requests and the engine are unaffected."""
    parts = Parts()
    for index in (1, 2):
        parts.window.start(request(index))
    await parts.journal.seen("asked", "body 2")
    parts.engine.fail("body 1", KeyError("choices"))
    await parts.journal.seen("finished", 1)
    assert not parts.window.is_proven
    parts.engine.answer("body 2")
    await parts.window.empty()
    assert [(one.index, one.error_code) for one in parts.results] == [(1, "INTERNAL_ERROR"), (2, None)]
    assert (parts.window.is_dead, parts.window.is_proven) == (False, True)


@in_loop
async def test_only_the_requests_of_lost_chunks_are_taken_out() -> None:
    """When a lease is lost, only the requests of that chunk are cancelled."""
    parts = Parts()
    for index, chunk_id in ((1, 5), (2, 6)):
        parts.window.start(request(index, chunk_id))
    await parts.journal.seen("asked", "body 2")
    assert parts.window.chunks == {5, 6}
    parts.window.cancel({5})
    parts.engine.answer("body 2")
    await parts.window.empty()
    assert [one.index for one in parts.results] == [2]
