"""A Postgres without transaction ids until a VACUUM, as it is when autovacuum could not do its work for long."""

import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import peewee
import pytest

from service import embedded_postgres as embedded
from service.db import chunks, recoveries, results
from service.db.availability import DatabaseAwayError
from service.db.connection import Database, migrate
from tests.support.servers import PostgresServer
from tests.support.store import answers, holder, stored
from watchdog.observe.observer import CAN_BEAT

# No ids are given from 3 million before the oldest that is in use, which is next to 0; a file has the state of 2**20.
NEXT = (2**31 - 2_000_000 >> 20) << 20


@pytest.fixture
def server() -> Iterator[PostgresServer]:
    """A server of its own."""
    with tempfile.TemporaryDirectory(prefix="vbw-", ignore_cleanup_errors=True) as home:
        server = PostgresServer(Path(home))
        server.start()
        try:
            yield server
        finally:
            server.stop()


def use_up(server: PostgresServer) -> None:
    """Restarts the server with hardly an id left."""
    server.stop()
    data = server.homes[0] / "pgdata"
    owner = embedded.unprivileged()
    given = {} if owner is None else {"user": owner.pw_uid, "group": owner.pw_gid, "extra_groups": []}
    reset = [str(embedded.binaries() / "pg_resetwal"), "-x", str(NEXT), "-D", str(data)]
    subprocess.run(reset, check=True, cwd="/", stdout=subprocess.DEVNULL, timeout=60, **given)  # type: ignore[call-overload]
    states = data / "pg_xact" / f"{NEXT >> 20:04X}"
    states.write_bytes(bytes(1 << 18))
    if owner is not None:
        os.chown(states, owner.pw_uid, owner.pw_gid)
    server.start()


def test_is_an_outage(server: PostgresServer) -> None:
    """It is away for whatever writes, so nobody is told that the data is wrong, and for the watchdog, which then holds
    though all can be read; what cannot be stored meanwhile is stored afterwards."""
    database = Database(server.url % "batch", "test")
    database.call(migrate)
    batch = stored(database, 3)
    worker = holder()
    [chunk] = database.call(chunks.claim, worker, ["tiny"], 1)
    database.call(lambda db: db.execute_sql("ALTER DATABASE template0 ALLOW_CONNECTIONS true"))
    use_up(server)

    def beat(db: peewee.PostgresqlDatabase) -> None:
        db.execute_sql(CAN_BEAT, (worker.worker_id,))

    assert database.call(recoveries.uptime_s) > 0
    for write in (
        beat,
        lambda db: results.write(db, answers(chunk, range(3)), worker.incarnation),
        lambda db: chunks.claim(db, worker, ["tiny"], 1),
    ):
        with pytest.raises(DatabaseAwayError, match="not accepting commands"):
            database.call(write)
    with pytest.raises(DatabaseAwayError, match="not accepting commands"):
        stored(database, 3)

    for name in ("batch", "postgres", "template1", "template0"):
        vacuum(server.url % name)
    database.call(beat)
    assert database.call(results.write, answers(chunk, range(3)), worker.incarnation) == 3
    assert stored(database, 3).id > batch.id
    database.close()


def vacuum(url: str) -> None:
    """Frees the ids of a database."""
    admin = Database(url, "vacuum", 60)
    admin.call(lambda db: db.execute_sql("VACUUM (FREEZE)"))
    admin.close()
