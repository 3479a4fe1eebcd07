"""Whose leases end because a worker is lost, and which deaths that counts as."""

from collections.abc import Sequence
from uuid import UUID

import peewee
import psycopg2
import pytest

from service.db import chunks, heartbeats, losses, results, sharing, suspects
from service.db.chunks import Holder
from service.db.connection import Database
from service.db.heartbeats import Beat, Phase
from service.db.results import Span
from tests.support.store import answers, holder, stored
from tests.support.waiting import until


def sql(database: Database, statement: str, *params: object) -> list[tuple[object, ...]]:
    def run(db: peewee.PostgresqlDatabase) -> list[tuple[object, ...]]:
        cursor = db.execute_sql(statement, params)
        return cursor.fetchall() if cursor.description else []

    return database.call(run)


def beat(database: Database, mine: Holder, age_s: float = 0) -> None:
    before = next(iter(database.call(heartbeats.read, mine.worker_id)), None)
    database.call(heartbeats.begin, Beat(mine.worker_id, mine.incarnation, "x:1", Phase.READY, 1), 60, before)
    sql(database, "UPDATE heartbeats SET last_seen = last_seen - make_interval(secs => %s) WHERE incarnation = %s",
        age_s, mine.incarnation)  # fmt: skip


def working(database: Database, worker_id: str = "a:worker", begun: int = 30, age_s: float = 11) -> Holder:
    """A worker with one chunk of 100 requests, of which 10 are answered and `begun` may be in the engine."""
    mine = holder(worker_id)
    beat(database, mine, age_s)
    [chunk] = database.call(chunks.claim, mine, ["tiny"], 1)
    first = chunk.first_index
    database.call(chunks.begin, mine, {chunk.id: first + begun - 1 if begun else None})
    database.call(results.write, answers(chunk, range(first, first + min(10, begun))), mine.incarnation)
    return mine


def see(database: Database, mine: Holder, is_reachable: bool, seen_from: str = "b") -> None:
    database.call(losses.report, seen_from, {mine.incarnation: is_reachable})


def taken_over(database: Database) -> Sequence[tuple[int, int, int]]:
    found = [loss.burial for loss in database.call(losses.take_over, 0.001)]
    return [(burial.released, burial.suspects, burial.crashed) for burial in found]


def test_all_evidence_ends_leases(database: Database) -> None:
    """What a lost worker had in its engine becomes suspect, the rest of the chunk does not, and all of it runs."""
    batch = stored(database, 100)
    lost = working(database)
    see(database, lost, False)
    assert taken_over(database) == [(1, 20, 0)]
    assert database.call(chunks.renew, lost, [1]) == set()
    heir = holder("b:worker")
    [rest] = database.call(chunks.claim, heir, ["tiny"], 5)
    assert [request.index for request in database.call(chunks.unanswered, rest)] == list(range(30, 100))
    database.call(results.write, answers(rest, range(30, 100)), heir.incarnation)
    while few := database.call(suspects.claim_few, heir, ["tiny"], 0):
        for chunk in few:
            database.call(
                results.write, answers(chunk, range(chunk.first_index, chunk.first_index + 1)), heir.incarnation
            )
    assert sql(database, "SELECT state, completed FROM batches WHERE id = %s", batch.id) == [("completed", 100)]
    assert taken_over(database) == []


def test_two_workers_see_a_loss_at_once(database: Database) -> None:
    """The one that comes second takes nothing over, and says nothing."""
    stored(database, 100)
    lost = working(database)
    see(database, lost, False)
    both = [database.call(losses._take_over, lost.worker_id, str(lost.incarnation)) for _ in range(2)]
    assert [loss is not None for loss in both] == [True, False]


@pytest.mark.parametrize("missing", ["beats", "is_reached", "nobody_looks", "own_gateway", "old_report", "session"])
def test_less_evidence_ends_none(database: Database, database_url: str, missing: str) -> None:
    """A heartbeat, a gateway that reaches it, no report of another host or a session that is used: it is not lost."""
    stored(database, 100)
    lost = working(database, age_s=9 if missing == "beats" else 11)
    if missing != "nobody_looks":
        see(database, lost, False, "a" if missing == "own_gateway" else "b")
    if missing == "is_reached":
        see(database, lost, True, "c")
    if missing == "old_report":
        sql(database, "UPDATE losses SET report_time = report_time - interval '6 s'")
    session = psycopg2.connect(database_url, application_name=f"vllm-batch-worker-run-{lost.incarnation}")
    session.cursor().execute("SELECT 1")
    if missing != "session":
        session.close()
    assert taken_over(database) == []
    session.close()


def test_notices_are_no_use_of_a_session(database: Database, database_url: str) -> None:
    """They reach the session of a lost host for as long as Postgres keeps it, which does not make it look alive."""
    mine = holder("a:worker")
    session = psycopg2.connect(database_url, application_name=f"vllm-batch-heart-{mine.incarnation}")
    session.autocommit = True
    session.cursor().execute(f"LISTEN {sharing.CHANNEL}")

    def used() -> list[tuple[object, ...]]:
        which = f"vllm-batch-heart-{mine.incarnation}"
        return sql(database, "SELECT state_change FROM pg_stat_activity WHERE application_name = %s", which)

    before = used()
    database.call(sharing.tell_arrival)

    def is_told() -> bool:
        session.poll()
        return bool(session.notifies)

    until(is_told, "the notice")
    assert used() == before
    session.close()


def test_what_waited_is_no_suspect(database: Database) -> None:
    """A chunk that had no request in the engine goes back whole, and nobody counts a death."""
    stored(database, 100)
    lost = working(database, begun=0)
    see(database, lost, False)
    assert taken_over(database) == [(1, 0, 0)]
    assert sql(database, "SELECT count, deaths FROM chunks") == [(100, 0)]


def test_what_was_given_away_is_no_suspect(database: Database) -> None:
    """Also if it was noted as perhaps in the engine before: what remains is as noted, however late a note comes."""
    stored(database, 100)
    lost = working(database, begun=50)
    [(chunk, first)] = sql(database, "SELECT id, first_index FROM chunks WHERE state = 'leased'")
    assert isinstance(chunk, int)
    assert isinstance(first, int)
    given = [first + place for place in (*range(40, 50), *range(90, 100))]
    assert database.call(sharing.give, lost, [sharing.Part(chunk, given)]) == 20
    # As a frozen Postgres runs it: of a request that is not in the chunk any more.
    database.call(chunks.begin, lost, {chunk: first + 49})
    see(database, lost, False)
    assert taken_over(database) == [(1, 30, 0)]
    left = sql(database, "SELECT count FROM chunks WHERE deaths = 0 AND state = 'pending' ORDER BY id")
    assert left == [(40,), (20,)]


def test_leases_that_run_out_count_as_deaths_unless_the_worker_lives(database: Database) -> None:
    """A host that only Postgres cannot reach has not died; one that nobody hears of has."""
    stored(database, 200)
    alive = working(database, "a:worker", age_s=61)
    working(database, "c:worker", age_s=61)
    see(database, alive, True)
    sql(database, "UPDATE chunks SET lease_until = clock_timestamp() WHERE state = 'leased'")
    found = {loss.worker_id: loss.burial for loss in database.call(losses.release_expired, 0.001)}
    assert {name: (burial.released, burial.suspects) for name, burial in found.items()} == {
        "a:worker": (1, 0),
        "c:worker": (1, 20),
    }


def test_suspects_of_a_lost_host_run_in_large_groups(database: Database) -> None:
    """A quarter of them at a time, at least 16: a host is seldom lost because of a request."""
    stored(database, 200)
    mine = [holder("b:worker"), holder("c:worker")]
    lost = working(database, begun=100)
    see(database, lost, False)
    assert taken_over(database) == [(0, 90, 0)]
    assert [len(database.call(suspects.claim_few, each, ["tiny"], 0)) for each in mine] == [23, 23]
    sql(database, "UPDATE chunks SET state = 'done', unfinished = 0, worker_id = NULL, incarnation = NULL,"
        " lease_until = NULL WHERE state = 'leased'")  # fmt: skip
    assert len(database.call(suspects.claim_few, mine[0], ["tiny"], 1)) == 15


def die_alone(database: Database, worker_id: str) -> tuple[int, int, int]:
    """A worker that is lost with one suspect alone in its engine."""
    mine = holder(worker_id)
    beat(database, mine, 11)
    [alone] = database.call(suspects.claim_alone, mine, ["tiny"])
    database.call(chunks.begin, mine, {alone.id: alone.first_index})
    see(database, mine, False)
    [found] = taken_over(database)
    return found


def test_a_flaky_host_makes_nobody_guilty(database: Database) -> None:
    """Alone in an engine whose host is lost counts only if another host died with it too; then it is to blame."""
    batch = stored(database, 1)
    for _ in range(2):
        mine = holder("flaky:worker")
        beat(database, mine, 11)
        for claim, *how_many in ((chunks.claim, 1), (suspects.claim_few, 0)):
            for chunk in database.call(claim, mine, ["tiny"], *how_many):
                database.call(chunks.begin, mine, {chunk.id: 0})
        see(database, mine, False, "z")
        assert taken_over(database)[0][1] == 1
    for _ in range(4):
        assert die_alone(database, "flaky:worker") == (1, 1, 0)
    assert die_alone(database, "good:worker") == (0, 0, 1)
    [killer] = database.call(results.read_page, "index", "all", batch.id, Span(0, 1))
    assert killer.error_code == "REQUEST_CRASHED_ENGINE"


def test_gateways_of_one_host_may_differ(database: Database) -> None:
    """A worker that one gateway of a host reaches is not lost, whatever another one there says last."""
    stored(database, 100)
    mine = working(database)
    see(database, mine, True, "b:gateway-1")
    see(database, mine, False, "b:gateway-2")
    see(database, mine, False, "a:gateway-1")
    assert taken_over(database) == []
    see(database, mine, False, "b:gateway-1")
    assert taken_over(database) == [(1, 20, 0)]


def test_what_gateways_of_its_own_host_say(database: Database) -> None:
    """That the gateways of a worker's own host do not reach it is no evidence: they may be gone with it."""
    stored(database, 100)
    mine = working(database)
    see(database, mine, False, "a:gateway-1")
    see(database, mine, False, "a")
    assert taken_over(database) == []


def test_a_life_without_its_name_settles_only_its_own(database: Database) -> None:
    """A worker that slept while another took its name, and whose engine then dies, touches nothing that one holds."""
    stored(database, 200)
    old, new = working(database), working(database)
    holds = "SELECT id FROM chunks WHERE incarnation = %s"
    [(chunk,)] = sql(database, holds, new.incarnation)
    burial = database.call(suspects.bury, "a:worker", old.incarnation)
    assert (burial.released, burial.suspects, burial.crashed) == (1, 20, 0)
    assert database.call(chunks.renew, new, [int(str(chunk))]) == {chunk}
    burial = database.call(suspects.bury, "a:worker", old.incarnation)
    assert (burial.released, burial.suspects, burial.crashed) == (0, 0, 0)
    # The one that has the name settles what all before it held.
    heir = holder("a:worker")
    beat(database, heir)
    assert database.call(suspects.bury, "a:worker", heir.incarnation).suspects == 20


def test_suspects_avoid_hosts_that_died_with_them(database: Database) -> None:
    """A worker first takes the suspect that has not died on its own host."""
    stored(database, 2)
    mine = holder("a:worker")
    [chunk] = database.call(chunks.claim, mine, ["tiny"], 1)
    assert database.call(suspects.bury, "a:worker").suspects == 2
    sql(database, "UPDATE chunks SET deaths = 2 WHERE deaths > 0")
    sql(database, "UPDATE chunks SET death_hosts = '{b}' WHERE deaths > 0 AND first_index = 1")
    [first] = database.call(suspects.claim_alone, mine, ["tiny"])
    assert (chunk.count, first.first_index) == (2, 1)


def test_the_file_that_a_lost_worker_checks_is_checked_by_another(database: Database) -> None:
    """Its lease ends with those of the chunks."""
    lost = holder("a:worker")
    beat(database, lost, 11)
    statement = """
        INSERT INTO batches (id, state, tenant, digest, metadata, priority, models, total)
        VALUES (7, 'validating', 'default', '', '{}', 0, '{}', 0);
        INSERT INTO file_batches (batch_id, file_id, endpoint, completion_window, create_digest, call_id, worker_id,
                                  incarnation, lease_until)
        VALUES (7, 1, '', '', '', '', 'a:worker', %s, clock_timestamp() + interval '60 s')
    """
    sql(database, statement, UUID(str(lost.incarnation)))
    see(database, lost, False)
    assert taken_over(database) == [(0, 0, 0)]
    assert sql(database, "SELECT lease_until <= clock_timestamp() FROM file_batches") == [(True,)]
