"""The heartbeat of watchdogs in Postgres."""

from service.db import watchdogs
from service.db.connection import Database


def test_a_watchdog_is_as_old_as_its_last_sign(database: Database) -> None:
    """Each host has one row, aged by Postgres; one that nobody has seen for days is not missed any more."""
    for watchdog_id, pid in (("a", 1), ("b", 2), ("c", 3), ("a", 1)):
        database.call(watchdogs.write, watchdog_id, pid)
    database.call(
        lambda db: db.execute_sql(
            "UPDATE watchdogs SET last_seen = last_seen - CASE watchdog_id WHEN 'a' THEN '100 s'::interval"
            " ELSE '8 days' END WHERE watchdog_id <> 'b'"
        )
    )
    a, b = database.call(watchdogs.read)
    assert (a.watchdog_id, b.watchdog_id) == ("a", "b")
    assert 100 <= a.age_s < 200
    assert 0 <= b.age_s < 100


def test_a_life_begins_with_another_pid(database: Database) -> None:
    """Since when a watchdog runs is kept over its beats and begins anew with its next life."""
    started = []
    for pid in (1, 1, 2):
        database.call(watchdogs.write, "a", pid)
        started += database.call(lambda db: db.execute_sql("SELECT start_time FROM watchdogs").fetchall())
    assert started[0] == started[1] < started[2]
