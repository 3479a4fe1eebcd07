"""What is stored: batches whole or not at all, leases that fence, results once, streams without gap or repeat."""

import json
from typing import Any
from uuid import uuid4

import pytest

from service import messages
from service.db import batches, chunks, heartbeats, results
from service.db.batches import Batch, Limits, Options
from service.db.connection import Database, connect, end_earlier_sessions, lock_worker, migrate
from service.db.heartbeats import Beat
from service.db.results import Result, Span
from service.worker.intake import Offer, Rows, Sizes
from tests.waiting import until
from vllm_batch import output

OFFER = Offer({"tiny"}, {"/v1/chat/completions"})
SIZES = Sizes(1_000_000, 1 << 20, 1 << 30)
LEASE_S = 60.0


def line(number: int) -> bytes:
    return b'{"custom_id":"c%d","url":"/v1/chat/completions","body":{"model":"tiny","x":"a\\\\b\\tc"}}\n' % number


def stored(database: Database, count: int, limits: Limits | None = None, **options: object) -> Batch:
    batch_id = database.call(batches.reserve)
    rows = Rows(batch_id, OFFER, SIZES)
    copied = rows.feed(b"".join(map(line, range(count)))) + rows.end()
    given = Options(**options)  # type: ignore[arg-type]
    return database.call(batches.create, batch_id, given, rows.content, copied, False, 60, limits)


def count(database: Database, table: str) -> int:
    return int(database.call(lambda db: db.execute_sql(f"SELECT count(*) FROM {table}").fetchone()[0]))


def test_migrations_are_applied_once(database: Database) -> None:
    """Every process may bring the schema up to date; the second finds nothing to do."""
    assert database.call(migrate) == []


def test_batch_is_stored_with_bodies_byte_for_byte(database: Database) -> None:
    """COPY's escaping loses nothing: backslashes and escapes come back as given."""
    batch = stored(database, 3)
    [chunk] = database.call(chunks.claim, "w", uuid4(), ["tiny"], 5, LEASE_S)
    requests = database.call(chunks.unanswered, chunk)
    assert [request.custom_id for request in requests] == ["c0", "c1", "c2"]
    assert requests[1].body == '{"model":"tiny","x":"a\\\\b\\tc"}'
    assert (batch.total, batch.state, list(batch.models)) == (3, "in_progress", ["tiny"])


def test_large_batches_are_cut_into_chunks(database: Database) -> None:
    """Every request is in exactly one chunk."""
    batch = stored(database, 250)
    taken = database.call(chunks.claim, "w", uuid4(), ["tiny"], 10, LEASE_S)
    assert [(chunk.first_index, chunk.count) for chunk in taken] == [(0, 100), (100, 100), (200, 50)]
    assert {chunk.batch_id for chunk in taken} == {batch.id}


def test_a_chunk_is_claimed_by_one_worker(database: Database) -> None:
    """Two workers never get the same chunk, and one that serves another model gets none."""
    stored(database, 150)
    other = database.call(chunks.claim, "other", uuid4(), ["large"], 10, LEASE_S)
    first = database.call(chunks.claim, "a", uuid4(), ["tiny"], 1, LEASE_S)
    second = database.call(chunks.claim, "b", uuid4(), ["tiny"], 10, LEASE_S)
    assert other == []
    assert len(first) == len(second) == 1
    assert first[0].id != second[0].id


def test_higher_priority_runs_first(database: Database) -> None:
    """A batch of higher priority overtakes one that waits longer."""
    stored(database, 1)
    urgent = stored(database, 1, priority=5)
    [chunk] = database.call(chunks.claim, "w", uuid4(), ["tiny"], 1, LEASE_S)
    assert chunk.batch_id == urgent.id


def answers(chunk: chunks.Chunk, indexes: range, status: int = 200) -> list[Result]:
    return [
        Result(chunk.id, chunk.batch_id, i, status_code=status, body="{}", prompt_tokens=2, completion_tokens=3)
        for i in indexes
    ]


def test_the_last_result_completes_the_batch(database: Database) -> None:
    """Counts, usage and state follow from the results in the same transaction."""
    batch = stored(database, 3)
    mine = uuid4()
    [chunk] = database.call(chunks.claim, "w", mine, ["tiny"], 1, LEASE_S)
    assert database.call(results.write, answers(chunk, range(2)), mine) == 2
    half = database.call(batches.get, batch.id)
    assert half is not None
    assert (half.state, half.completed, half.end_time) == ("in_progress", 2, None)
    assert database.call(results.write, answers(chunk, range(2, 3), status=400), mine) == 1
    done = database.call(batches.get, batch.id)
    assert done is not None
    assert (done.state, done.completed, done.failed) == ("completed", 2, 1)
    assert (done.prompt_tokens, done.completion_tokens) == (6, 9)
    assert done.end_time is not None


def test_a_result_is_written_once(database: Database) -> None:
    """Writing a group again, as after a lost connection, changes nothing."""
    batch = stored(database, 3)
    mine = uuid4()
    [chunk] = database.call(chunks.claim, "w", mine, ["tiny"], 1, LEASE_S)
    group = answers(chunk, range(2))
    assert database.call(results.write, group, mine) == 2
    assert database.call(results.write, group, mine) == 0
    again = database.call(batches.get, batch.id)
    assert again is not None
    assert (again.completed, count(database, "results")) == (2, 2)


def test_zombie_owner_cannot_write(database: Database) -> None:
    """A worker whose lease ran out and was given to another writes nothing, and is told that the lease is lost."""
    stored(database, 2)
    zombie, heir = uuid4(), uuid4()
    [chunk] = database.call(chunks.claim, "z", zombie, ["tiny"], 1, LEASE_S)
    database.call(lambda db: db.execute_sql("UPDATE chunks SET lease_until = clock_timestamp() - interval '1s'"))
    assert database.call(chunks.release_expired, 0.001) == 1
    [inherited] = database.call(chunks.claim, "h", heir, ["tiny"], 1, LEASE_S)
    assert inherited.id == chunk.id
    assert database.call(results.write, answers(chunk, range(2)), zombie) == 0
    assert database.call(chunks.renew, [chunk.id], zombie, LEASE_S) == set()
    assert database.call(results.write, answers(chunk, range(2)), heir) == 2


def test_only_requests_without_result_run_again(database: Database) -> None:
    """After a death the successor gets what was not stored, and nothing else."""
    stored(database, 5)
    dead, heir = uuid4(), uuid4()
    [chunk] = database.call(chunks.claim, "w", dead, ["tiny"], 1, LEASE_S)
    database.call(results.write, answers(chunk, range(3)), dead)
    assert database.call(chunks.release, [chunk.id], dead) == 1
    [again] = database.call(chunks.claim, "w", heir, ["tiny"], 1, LEASE_S)
    assert [request.index for request in database.call(chunks.unanswered, again)] == [3, 4]


def bury(database: Database, worker_id: str = "w") -> tuple[int, int, int]:
    burial = database.call(chunks.bury, worker_id)
    return burial.released, burial.suspects, burial.crashed


def test_three_deaths_find_a_killer(database: Database) -> None:
    """What was in an engine that died is suspect, runs few at a time, then alone; who dies alone gets its error."""
    batch = stored(database, 120)
    lives = [uuid4() for _ in range(4)]
    first = database.call(chunks.claim, "w", lives[0], ["tiny"], 1, LEASE_S)
    database.call(results.write, answers(first[0], range(20)), lives[0])
    assert bury(database) == (0, 80, 0)

    normal = database.call(chunks.claim, "w", lives[1], ["tiny"], 5, LEASE_S)
    few = database.call(chunks.claim_suspects, "w", lives[1], ["tiny"], 0, LEASE_S)
    assert [(chunk.first_index, chunk.count) for chunk in normal] == [(100, 20)]
    assert [chunk.first_index for chunk in few] == list(range(20, 29))
    assert database.call(chunks.claim_suspects, "w", lives[1], ["tiny"], 9, LEASE_S) == []
    assert bury(database) == (9, 29, 0)
    assert database.call(chunks.suspects, ["tiny"]) == (91, 9)

    [alone] = database.call(chunks.claim_alone, "w", lives[2], ["tiny"], LEASE_S)
    assert bury(database) == (0, 0, 1)
    [killer] = database.call(results.read_page, "index", batch.id, Span(20, 20))
    assert (killer.index, killer.error_code) == (alone.first_index, "REQUEST_CRASHED_ENGINE")
    assert "3 times" in (killer.error_message or "")

    for claim in (chunks.claim, chunks.claim_suspects):
        while taken := database.call(claim, "w", lives[3], ["tiny"], 5 if claim is chunks.claim else 0, LEASE_S):
            for chunk in taken:
                database.call(
                    results.write, answers(chunk, range(chunk.first_index, chunk.first_index + chunk.count)), lives[3]
                )
    while taken := database.call(chunks.claim_alone, "w", lives[3], ["tiny"], LEASE_S):
        database.call(results.write, answers(taken[0], range(taken[0].first_index, taken[0].first_index + 1)), lives[3])
    done = database.call(batches.get, batch.id)
    assert done is not None
    assert (done.state, done.completed, done.failed) == ("completed", 119, 1)


def test_cancel_keeps_what_is_finished(database: Database) -> None:
    """A cancelled batch has one end: what waits is gone, what is held is lost at the next beat, results stay."""
    batch = stored(database, 250)
    mine = uuid4()
    [chunk] = database.call(chunks.claim, "w", mine, ["tiny"], 1, LEASE_S)
    database.call(results.write, answers(chunk, range(10)), mine)
    cancelling = database.call(batches.cancel, batch.id)
    assert cancelling is not None
    assert (cancelling.state, cancelling.completed, cancelling.end_time) == ("cancelling", 10, None)
    assert database.call(chunks.claim, "v", uuid4(), ["tiny"], 5, LEASE_S) == []
    assert database.call(chunks.renew, [chunk.id], mine, LEASE_S) == set()
    assert database.call(chunks.drop_cancelled, [chunk.id], mine) == 1
    assert database.call(batches.settle_cancelled) == 1
    assert database.call(results.write, answers(chunk, range(10, 20)), mine) == 0
    again = database.call(batches.cancel, batch.id)
    assert again is not None
    assert (again.state, again.completed) == ("cancelled", 10)
    assert count(database, "chunks") == 0


def test_cancel_racing_completion(database: Database) -> None:
    """A batch that was complete first stays completed; one that was cancelled first never becomes completed."""
    first, second = stored(database, 1), stored(database, 1)
    mine = uuid4()
    one, two = database.call(chunks.claim, "w", mine, ["tiny"], 2, LEASE_S)
    database.call(results.write, answers(one, range(1)), mine)
    with pytest.raises(batches.StateError, match="is completed"):
        database.call(batches.cancel, first.id)
    database.call(batches.cancel, second.id)
    assert database.call(results.write, answers(two, range(1)), mine) == 1
    database.call(batches.settle_cancelled)
    ended = database.call(batches.get, second.id)
    assert ended is not None
    assert (ended.state, ended.completed) == ("cancelled", 1)


def test_expiry_answers_the_rest(database: Database) -> None:
    """When the window is over, finished results stay, the rest gets `batch_expired`, and who holds a lease has none."""
    batch = stored(database, 30, completion_window_s=3600.0)
    mine = uuid4()
    [chunk] = database.call(chunks.claim, "w", mine, ["tiny"], 1, LEASE_S)
    database.call(results.write, answers(chunk, range(10)), mine)
    assert database.call(batches.expire, 60) == []
    database.call(lambda db: db.execute_sql("UPDATE batches SET expire_time = clock_timestamp()"))
    assert database.call(batches.expire, 60) == [batch.id]
    done = database.call(batches.get, batch.id)
    assert done is not None
    assert (done.state, done.completed, done.failed) == ("expired", 10, 20)
    assert database.call(results.write, answers(chunk, range(10, 20)), mine) == 0
    read = database.call(results.read_page, "sequence", batch.id, Span(1, 100))
    assert [result.sequence for result in read] == list(range(1, 31))
    assert {result.error_code for result in read[10:]} == {"batch_expired"}


def test_delete_and_purge(database: Database) -> None:
    """A deleted batch is gone at once and its rows soon after; one that runs cannot be deleted."""
    batch, other = stored(database, 25), stored(database, 5)
    with pytest.raises(batches.StateError, match="in_progress"):
        database.call(batches.delete, batch.id)
    database.call(batches.cancel, batch.id)
    assert database.call(batches.delete, batch.id)
    assert database.call(batches.get, batch.id) is None
    assert not database.call(batches.delete, batch.id)
    rounds = 0
    while database.call(batches.purge, 10):
        rounds += 1
    assert rounds >= 3
    assert (count(database, "requests"), count(database, "purges")) == (5, 0)
    assert database.call(batches.get, other.id) is not None


def test_retention(database: Database) -> None:
    """Batches that ended long ago are removed, those that run or ended lately stay."""
    old, late, running = (stored(database, 1) for _ in range(3))
    for batch in (old, late):
        database.call(batches.cancel, batch.id)
    database.call(
        lambda db: db.execute_sql("UPDATE batches SET end_time = end_time - interval '2h' WHERE id = %s", (old.id,))
    )
    assert database.call(batches.delete_old, 3600) == [old.id]
    assert database.call(batches.get, late.id)
    assert database.call(batches.get, running.id)


def test_retry_takes_what_failed(database: Database) -> None:
    """A retry is a batch of the failed requests alone, in their order; the same retry again is the same batch."""
    limits = batches.Limits(100, 1000)
    batch = stored(database, 4)
    with pytest.raises(batches.StateError, match="in_progress"):
        database.call(batches.retry, batch.id, None, 60, limits)
    mine = uuid4()
    [chunk] = database.call(chunks.claim, "w", mine, ["tiny"], 1, LEASE_S)
    database.call(results.write, answers(chunk, range(0, 4, 2)), mine)
    database.call(results.write, answers(chunk, range(1, 4, 2), status=500), mine)
    again = database.call(batches.retry, batch.id, "r", 60, limits)
    assert again is not None
    assert (again.total, again.state) == (2, "in_progress")
    [retried] = database.call(chunks.claim, "w", mine, ["tiny"], 1, LEASE_S)
    assert [request.custom_id for request in database.call(chunks.unanswered, retried)] == ["c1", "c3"]
    same = database.call(batches.retry, batch.id, "r", 60, limits)
    assert same is not None
    assert same.id == again.id
    database.call(results.write, answers(retried, range(2)), mine)
    with pytest.raises(batches.StateError, match="no failed request"):
        database.call(batches.retry, again.id, None, 60, limits)


def test_limits_on_what_is_open(database: Database) -> None:
    """Over a limit nothing is stored, and the error has the limit and the value."""
    stored(database, 10, Limits(1, 10))
    with pytest.raises(batches.FullError, match="batches open: 2, at most 1"):
        stored(database, 10, Limits(1, 100))
    with pytest.raises(batches.FullError, match="batches open: 2, at most 1"):
        database.call(batches.reserve, Limits(1, 100))
    with pytest.raises(batches.FullError, match="requests queued: 20, at most 19"):
        stored(database, 10, Limits(5, 19))
    assert count(database, "requests") == 10


def test_an_expired_lease_that_nobody_took_is_still_held(database: Database) -> None:
    """After an outage of Postgres longer than the lease, work goes on where it was."""
    stored(database, 2)
    mine = uuid4()
    [chunk] = database.call(chunks.claim, "w", mine, ["tiny"], 1, LEASE_S)
    database.call(lambda db: db.execute_sql("UPDATE chunks SET lease_until = clock_timestamp() - interval '1s'"))
    assert database.call(chunks.release_expired, 1e6) == 0
    assert database.call(chunks.renew, [chunk.id], mine, LEASE_S) == {chunk.id}


def test_sequence_numbers_have_no_gaps(database: Database) -> None:
    """Results in the order of storing are numbered 1, 2, 3 over several writers, so a reader misses none."""
    batch = stored(database, 200)
    one, two = uuid4(), uuid4()
    [first] = database.call(chunks.claim, "a", one, ["tiny"], 1, LEASE_S)
    [second] = database.call(chunks.claim, "b", two, ["tiny"], 1, LEASE_S)
    database.call(results.write, answers(second, range(150, 200)), two)
    database.call(results.write, answers(first, range(100)), one)
    database.call(results.write, answers(second, range(100, 150)), two)
    read = database.call(results.read_page, "sequence", batch.id, Span(1, 1000))
    assert [result.sequence for result in read] == list(range(1, 201))
    assert read[0].custom_id == "c150"


def test_heartbeat_ages_by_the_database(database: Database) -> None:
    """The age is the database's, and a new incarnation begins a new life in the same row."""
    first = Beat("w", uuid4(), "127.0.0.1:1", "loading", 10)
    database.call(heartbeats.write, first)
    database.call(
        lambda db: db.execute_sql(
            "UPDATE heartbeats SET last_seen = last_seen - interval '72s', start_time = start_time - interval '90s'"
        )
    )
    [seen] = database.call(heartbeats.read)
    assert seen.beat == first
    assert 72 <= seen.age_s < 80
    database.call(heartbeats.write, Beat("w", uuid4(), "127.0.0.1:1", "starting", 11))
    [seen] = database.call(heartbeats.read, "w")
    assert (seen.beat.pid, seen.age_s < 30) == (11, True)
    young = database.call(
        lambda db: db.execute_sql("SELECT clock_timestamp() - start_time < interval '60s' FROM heartbeats").fetchone()
    )
    assert young[0]


def test_an_identity_is_locked_for_one_process(database_url: str) -> None:
    """Two workers with the same identity cannot run at once; another identity can."""
    first, second = Database(database_url, "a"), Database(database_url, "b")
    with first._pool.connection_context(), second._pool.connection_context():
        assert lock_worker(first._pool, "w")
        assert not lock_worker(second._pool, "w")
        assert lock_worker(second._pool, "v")
    first.close()
    second.close()


def test_a_session_of_ones_own_does_not_lock_one_out(database_url: str) -> None:
    """What Postgres still keeps for an earlier connection of the same process is ended; another process's is not."""
    name = f"heart-{uuid4()}"
    earlier, later, other = (connect(database_url, of, 10) for of in (name, name, f"heart-{uuid4()}"))
    for connection in (earlier, later, other):
        connection.connect()
    assert lock_worker(earlier, "w")
    assert not lock_worker(later, "w")
    assert end_earlier_sessions(other) == 0
    assert end_earlier_sessions(later) == 1
    until(lambda: lock_worker(later, "w"), "the lock")
    later.close()
    other.close()


def test_results_are_divided_into_pages_by_bytes(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader gets every result once, in pages that are bounded, however large one is, and whether body or error."""
    monkeypatch.setattr(results, "AROUND", 8)
    monkeypatch.setattr(results, "STRETCH", 9)
    batch = stored(database, 20)
    mine = uuid4()
    [chunk] = database.call(chunks.claim, "w", mine, ["tiny"], 1, LEASE_S)
    sizes = [10] * 5 + [400, 10_000, 10] + [60] * 12
    given = [
        Result(chunk.id, batch.id, index, status_code=200, body="x" * size, custom_id="c1")
        if index % 2
        else Result(chunk.id, batch.id, index, error_code="E", error_message="x" * size, custom_id="c1")
        for index, size in enumerate(sizes)
    ]
    database.call(results.write, given, mine)
    for order, start in (("index", 0), ("sequence", 1)):
        pages, lines = [], []
        while spans := database.call(results.divide, order, batch.id, start, 300, True):
            for span in spans:
                assert span.first == start
                page = database.call(results.read_page, order, batch.id, span)
                assert [getattr(result, order) for result in page] == list(range(span.first, span.last + 1))
                pages.append([len(result.body or result.error_message or "") for result in page])
                jsonl = database.call(results.read_lines, order, batch.id, span)
                lines.append([line.count(b"x") for line in jsonl.splitlines()])
                start = span.last + 1
        # Of nine each time, and with ten bytes around them: 5 * 20 + 410 are more than 300, and so on.
        assert pages == lines == [[10] * 5 + [400], [10_000], [10, 60], [60] * 5, [60] * 4, [60] * 2]


def test_lines_are_those_of_the_client(database: Database) -> None:
    """What Postgres writes of a result is what the client makes of its message, whatever characters are in it."""
    names = ["plain", 'quote " and \\', "line\nbreak\r\t", "ümläut \u2028 😀", "c" * 500]
    batch = stored(database, len(names))
    rename = "UPDATE requests SET custom_id = %s WHERE batch_id = %s AND index = %s"
    for index, name in enumerate(names):
        database.call(lambda db, *values: db.execute_sql(rename, values), name, batch.id, index)
    mine = uuid4()
    [chunk] = database.call(chunks.claim, "w", mine, ["tiny"], 1, LEASE_S)
    outcomes: list[dict[str, Any]] = [
        {"status_code": 200, "body": '{"a": "b\\n \\u00e4"}'},
        {"status_code": 400, "body": '{ "pretty": [1.0, 1e400] }'},
        {"error_code": "batch_expired", "error_message": 'said "no"\nat last'},
        {"status_code": 200, "body": '{"text": "ä😀"}'},
        {"error_code": "INTERNAL_ERROR", "error_message": ""},
    ]
    given = [Result(chunk.id, batch.id, index, **outcome) for index, outcome in enumerate(outcomes)]
    database.call(results.write, given, mine)
    page = database.call(results.read_page, "index", batch.id, Span(0, 100))
    made = database.call(results.read_lines, "index", batch.id, Span(0, 100))
    assert made.endswith(b"\n")
    lines = made.decode().removesuffix("\n").split("\n")
    expected = [output.line(messages.result_message(batch.id, result)) for result in page]
    assert len(lines) == len(expected) == len(names)
    for line, other in zip(lines, expected, strict=True):
        assert json.loads(line, parse_float=str) == json.loads(other, parse_float=str)


def test_a_gap_in_the_order_of_the_requests_ends_a_page(database: Database) -> None:
    """Before the batch has ended nothing behind a request without a result is read, in either form."""
    batch = stored(database, 10)
    mine = uuid4()
    [chunk] = database.call(chunks.claim, "w", mine, ["tiny"], 1, LEASE_S)
    database.call(results.write, answers(chunk, [2, 3, 4, 6, 7]), mine)
    for start, skipping, whole in ((0, [2, 3, 4, 6, 7], []), (2, [2, 3, 4, 6, 7], [2, 3, 4]), (6, [6, 7], [6, 7])):
        for may_skip, expected in ((True, skipping), (False, whole)):
            spans = database.call(results.divide, "index", batch.id, start, 1 << 20, may_skip)
            read = [
                result.index for span in spans for result in database.call(results.read_page, "index", batch.id, span)
            ]
            lines = [database.call(results.read_lines, "index", batch.id, span).splitlines() for span in spans]
            assert read == expected
            assert (sum(map(len, lines)), [span.last for span in spans]) == (len(expected), expected[-1:])
