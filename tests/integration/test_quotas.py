"""Quotas of tenants and what they have used, in Postgres."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
from playhouse.migrations import Runner

from service.db import batches, chunks, creation, endings, results, usage
from service.db.batches import StateError
from service.db.chunks import Chunk
from service.db.connection import Database
from service.db.creation import Options
from service.db.limits import FullError, Limits
from service.gateway.housekeeping import Housekeeping
from service.tenants import Quota, Quotas
from tests.support.servers import new_database
from tests.support.store import answers, count, holder, stored

ROOT = Path(__file__).resolve().parents[2]
HOLDER = holder()


def claimed(database: Database) -> Sequence[Chunk]:
    return database.call(chunks.claim, HOLDER, ["tiny"], 100)


def limited(**quota: int) -> Limits:
    return Limits(1000, 1_000_000, lambda: Quotas(named={"a": Quota(**quota)}))


def test_each_quota(database: Database) -> None:
    """Each limit counts what has no result, of that tenant alone; a retry counts too."""
    first = stored(database, 10, limited(open_batches=1), tenant="a")
    for limits in (limited(open_batches=1), limited(queued_requests=19), limited(queued_tokens=1)):
        with pytest.raises(FullError, match="tenant a: "):
            stored(database, 10, limits, tenant="a")
        stored(database, 10, limits, tenant="b")
    with pytest.raises(FullError):
        database.call(creation.reserve, limited(queued_requests=10), Options(tenant="a"))
    [chunk] = [each for each in claimed(database) if each.batch_id == first.id]
    database.call(results.write, answers(chunk, range(5), status=500), HOLDER.incarnation)
    second = stored(database, 14, limited(queued_requests=19), tenant="a")
    assert database.call(usage.take, "a")[0].queued_requests == 19
    database.call(endings.cancel, second.id)
    database.call(results.write, answers(chunk, range(5, 10)), HOLDER.incarnation)
    with pytest.raises(FullError, match="queued requests: 5, at most 4 are allowed, 4 left"):
        database.call(creation.retry, first.id, None, 60, limited(queued_requests=4))
    assert database.call(creation.retry, first.id, None, 60, limited(queued_requests=5)) is not None


def test_repeated_creation_at_a_full_quota(database: Database) -> None:
    """A client that missed the answer gets its batch, however full the queue is: with that batch, for one."""
    limits = limited(open_batches=1, queued_requests=3)
    first = stored(database, 3, limits, tenant="a", request_id="r")
    database.call(creation.reserve, limits, Options(request_id="r", tenant="a"))
    with pytest.raises(creation.DuplicateError) as caught:
        stored(database, 3, limits, tenant="a", request_id="r")
    assert caught.value.batch.id == first.id


def test_quota_is_exact_however_many_create_at_once(database: Database) -> None:
    """Creations of one tenant that run at the same moment do not exceed its quota together."""
    limits = limited(open_batches=3)

    def create(_: int) -> bool:
        try:
            stored(database, 200, limits, tenant="a")
        except FullError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(create, range(16))) == 3
    assert count(database, "batches") == 3
    assert count(database, "requests") == 600


def test_used_tokens_outlive_their_batches(database: Database) -> None:
    """The tokens of a tenant stay the same while its batch ends, is counted and is deleted; each is counted once."""
    ended, open_ = stored(database, 10, tenant="a"), stored(database, 10, tenant="a")
    stored(database, 10, tenant="b")
    for chunk in claimed(database):
        size = 10 if chunk.batch_id == ended.id else 4
        database.call(results.write, answers(chunk, range(size)), HOLDER.incarnation)
    keeping = Housekeeping(database, retention_s=0, is_unserved=lambda models: False, host_forgotten_s=1000)

    def used() -> list[tuple[str, int, int, int]]:
        return [(u.tenant, u.open_batches, u.prompt_tokens, u.completion_tokens) for u in database.call(usage.take)]

    expected = [("a", 1, 28, 42), ("b", 1, 8, 12)]
    assert used() == expected
    database.call(keeping.once)
    assert used() == expected
    assert count(database, "batches WHERE is_counted") == 1
    database.call(keeping.once)
    assert used() == expected
    database.call(endings.delete, ended.id)
    assert used() == expected
    # Deleted before anybody has counted it.
    database.call(endings.cancel, open_.id)
    database.call(lambda db: db.execute_sql("UPDATE chunks SET lease_until = 'epoch' WHERE state = 'leased'"))
    database.call(endings.settle_cancelled)
    database.call(endings.delete, open_.id)
    assert used() == [("a", 0, 28, 42), ("b", 1, 8, 12)]


def test_batches_of_before_belong_to_default(postgres: str) -> None:
    """An older database is migrated: its batches are those of `default`, and their request_ids still theirs."""
    with new_database(postgres, "template0") as url:
        old = Database(url, "test")
        folder = str(ROOT / "service/db/migrations")
        old.call(lambda db: Runner(db, directory=folder).up("0008_large_bodies"))
        old.call(
            lambda db: db.execute_sql(
                "INSERT INTO batches (state, request_id, digest, metadata, priority, models, total, prompt_tokens)"
                " VALUES ('completed', 'r', '', '{}', 0, '{}', 1, 7), ('in_progress', 's', '', '{}', 0, '{}', 1, 0)"
            )
        )
        old.call(lambda db: Runner(db, directory=folder).up())
        listed = old.call(batches.list_page, [], None, 10, "default")
        assert [(batch.request_id, batch.tenant) for batch in listed] == [("s", "default"), ("r", "default")]
        assert old.call(batches.of_request_id, "default", "r").id == listed[1].id
        assert old.call(batches.of_request_id, "a", "r") is None
        assert old.call(usage.take)[0].prompt_tokens == 7
        old.close()


def test_nothing_is_lost_when_all_happens_at_once(database: Database) -> None:
    """Creating, running, cancelling, deleting and counting at the same time neither deadlock nor miscount a token."""
    limits = Limits(1000, 1_000_000, lambda: Quotas(Quota(open_batches=1000)))

    def work(number: int) -> int:
        mine, written = holder(f"w{number}"), 0
        for turn in range(12):
            batch = stored(database, 10, limits, tenant=f"t{(number + turn) % 3}")
            for chunk in database.call(chunks.claim, mine, ["tiny"], 2):
                written += database.call(results.write, answers(chunk, range(10)), mine.incarnation)
            with suppress(StateError):
                database.call(endings.cancel, batch.id)
            with suppress(StateError):
                database.call(endings.delete, batch.id)
            database.call(usage.count_ended, 3)
        return written

    with ThreadPoolExecutor(6) as pool:
        written = sum(pool.map(work, range(6)))
    found = database.call(usage.take)
    assert {each.tenant for each in found} == {"t0", "t1", "t2"}
    assert written > 0
    assert sum(each.prompt_tokens for each in found) == 2 * written
    assert sum(each.completion_tokens for each in found) == 3 * written
