"""Storage: batches are stored whole or not at all, leases fence, results are stored once, streams have no gaps."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any
from uuid import uuid4

import peewee
import pytest

from service.api import messages
from service.db import (
    batches,
    chunks,
    creation,
    endings,
    failures,
    files,
    heartbeats,
    identity,
    losses,
    requests,
    results,
    standings,
    suspects,
    usage,
    work,
)
from service.db.chunks import Chunk, Holder
from service.db.connection import Database, connect, migrate
from service.db.heartbeats import Beat
from service.db.limits import FullError, Limits
from service.db.output import Measuring, Page, stretches
from service.db.output import read as read_output
from service.db.results import Result, Span
from service.machine import Place
from tests.support.plans import looked_at
from tests.support.queue import queued
from tests.support.store import answers, count, holder, stored
from tests.support.waiting import until
from vllm_batch import output


def test_migrations_are_applied_once(database: Database) -> None:
    """Applying the migrations again does nothing."""
    assert database.call(migrate) == []


def test_batch_is_stored_with_bodies_byte_for_byte(database: Database) -> None:
    """Bodies with backslashes and escapes are stored byte for byte."""
    batch = stored(database, 3)
    [chunk] = database.call(chunks.claim, holder("w"), ["tiny"], 5)
    found = database.call(chunks.unanswered, chunk)
    assert [request.custom_id for request in found] == ["c0", "c1", "c2"]
    assert found[1].body == '{"model":"tiny","x":"a\\\\b\\tc"}'
    assert (batch.total, batch.state, list(batch.models)) == (3, "in_progress", ["tiny"])


def test_large_batches_are_cut_into_chunks(database: Database) -> None:
    """Every request of a large batch is in exactly one chunk."""
    batch = stored(database, 250)
    taken = database.call(chunks.claim, holder("w"), ["tiny"], 10)
    assert [(chunk.first_index, chunk.count) for chunk in taken] == [(0, 100), (100, 100), (200, 50)]
    assert {chunk.batch_id for chunk in taken} == {batch.id}


def test_a_chunk_is_claimed_by_one_worker(database: Database) -> None:
    """Two workers never get the same chunk, and a worker that serves another model gets none."""
    stored(database, 150)
    other = database.call(chunks.claim, holder("other"), ["large"], 10)
    first = database.call(chunks.claim, holder("a"), ["tiny"], 1)
    second = database.call(chunks.claim, holder("b"), ["tiny"], 10)
    assert other == []
    assert len(first) == len(second) == 1
    assert first[0].id != second[0].id


def test_higher_priority_runs_first(database: Database) -> None:
    """A batch of higher priority overtakes one that has waited longer."""
    stored(database, 1)
    urgent = stored(database, 1, priority=5)
    [chunk] = database.call(chunks.claim, holder("w"), ["tiny"], 1)
    assert chunk.batch_id == urgent.id


def test_the_last_result_completes_the_batch(database: Database) -> None:
    """The last result completes the batch, with its counts and token usage."""
    batch = stored(database, 3)
    mine = holder()
    [chunk] = database.call(chunks.claim, mine, ["tiny"], 1)
    assert database.call(results.write, answers(chunk, range(2)), mine.incarnation) == 2
    half = database.call(batches.get, batch.id)
    assert half is not None
    assert (half.state, half.completed, half.end_time) == ("in_progress", 2, None)
    assert database.call(results.write, answers(chunk, range(2, 3), status=400), mine.incarnation) == 1
    done = database.call(batches.get, batch.id)
    assert done is not None
    assert (done.state, done.completed, done.failed) == ("completed", 2, 1)
    assert (done.prompt_tokens, done.completion_tokens) == (6, 9)
    assert (done.cached_tokens, done.reasoning_tokens) == (3, 6)
    assert done.end_time is not None


def test_a_result_is_written_once(database: Database) -> None:
    """Writing the same results again, as after a lost connection, changes nothing."""
    batch = stored(database, 3)
    mine = holder()
    [chunk] = database.call(chunks.claim, mine, ["tiny"], 1)
    group = answers(chunk, range(2))
    assert database.call(results.write, group, mine.incarnation) == 2
    assert database.call(results.write, group, mine.incarnation) == 0
    again = database.call(batches.get, batch.id)
    assert again is not None
    assert (again.completed, count(database, "results")) == (2, 2)


def check_completed(database: Database, batch_id: int, completed: int) -> None:
    done = database.call(batches.get, batch_id)
    assert done is not None
    assert (done.state, done.completed) == ("completed", completed)


def in_sequence(database: Database, batch_id: int) -> list[tuple[int, int]]:
    """The numbers of a batch's results in the order in which they were stored, each with its request's index."""
    page = database.call(results.read_page, "sequence", "all", batch_id, Span(1, 9))
    return [(result.sequence, result.index) for result in page]


def test_an_attempt_beside_the_one_before_it(database_url: str) -> None:
    """A group sent again with more, while its first attempt has not committed yet, is stored once and without a gap."""
    first, second = Database(database_url, "first"), Database(database_url, "second")
    batch = stored(first, 4)
    mine = holder()
    [chunk] = first.call(chunks.claim, mine, ["tiny"], 1)
    is_written, may_commit = threading.Event(), threading.Event()

    def slowly(db: peewee.PostgresqlDatabase) -> None:
        with db.atomic():
            results.write(db, answers(chunk, range(2)), mine.incarnation)
            is_written.set()
            may_commit.wait(60)

    def is_waiting(db: peewee.PostgresqlDatabase) -> bool:
        query = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
        return bool(db.execute_sql(query).fetchone()[0])

    with ThreadPoolExecutor(2) as threads:
        one = threads.submit(first.call, slowly)
        assert is_written.wait(60)
        other = threads.submit(second.call, results.write, answers(chunk, range(3)), mine.incarnation)
        until(lambda: first.call(is_waiting), "the second attempt to wait for the first")
        may_commit.set()
        one.result()
        assert other.result() == 1
    assert first.call(results.write, answers(chunk, range(4)), mine.incarnation) == 1
    check_completed(first, batch.id, 4)
    assert in_sequence(first, batch.id) == [(1, 0), (2, 1), (3, 2), (4, 3)]
    first.close()
    second.close()


def test_a_gap_of_before(database: Database) -> None:
    """A batch whose results have a gap in their sequence, as an earlier version could leave one, is completed."""
    batch = stored(database, 4)
    mine = holder()
    [chunk] = database.call(chunks.claim, mine, ["tiny"], 1)
    database.call(results.write, answers(chunk, range(2)), mine.incarnation)
    database.call(lambda db: db.execute_sql("UPDATE results SET sequence = 3 WHERE index = 1"))
    assert database.call(results.write, answers(chunk, range(4)), mine.incarnation) == 2
    check_completed(database, batch.id, 4)
    assert in_sequence(database, batch.id) == [(1, 0), (3, 1), (4, 2), (5, 3)]


def test_two_results_of_one_request(database: Database) -> None:
    """Of two results of a request in one group one is stored, and the sequence has no gap."""
    batch = stored(database, 2)
    mine = holder()
    [chunk] = database.call(chunks.claim, mine, ["tiny"], 1)
    group = [*answers(chunk, range(1)), *answers(chunk, range(2))]
    assert database.call(results.write, group, mine.incarnation) == 2
    assert in_sequence(database, batch.id) == [(1, 0), (2, 1)]


def test_results_of_a_request_under_two_leases(database: Database) -> None:
    """A result under a lease that was lost counts nowhere beside the one under the lease that its request has now."""
    batch = stored(database, 3)
    mine = holder()
    [lost] = database.call(chunks.claim, mine, ["tiny"], 1)
    database.call(chunks.begin, mine, {lost.id: lost.first_index})
    assert database.call(suspects.bury, mine.worker_id).suspects == 1
    [suspect] = database.call(suspects.claim_few, mine, ["tiny"], 0)
    group = [*answers(lost, range(1)), *answers(suspect, range(1))]
    assert database.call(results.write, group, mine.incarnation) == 1
    half = database.call(batches.get, batch.id)
    assert half is not None
    assert (half.state, half.completed) == ("in_progress", 1)
    [rest] = database.call(chunks.claim, mine, ["tiny"], 1)
    assert [request.index for request in database.call(chunks.unanswered, rest)] == [1, 2]
    assert database.call(results.write, answers(rest, range(1, 3)), mine.incarnation) == 2
    done = database.call(batches.get, batch.id)
    assert done is not None
    assert (done.state, done.completed) == ("completed", 3)


def test_zombie_owner_cannot_write(database: Database) -> None:
    """A worker whose lease was given to another can neither store results nor renew the lease."""
    stored(database, 2)
    zombie, heir = holder("z"), holder("h")
    [chunk] = database.call(chunks.claim, zombie, ["tiny"], 1)
    database.call(lambda db: db.execute_sql("UPDATE chunks SET lease_until = clock_timestamp() - interval '1s'"))
    assert losses.released(database.call(losses.release_expired, 0.001)) == 1
    [inherited] = database.call(chunks.claim, heir, ["tiny"], 1)
    assert inherited.id == chunk.id
    assert database.call(results.write, answers(chunk, range(2)), zombie.incarnation) == 0
    assert database.call(chunks.renew, zombie, [chunk.id]) == set()
    assert database.call(results.write, answers(chunk, range(2)), heir.incarnation) == 2


def test_claims_whose_answer_was_lost(database: Database) -> None:
    """Chunks that were claimed and never heard of go back to the queue, and what is known or of others stays."""
    stored(database, 500)
    mine, other = holder(), holder("other")
    known, lost = database.call(chunks.claim, mine, ["tiny"], 2)
    [theirs] = database.call(chunks.claim, other, ["tiny"], 1)
    taken = database.call(work.take, mine, ["tiny"], 1, 0, [known.id])
    assert [chunk.id for chunk, _ in taken.chunks] == [lost.id]
    assert database.call(chunks.renew, mine, [known.id, lost.id]) == {known.id, lost.id}
    assert database.call(chunks.renew, other, [theirs.id]) == {theirs.id}


def test_only_requests_without_result_run_again(database: Database) -> None:
    """After a death the next worker gets exactly the requests without a stored result."""
    stored(database, 5)
    dead, heir = holder(), holder()
    [chunk] = database.call(chunks.claim, dead, ["tiny"], 1)
    database.call(results.write, answers(chunk, range(3)), dead.incarnation)
    assert database.call(chunks.release, dead, [chunk.id]) == 1
    [again] = database.call(chunks.claim, heir, ["tiny"], 1)
    assert [request.index for request in database.call(chunks.unanswered, again)] == [3, 4]


def bury(database: Database, worker_id: str = "w") -> tuple[int, int, int]:
    burial = database.call(suspects.bury, worker_id)
    return burial.released, burial.suspects, burial.crashed


def test_three_deaths_find_a_killer(database: Database) -> None:
    """After a death its requests are suspects; they run a few at a time, then alone, and the culprit gets the error."""
    batch = stored(database, 120)
    lives = [holder() for _ in range(4)]
    first = database.call(chunks.claim, lives[0], ["tiny"], 1)
    database.call(results.write, answers(first[0], range(20)), lives[0].incarnation)
    assert bury(database) == (0, 80, 0)

    normal = database.call(chunks.claim, lives[1], ["tiny"], 5)
    few = database.call(suspects.claim_few, lives[1], ["tiny"], 0)
    assert [(chunk.first_index, chunk.count) for chunk in normal] == [(100, 20)]
    assert [chunk.first_index for chunk in few] == list(range(20, 29))
    assert database.call(suspects.claim_few, lives[1], ["tiny"], 9) == []
    assert bury(database) == (9, 29, 0)
    assert database.call(suspects.waiting, ["tiny"]) == (91, 9)

    [alone] = database.call(suspects.claim_alone, lives[2], ["tiny"])
    assert bury(database) == (0, 0, 1)
    [killer] = database.call(results.read_page, "index", "all", batch.id, Span(20, 20))
    assert (killer.index, killer.error_code) == (alone.first_index, "REQUEST_CRASHED_ENGINE")
    assert "3 times" in (killer.error_message or "")

    for claim, *how_many in ((chunks.claim, 5), (suspects.claim_few, 0), (suspects.claim_alone,)):
        while taken := database.call(claim, lives[3], ["tiny"], *how_many):
            for chunk in taken:
                indexes = range(chunk.first_index, chunk.first_index + chunk.count)
                database.call(results.write, answers(chunk, indexes), lives[3].incarnation)
    done = database.call(batches.get, batch.id)
    assert done is not None
    assert (done.state, done.completed, done.failed) == ("completed", 119, 1)


def test_cancel_keeps_what_is_finished(database: Database) -> None:
    """Cancelling drops waiting chunks, ends held ones at their next renewal, keeps results, and happens once."""
    batch = stored(database, 250)
    mine = holder()
    [chunk] = database.call(chunks.claim, mine, ["tiny"], 1)
    database.call(results.write, answers(chunk, range(10)), mine.incarnation)
    cancelling = database.call(endings.cancel, batch.id)
    assert cancelling is not None
    assert (cancelling.state, cancelling.completed, cancelling.end_time) == ("cancelling", 10, None)
    assert database.call(chunks.claim, holder("v"), ["tiny"], 5) == []
    assert database.call(chunks.renew, mine, [chunk.id]) == set()
    assert database.call(chunks.drop_cancelled, mine, [chunk.id]) == set()
    assert database.call(endings.settle_cancelled) == 1
    assert database.call(results.write, answers(chunk, range(10, 20)), mine.incarnation) == 0
    again = database.call(endings.cancel, batch.id)
    assert again is not None
    assert (again.state, again.completed) == ("cancelled", 10)
    assert count(database, "chunks") == 0


def test_cancel_racing_completion(database: Database) -> None:
    """A batch completed first stays completed; one cancelled first never becomes completed."""
    first, second = stored(database, 1), stored(database, 1)
    mine = holder()
    one, two = database.call(chunks.claim, mine, ["tiny"], 2)
    database.call(results.write, answers(one, range(1)), mine.incarnation)
    with pytest.raises(batches.StateError, match="is completed"):
        database.call(endings.cancel, first.id)
    database.call(endings.cancel, second.id)
    assert database.call(results.write, answers(two, range(1)), mine.incarnation) == 1
    database.call(endings.settle_cancelled)
    ended = database.call(batches.get, second.id)
    assert ended is not None
    assert (ended.state, ended.completed) == ("cancelled", 1)


def test_expiry_answers_the_rest(database: Database) -> None:
    """When its window ends, a batch keeps finished results, the rest become `batch_expired`, and leases are void."""
    batch = stored(database, 30, completion_window_s=3600.0)
    mine = holder()
    [chunk] = database.call(chunks.claim, mine, ["tiny"], 1)
    database.call(results.write, answers(chunk, range(10)), mine.incarnation)
    assert database.call(endings.expire, 60) == []
    database.call(lambda db: db.execute_sql("UPDATE batches SET expire_time = clock_timestamp()"))
    assert database.call(endings.expire, 60) == [batch.id]
    done = database.call(batches.get, batch.id)
    assert done is not None
    assert (done.state, done.completed, done.failed) == ("expired", 10, 20)
    assert database.call(results.write, answers(chunk, range(10, 20)), mine.incarnation) == 0
    read = database.call(results.read_page, "sequence", "all", batch.id, Span(1, 100))
    assert [result.sequence for result in read] == list(range(1, 31))
    assert {result.error_code for result in read[10:]} == {"batch_expired"}


def test_delete_and_purge(database: Database) -> None:
    """A deleted batch is gone at once and its rows after purging; a running one cannot be deleted."""
    batch, other = stored(database, 25), stored(database, 5)
    with pytest.raises(batches.StateError, match="in_progress"):
        database.call(endings.delete, batch.id)
    database.call(endings.cancel, batch.id)
    assert database.call(endings.delete, batch.id)
    assert database.call(batches.get, batch.id) is None
    assert database.call(requests.read_one, batch.id, "c0", 100) is None
    assert not database.call(endings.delete, batch.id)
    rounds = 0
    while database.call(endings.purge, 10):
        rounds += 1
    assert rounds >= 3
    assert (count(database, "requests"), count(database, "purges")) == (5, 0)
    assert database.call(batches.get, other.id) is not None


def test_a_part_of_an_upload_that_was_given_up(database: Database) -> None:
    """What still arrives of an upload after it was cancelled is refused, and nothing of it stays."""
    upload = database.call(files.begin_upload, "t", "name", 2, None, Limits(9, 9))
    parts = [database.call(files.begin_part, "t", upload.id) for _ in range(2)]
    assert parts[0] is not None
    assert parts[1] is not None
    database.call(files.add_piece, parts[0], 0, b"x")
    assert database.call(files.finish_part, parts[0], 1).bytes == 1
    database.call(files.add_piece, parts[1], 0, b"x")
    database.call(files.discard, "t", upload.id, "pending")
    with pytest.raises(files.PartGoneError):
        database.call(files.finish_part, parts[1], 1)
    while database.call(files.purge, 10):
        pass
    with pytest.raises(files.PartGoneError):
        database.call(files.add_piece, parts[1], 1, b"y")
    assert (count(database, "file_parts"), count(database, "file_pieces"), count(database, "files")) == (0, 0, 0)


def test_retention(database: Database) -> None:
    """Batches that ended before the retention time are removed; recent and running ones stay."""
    old, late, running = (stored(database, 1) for _ in range(3))
    for batch in (old, late):
        database.call(endings.cancel, batch.id)
    database.call(
        lambda db: db.execute_sql("UPDATE batches SET end_time = end_time - interval '2h' WHERE id = %s", (old.id,))
    )
    # Their tokens are added to their tenant's first.
    assert database.call(endings.delete_old, 3600) == []
    database.call(usage.count_ended, 100)
    assert database.call(endings.delete_old, 3600) == [old.id]
    assert database.call(batches.get, late.id)
    assert database.call(batches.get, running.id)


def test_retry_takes_what_failed(database: Database) -> None:
    """A retry contains only the failed requests, in order; the same retry again returns the same batch."""
    limits = Limits(100, 1000)
    batch = stored(database, 4)
    with pytest.raises(batches.StateError, match="in_progress"):
        database.call(creation.retry, batch.id, None, 60, limits)
    mine = holder()
    [chunk] = database.call(chunks.claim, mine, ["tiny"], 1)
    database.call(results.write, answers(chunk, range(0, 4, 2)), mine.incarnation)
    database.call(results.write, answers(chunk, range(1, 4, 2), status=500), mine.incarnation)
    again = database.call(creation.retry, batch.id, "r", 60, limits)
    assert again is not None
    assert (again.total, again.state) == (2, "in_progress")
    [retried] = database.call(chunks.claim, mine, ["tiny"], 1)
    assert [request.custom_id for request in database.call(chunks.unanswered, retried)] == ["c1", "c3"]
    same = database.call(creation.retry, batch.id, "r", 60, limits)
    assert same is not None
    assert same.id == again.id
    database.call(results.write, answers(retried, range(2)), mine.incarnation)
    with pytest.raises(batches.StateError, match="no failed request"):
        database.call(creation.retry, again.id, None, 60, limits)


def test_limits_on_what_is_open(database: Database) -> None:
    """Over a limit nothing is stored, and the error states the value and the limit."""
    stored(database, 10, Limits(1, 10))
    with pytest.raises(FullError, match="open batches: 2, at most 1 are allowed, 0 left"):
        stored(database, 10, Limits(1, 100))
    with pytest.raises(FullError, match="open batches: 2, at most 1"):
        database.call(creation.reserve, Limits(1, 100))
    with pytest.raises(FullError, match="queued requests: 20, at most 19 are allowed, 9 left"):
        stored(database, 10, Limits(5, 19))
    assert count(database, "requests") == 10


def test_no_id_is_given_twice(database: Database) -> None:
    """If the sequence goes back, as on a standby that lagged, ids are still new and larger than earlier ones."""
    first = [database.call(creation.reserve) for _ in range(100)]
    database.call(lambda db: db.execute_sql("SELECT setval(pg_get_serial_sequence('batches', 'id'), 1, false)"))
    again = [database.call(creation.reserve) for _ in range(100)]
    assert len({*first, *again}) == 200
    # Within a millisecond the sequence decides.
    assert max(first) >> 20 <= min(again) >> 20


def test_an_expired_lease_that_nobody_took_is_still_held(database: Database) -> None:
    """A lease that expired during an outage of Postgres, and was not taken over, can still be renewed."""
    stored(database, 2)
    mine = holder()
    [chunk] = database.call(chunks.claim, mine, ["tiny"], 1)
    database.call(lambda db: db.execute_sql("UPDATE chunks SET lease_until = clock_timestamp() - interval '1s'"))
    assert database.call(losses.release_expired, 1e6) == []
    assert database.call(chunks.renew, mine, [chunk.id]) == {chunk.id}


def test_sequence_numbers_have_no_gaps(database: Database) -> None:
    """Across several writers results are numbered without gaps in the order of storing, so a reader misses none."""
    batch = stored(database, 200)
    one, two = holder("a"), holder("b")
    [first] = database.call(chunks.claim, one, ["tiny"], 1)
    [second] = database.call(chunks.claim, two, ["tiny"], 1)
    database.call(results.write, answers(second, range(150, 200)), two.incarnation)
    database.call(results.write, answers(first, range(100)), one.incarnation)
    database.call(results.write, answers(second, range(100, 150)), two.incarnation)
    read = database.call(results.read_page, "sequence", "all", batch.id, Span(1, 1000))
    assert [result.sequence for result in read] == list(range(1, 201))
    assert read[0].custom_id == "c150"


def test_heartbeat_ages_by_the_database(database: Database) -> None:
    """Postgres computes a heartbeat's age, and a new incarnation starts a new life in the same row."""
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
    assert database.call(heartbeats.begin, Beat("w", uuid4(), "127.0.0.1:1", "starting", 11), 60, seen)
    [seen] = database.call(heartbeats.read, "w")
    assert (seen.beat.pid, seen.age_s < 30) == (11, True)
    young = database.call(
        lambda db: db.execute_sql("SELECT clock_timestamp() - start_time < interval '60s' FROM heartbeats").fetchone()
    )
    assert young[0]


def test_settings_that_served_are_remembered(database: Database) -> None:
    """A worker that was ready with its settings has served with them, in later lives too, until ready with others."""

    def beat(phase: str, settings: str) -> bool:
        before = next(iter(database.call(heartbeats.read, "w")), None)
        life = Beat("w", uuid4(), "127.0.0.1:1", phase, 10, settings=settings)
        assert database.call(heartbeats.begin, life, 60, before)
        [seen] = database.call(heartbeats.read, "w")
        return seen.has_served

    steps = [("loading", "a"), ("ready", "a"), ("loading", "a"), ("loading", "b"), ("loading", "a"), ("ready", "b")]
    assert [beat(*step) for step in steps] == [False, True, True, False, True, True]
    assert not beat("loading", "a")


def test_a_heartbeat_is_read_as_it_was_written(database: Database) -> None:
    """Models and details of any shape are read back as written, for a new row and an existing one."""
    incarnation = uuid4()
    for detail in ({}, {"in_engine": 3, "rate": 0.5, "nested": [{"text": "ä \\ \" ' %s"}, None, True]}):
        models, place = ("tiny", 'a "b", {c}'), Place("m", "b/1", "b/2")
        beat = Beat("w", incarnation, "127.0.0.1:1", "ready", 10, models, 7, "s", place, 3, detail)
        database.call(heartbeats.write, beat)
        [seen] = database.call(heartbeats.read)
        assert seen.beat == beat


def test_a_name_has_one_life_at_a_time(database: Database) -> None:
    """A life begins only in the place of the heartbeat that it knows; after that the one before writes nothing more."""
    old, new = (Beat("w", uuid4(), "127.0.0.1:1", "ready", pid) for pid in (1, 2))
    assert database.call(heartbeats.begin, old, 60, None)
    assert not database.call(heartbeats.begin, new, 60, None)
    [seen] = database.call(heartbeats.read)
    assert 0 < seen.lease_left_s <= 60
    assert database.call(heartbeats.write, old)
    # It has beaten since.
    assert not database.call(heartbeats.begin, new, 60, seen)
    [seen] = database.call(heartbeats.read)
    assert database.call(heartbeats.begin, new, 60, seen)
    assert not database.call(heartbeats.write, old)
    assert not database.call(heartbeats.begin, old, 60, seen)
    assert database.call(heartbeats.write, new, 0)
    [seen] = database.call(heartbeats.read)
    assert (seen.beat.pid, seen.lease_left_s <= 0) == (2, True)


def test_the_name_of_a_version_without_leases(database: Database) -> None:
    """A heartbeat of a version that knew no leases keeps its name for a minute, unless it said that it stops."""
    database.call(heartbeats.write, Beat("w", uuid4(), "127.0.0.1:1", "ready", 1))
    lefts, change = [], "UPDATE heartbeats SET lease_until = NULL, phase = %s"
    for phase in ("ready", "stopping"):
        database.call(lambda db, phase=phase: db.execute_sql(change, (phase,)))
        [seen] = database.call(heartbeats.read)
        lefts.append(seen.lease_left_s)
    assert 0 < lefts[0] <= 60
    assert lefts[1] <= 0


def test_only_the_sessions_of_that_life_are_ended(database_url: str) -> None:
    """The sessions whose name ends with an incarnation are ended, and those of others go on."""
    life, other = str(uuid4()), str(uuid4())
    named = [connect(database_url, name, 10) for name in (f"heart-{life}", f"worker-run-{life}", f"heart-{other}")]
    for one in named:
        one.connect()
    heart, run, others = named
    assert identity.end_sessions(others, life) == 2
    for one in (heart, run):
        with pytest.raises(peewee.OperationalError):
            one.execute_sql("SELECT 1")
    assert identity.end_sessions(others, other) == 0
    for one in named:
        one.close()


def test_results_are_divided_into_pages_by_bytes(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages of results are bounded in bytes and contain each result once, however large, whether body or error."""
    monkeypatch.setattr(results, "AROUND", 8)
    monkeypatch.setattr(results, "STRETCH", 9)
    batch = stored(database, 20)
    mine = holder()
    [chunk] = database.call(chunks.claim, mine, ["tiny"], 1)
    sizes = [10] * 5 + [400, 10_000, 10] + [60] * 12
    given = [
        Result(chunk.id, batch.id, index, status_code=200, body="x" * size, custom_id="c1")
        if index % 2
        else Result(chunk.id, batch.id, index, error_code="E", error_message="x" * size, custom_id="c1")
        for index, size in enumerate(sizes)
    ]
    database.call(results.write, given, mine.incarnation)
    for order, start in (("index", 0), ("sequence", 1)):
        pages, lines = [], []
        while spans := database.call(results.divide, order, "all", batch.id, start, 300, True).spans:
            for span in spans:
                assert span.first == start
                page = database.call(results.read_page, order, "all", batch.id, span)
                assert [getattr(result, order) for result in page] == list(range(span.first, span.last + 1))
                pages.append([len(result.body or result.error_message or "") for result in page])
                jsonl = database.call(results.read_lines, order, "all", batch.id, span)
                lines.append([line.count(b"x") for line in jsonl.splitlines()])
                start = span.last + 1
        # Nine results each time, with ten bytes added to each: 5 * 20 + 410 are more than 300, and so on.
        assert pages == lines == [[10] * 5 + [400], [10_000], [10, 60], [60] * 5, [60] * 4, [60] * 2]


def test_lines_are_those_of_the_client(database: Database) -> None:
    """The lines that Postgres writes equal those that the client makes of messages, whatever they contain."""
    names = ["plain", 'quote " and \\', "line\nbreak\r\t", "ümläut \u2028 😀", "c" * 500]
    batch = stored(database, len(names))
    rename = "UPDATE requests SET custom_id = %s WHERE batch_id = %s AND index = %s"
    for index, name in enumerate(names):
        database.call(lambda db, *values: db.execute_sql(rename, values), name, batch.id, index)
    mine = holder()
    [chunk] = database.call(chunks.claim, mine, ["tiny"], 1)
    outcomes: list[dict[str, Any]] = [
        {"status_code": 200, "body": '{"a": "b\\n \\u00e4"}'},
        {"status_code": 400, "body": '{ "pretty": [1.0, 1e400] }'},
        {"error_code": "batch_expired", "error_message": 'said "no"\nat last'},
        {"status_code": 200, "body": '{"text": "ä😀"}'},
        {"error_code": "INTERNAL_ERROR", "error_message": ""},
    ]
    given = [Result(chunk.id, batch.id, index, **outcome) for index, outcome in enumerate(outcomes)]
    database.call(results.write, given, mine.incarnation)
    page = database.call(results.read_page, "index", "all", batch.id, Span(0, 100))
    made = database.call(results.read_lines, "index", "all", batch.id, Span(0, 100))
    assert made.endswith(b"\n")
    lines = made.decode().removesuffix("\n").split("\n")
    expected = [output.line(messages.result_message(batch.id, result)) for result in page]
    assert len(lines) == len(expected) == len(names)
    for line, other in zip(lines, expected, strict=True):
        assert json.loads(line, parse_float=str) == json.loads(other, parse_float=str)


def test_a_gap_in_the_order_of_the_requests_ends_a_page(database: Database) -> None:
    """Unless gaps may be skipped, nothing after a request without a result is read, in either form."""
    batch = stored(database, 10)
    mine = holder()
    [chunk] = database.call(chunks.claim, mine, ["tiny"], 1)
    database.call(results.write, answers(chunk, [2, 3, 4, 6, 7]), mine.incarnation)
    for start, skipping, whole in ((0, [2, 3, 4, 6, 7], []), (2, [2, 3, 4, 6, 7], [2, 3, 4]), (6, [6, 7], [6, 7])):
        for may_skip, expected in ((True, skipping), (False, whole)):
            spans = database.call(results.divide, "index", "all", batch.id, start, 1 << 20, may_skip).spans
            read = [
                result.index
                for span in spans
                for result in database.call(results.read_page, "index", "all", batch.id, span)
            ]
            lines = [database.call(results.read_lines, "index", "all", batch.id, span).splitlines() for span in spans]
            assert read == expected
            assert (sum(map(len, lines)), [span.last for span in spans]) == (len(expected), expected[-1:])


def test_a_batch_that_is_newer_than_its_statistics(database: Database) -> None:
    """A chunk's requests are read one by one, even if Postgres believes that their batch has next to none."""
    mine = holder()
    stored(database, 3000)
    for chunk in database.call(chunks.claim, mine, ["tiny"], 100):
        indexes = range(chunk.first_index, chunk.first_index + chunk.count)
        database.call(results.write, answers(chunk, indexes), mine.incarnation)
    database.call(lambda db: db.execute_sql("ANALYZE"))
    stored(database, 3000)
    [chunk] = database.call(chunks.claim, mine, ["tiny"], 1)
    query = f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {chunks.UNANSWERED}"
    [[plan]] = database.call(lambda db: db.execute_sql(query, {"chunk": chunk.id}).fetchone())
    assert plan["Plan"]["Actual Rows"] == chunk.count == len(database.call(chunks.unanswered, chunk))
    assert plan["Plan"]["Shared Hit Blocks"] < 10 * chunk.count


def test_a_claim_in_a_large_batch_that_is_newer_than_its_statistics(database: Database) -> None:
    """A claim reads no more of a batch that is twenty times as large, whatever Postgres believes of its chunks."""
    mine, other = holder(), holder("other")

    def sql(statement: str) -> None:
        database.call(lambda db: db.execute_sql(statement))

    def blocks(chunks_of_batch: int) -> int:
        """Read by a claim in a batch of which others hold chunks."""
        sql("UPDATE chunks SET state = 'done', worker_id = NULL, incarnation = NULL, lease_until = NULL")
        sql("DELETE FROM queue_changes")
        sql("DELETE FROM queue")
        queued(database, chunks_of_batch)
        assert len(database.call(chunks.claim, other, ["tiny"], 20)) == 20
        query = "EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) SELECT * FROM take_turns(ARRAY['tiny'], 1, %s, %s::uuid, 60)"
        who = (mine.worker_id, str(mine.incarnation))
        [[plan]] = database.call(lambda db: db.execute_sql(query, who).fetchone())
        assert plan["Plan"]["Actual Rows"] == 1
        return int(plan["Plan"]["Shared Hit Blocks"])

    sql("ALTER TABLE chunks SET (autovacuum_enabled = false)")
    queued(database, 1000)
    # Half of what Postgres knows is leased, so that few chunks of any other batch seem to be fewer.
    database.call(chunks.claim, other, ["tiny"], 500)
    sql("ANALYZE")
    assert blocks(20_000) < 2 * blocks(1_000)


@pytest.mark.parametrize("are_missing", [True, False], ids=["no-statistics", "statistics-of-before"])
def test_what_a_batch_costs_without_statistics(database: Database, are_missing: bool) -> None:
    """Whatever Postgres believes of a batch, no statement compares all of its rows with each other."""
    total = 1000
    mine, other = holder(), holder("other")

    def sql(statement: str, *params: object) -> None:
        database.call(lambda db: db.execute_sql(statement, params))

    def claimed(holds: Holder) -> list[Chunk]:
        """About half of the chunks that wait."""
        waiting = count(database, "chunks WHERE state = 'pending'")
        return database.call(chunks.claim, holds, ["tiny"], waiting // 2)

    def answered(holds: Holder, status: int = 200) -> None:
        for chunk in claimed(holds):
            indexes = [request.index for request in database.call(chunks.unanswered, chunk)]
            given = zip(answers(chunk, range(len(indexes)), status), indexes, strict=True)
            database.call(results.write, [replace(each, index=index) for each, index in given], holds.incarnation)

    for table in ("requests", "results", "chunks"):
        sql(f"ALTER TABLE {table} SET (autovacuum_enabled = false)")
    if not are_missing:
        stored(database, total)
        answered(mine)
        sql("ANALYZE")
        sql("DELETE FROM queue_changes")
        sql("DELETE FROM queue")
        sql("UPDATE chunks SET state = 'done', worker_id = NULL, incarnation = NULL, lease_until = NULL")
    batch, cancelled = stored(database, total), stored(database, total)
    answered(mine)
    answered(mine, 400)
    # Failures that say different things, and no names: as workers of before stored them.
    sql("UPDATE results SET custom_id = NULL, body = repeat(chr(65 + index %% 20), 1 + index %% 9)")
    whole = Span(0, total)
    seen = {
        "divide": looked_at(database, results.divide, "index", "all", batch.id, 0, 1 << 20, True),
        "failed": looked_at(database, results.divide, "sequence", "failed", batch.id, 0, 1 << 20, True),
        "page": looked_at(database, results.read_page, "index", "all", batch.id, whole),
        "lines": looked_at(database, results.read_lines, "sequence", "all", batch.id, whole),
        "failures": looked_at(database, failures.count, batch.id),
        "standings": looked_at(database, standings.read, {batch.id: {"tiny"}}, []),
        "result": looked_at(database, results.read_one, batch.id, "c7"),
        "request": looked_at(database, requests.read_one, batch.id, "c7", 100),
    }
    held = claimed(other)
    given = [Result(chunk.id, chunk.batch_id, chunk.first_index, 200, "{}") for chunk in held]
    seen["write"] = looked_at(database, results.write, given, other.incarnation)
    seen["suspect"] = looked_at(database, suspects.bury, "other")
    seen["cancel"] = looked_at(database, endings.cancel, cancelled.id)
    database.call(lambda db: db.execute_sql("DELETE FROM chunks WHERE batch_id = %s", (cancelled.id,)))
    database.call(endings.settle_cancelled)
    ended = database.call(batches.get, cancelled.id)
    assert ended is not None
    assert ended.state == "cancelled"
    measuring = Measuring(ended)
    for source, first in stretches(ended):
        seen[f"measure {source}"] = looked_at(database, measuring.measure, source, first)
    seen["read"] = looked_at(database, read_output, ended.id, Page(0, 0, "unanswered", 0, total, 0))
    seen["retry"] = looked_at(database, creation.retry, ended.id, None, 60, Limits(100, 100 * total))
    sql("UPDATE batches SET expire_time = clock_timestamp() WHERE id = %s", batch.id)
    seen["expire"] = looked_at(database, endings.expire, 60)
    assert database.call(endings.delete, batch.id)
    seen["purge"] = looked_at(database, endings.purge, total // 2)
    assert {name: found for name, found in seen.items() if found > 20 * total} == {}
    assert all(seen.values())
