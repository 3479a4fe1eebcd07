"""What watchdogs write to Postgres, and read there."""

from service.clock import SystemClock
from service.db import watchdogs
from service.db.connection import Database
from service.machine import Place
from tests.support.observers import observer_of
from watchdog.supervisor import Supervisor


def test_a_watchdog_is_as_old_as_its_last_sign(database: Database) -> None:
    """Each watchdog has one row, aged by Postgres."""
    for watchdog_id, pid in (("a", 1), ("b", 2), ("c", 3), ("a", 1)):
        database.call(watchdogs.write, watchdog_id, pid)
    database.call(
        lambda db: db.execute_sql(
            "UPDATE watchdogs SET last_seen = last_seen - '100 s'::interval WHERE watchdog_id = 'a'"
        )
    )
    a, b, c = database.call(watchdogs.read)
    assert (a.watchdog_id, b.watchdog_id, c.watchdog_id) == ("a", "b", "c")
    assert 100 <= a.age_s < 200
    assert 0 <= b.age_s < 100


def test_a_life_begins_with_another_pid(database: Database) -> None:
    """A watchdog's start time is kept across beats and renewed with another pid."""
    started = []
    for pid in (1, 1, 2):
        database.call(watchdogs.write, "a", pid)
        started += database.call(lambda db: db.execute_sql("SELECT start_time FROM watchdogs").fetchall())
    assert started[0] == started[1] < started[2]


def test_another_machine_does_not_beat_for_it(database: Database) -> None:
    """The watchdog of another machine with the same name gets the row only once the first was not seen for a minute."""
    owners = []
    for machine in ("", "here", "there"):
        database.call(watchdogs.write, "a", 1, machine)
        owners += database.call(lambda db: db.execute_sql("SELECT machine FROM watchdogs").fetchall())
    database.call(lambda db: db.execute_sql("UPDATE watchdogs SET last_seen = last_seen - interval '61 s'"))
    database.call(watchdogs.write, "a", 1, "there")
    owners += database.call(lambda db: db.execute_sql("SELECT machine FROM watchdogs").fetchall())
    assert [owner for (owner,) in owners] == ["", "here", "here", "there"]


def test_a_migration_that_runs_is_an_outage(database: Database) -> None:
    """No worker can beat before its migrations are applied, which may take minutes: until then Postgres is away."""
    observer = observer_of("here:worker", Supervisor("unix:///nowhere", 1), database, SystemClock(), Place())
    delete = "DELETE FROM schema_migration WHERE name = '0020_page' RETURNING name, applied"
    [pending] = database.call(lambda db: db.execute_sql(delete).fetchall())
    assert observer.observe().database_up_s is None
    database.call(lambda db: db.execute_sql("INSERT INTO schema_migration (name, applied) VALUES (%s, %s)", pending))
    assert observer.observe().database_up_s is not None
    observer.close()
